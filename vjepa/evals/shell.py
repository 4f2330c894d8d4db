"""The shell of every evaluation: load, compare, show progress, resume, write, publish.

Features that were computed before an interruption are kept in `.vjepa-features` in the folder of the result. The same
command continues there, and other evaluations of the same model and corpus reuse them.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vjepa.atomic import check_free, new_file
from vjepa.distributed.world import World
from vjepa.evals.base import CommonSettings, EvaluationSettings, Result, open_context
from vjepa.evals.features import PixelEncoder, trained_short
from vjepa.evals.publish import find_record, publish
from vjepa.evals.registry import find_evaluation
from vjepa.weights.load import load
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.weights import Part, random_encoder
from vjepa_data.settings import BadInput


def settings_class(name: str) -> type[CommonSettings]:
    """Import the settings class of an evaluation.

    Raises:
        BadInput: the evaluation is unknown.
    """
    entry = find_evaluation(name)
    return getattr(importlib.import_module(entry.module), entry.settings)


def run_evaluation(
    name: str,
    model_path: Path,
    data: Path,
    settings: CommonSettings | Mapping[str, Any],
    *,
    out: Path | None = None,
    part: Part = "target",
    overwrite: bool = False,
    wandb: bool = False,
) -> Result:
    """Evaluate a model on a corpus. Under torchrun the ranks share the work.

    Args:
        name: an evaluation of `vjepa.evals.registry`.
        model_path: a run, a checkpoint, or an export.
        data: folder of the corpus.
        settings: an instance of the evaluation's settings class, or values of its fields.
        out: JSON file to write. By default nothing is written, and an interrupted evaluation cannot be resumed.
        part: which encoder of a run or checkpoint.
        overwrite: replace an earlier result.
        wandb: add the scores to the run's record at Weights & Biases.

    Returns:
        The result, the same on all ranks.

    Raises:
        BadInput: the evaluation, model, corpus, split or label is unknown, or `out` exists.
    """
    entry = find_evaluation(name)
    if not isinstance(settings, CommonSettings):
        settings = _validate(settings_class(name), settings)
    if out is not None:
        check_free(out, overwrite=overwrite)
    if wandb:
        find_record(model_path)
    evaluate = importlib.import_module(entry.module).evaluate
    model = load(model_path, part)
    with open_context(out, overwrite=overwrite) as context:
        if isinstance(settings, EvaluationSettings):
            settings = settings.model_copy(update={"short": settings.short or trained_short(model)})
        context = replace(context, **_baselines(model.encoder, settings, context.world))
        result = evaluate(model.to(context.world.device), data, settings, context)
        result = replace(result, kind=name, model=describe_model(model_path, model.encoder))
        context.world.gather(None)  # all files of the evaluation exist before the result that refers to them
        if context.world.is_first:
            if out is not None:
                with new_file(out, overwrite=overwrite) as partial:
                    partial.write_text(json.dumps(result.to_json(), indent=2) + "\n")
            if wandb:
                publish(result, model_path)
    return result


def describe_model(path: Path, encoder: VideoEncoder) -> dict[str, Any]:
    """Say which model a result is about."""
    return {"path": str(path), **{key: encoder.provenance.get(key) for key in ("part", "run", "step")}}


def _baselines(encoder: VideoEncoder, settings: CommonSettings, world: World) -> dict[str, Any]:
    wanted = settings.wanted_baselines()
    untrained = tuple(random_encoder(encoder, seed).to(world.device) for seed in wanted.untrained_seeds)
    return {"untrained": untrained, "pixels": PixelEncoder(encoder).to(world.device) if wanted.pixels else None}


def _validate(wanted: type[CommonSettings], values: Mapping[str, Any]) -> CommonSettings:
    try:
        return wanted.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInput(f"invalid setting {place} ({first['input']!r}): {first['msg']}") from None
