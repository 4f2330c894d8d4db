"""Import a model of another project as a checkpoint, to evaluate, export, or start a run from (`start=OUT`).

    vjepa import vitl.pt --out runs/vitl      a file of V-JEPA, V-JEPA 2, 2-AC or 2.1 as its authors release it
    vjepa import DIR --out runs/vitl          a Hugging Face folder, or a native export

Tensors are copied byte for byte and the optimizer state starts at zero. Other architectures are rejected. The error
lists the first mismatched parameters.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from vjepa import config
from vjepa.atomic import new_folder
from vjepa.methods.levjepa.method import Projector
from vjepa.methods.levjepa.settings import LeVJEPASettings
from vjepa.nn.predictor import Predictor
from vjepa.weights.fair_checkpoints import Objective, Sizes, read_fair_checkpoint
from vjepa.weights.import_dynamics import import_dynamics
from vjepa.weights.load import read_weights
from vjepa.weights.save_imported import save_imported
from vjepa.weights.tensors import some
from vjepa.weights.weights import expected_shapes
from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)


# For a file whose tensors tell all of its settings.
DEFAULT_SIZES = Sizes()


def import_checkpoint(source: Path, out: Path, sizes: Sizes = DEFAULT_SIZES, *, overwrite: bool = False) -> Path:
    """Write a checkpoint from a model of another project.

    Args:
        source: a file that `fair_checkpoints` reads, or a folder that `load.read_weights` reads.
        out: folder for the checkpoint, laid out like a run.
        sizes: settings that cannot be inferred from a `.pt` file.
        overwrite: replace the result of an earlier import.

    Returns:
        Folder of the checkpoint.

    Raises:
        BadInput: the source is missing, holds Python objects, or is an unsupported model, or `out` exists.
    """
    if source.is_file():
        found = read_fair_checkpoint(source, sizes)
        if found.has_actions:
            return import_dynamics(source, out, found, sizes, overwrite=overwrite)
        model, px, frames, fps = found.model, found.px, found.frames, sizes.fps
        encoder = found.online or found.average or {}
        parts = {"encoder": encoder, "target": found.average or encoder, "predictor": found.predictor or {}}
    else:
        weights = read_weights(source)
        model, px, frames, fps = weights.model, weights.px, weights.frames, weights.fps
        parts = {part: weights.tensors.part(name) for part, name in _PARTS.items()}
    model, objective = _choose_objective(source, model, sizes.objective, has_predictor=bool(parts["predictor"]))
    if not parts["predictor"]:
        parts["predictor"] = _new_predictor(source, model, objective)
    kinds = 0 if objective == "levjepa" else _select_mask_tokens(source, parts["predictor"], sizes)
    run = run_for_weights(model, px=px, frames=frames, fps=fps, kinds=kinds, objective=objective)
    _check(source, model, parts)
    with new_folder(out, overwrite=overwrite, ours="imported") as folder:
        (folder / "imported").write_text(f"{source}\n")
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        save_imported(run, tensors, folder, source, trained=("encoder", "predictor"))
    path = out / "checkpoints" / "step_00000000"
    log.info("%s: %s from %s, to be trained further by %s", path, model.encoder.name, source, objective)
    return path


_PARTS = {"encoder": "encoder", "target": "encoder", "predictor": "predictor"}
Parts = dict[str, dict[str, Tensor]]


def run_for_weights(
    model: config.Model, *, px: int, frames: int, fps: float, kinds: int, objective: Objective | None = None
) -> config.Run:
    """Return the settings of a run with this model and form of clips. All other settings are placeholders.

    Args:
        model: the networks.
        px, frames, fps: form of the clips.
        kinds: kinds of mask.
        objective: method of the run, by default recognized by the predictor's output layers.

    Raises:
        BadInput: no method trains such a model.
    """
    data: dict[str, Any] = {
        "sources": [{"shards": "unknown"}],
        "clip": {"frames": frames, "fps": fps},
        "crop": {"px": px},
    }
    masks = tuple(config.BLOCKS[kind % len(config.BLOCKS)] for kind in range(kinds))
    name = objective or ("levjepa" if model.class_token else "vjepa2_1" if model.predict_context else "vjepa2")
    method = {"name": name, "local_px": model.patch_px} if name == "levjepa" else {"name": name, "masks": masks}
    settings = {"name": "imported", "steps": 1, "batch_size": 1, "optim": {"lr": 1e-4}}
    try:
        return config.Run.model_validate({**settings, "data": data, "model": model, "objective": method})
    except ValidationError as error:
        raise BadInput(f"a model of this kind cannot be imported: {error.errors()[0]['msg']}") from None


def _choose_objective(
    source: Path, model: config.Model, wanted: Objective | None, *, has_predictor: bool
) -> tuple[config.Model, Objective]:
    """Return the method that can train a model further, and the model with the output layers that it trains.

    Raises:
        BadInput: the wanted method does not fit.
    """
    found: Objective = "levjepa" if model.class_token else "vjepa2_1" if model.predict_context else "vjepa2"
    if wanted in (None, found):
        return model, found
    if has_predictor or model.class_token or (wanted == "levjepa" and model.levels):
        mark = "class token" if model.class_token else "predictor" if has_predictor else "levels"
        raise BadInput(f"{source}: its {mark} is of {found}, and --objective is {wanted}; leave it out")
    return model.model_copy(update={"predict_context": wanted == "vjepa2_1"}), wanted


def _select_mask_tokens(source: Path, predictor: dict[str, Tensor], sizes: Sizes) -> int:
    """Keep the wanted mask tokens and return their number."""
    if "mask_tokens" not in predictor:
        raise BadInput(f"{source}: its predictor has no mask_tokens; only masked predictors are supported")
    tokens = predictor["mask_tokens"]
    if sizes.mask_tokens is not None:
        if unknown := [number for number in sizes.mask_tokens if not 0 <= number < len(tokens)]:
            raise BadInput(f"mask_tokens has {unknown[0]}, and the file has tokens 0 to {len(tokens) - 1}")
        predictor["mask_tokens"] = tokens[list(sizes.mask_tokens)]
    return len(predictor["mask_tokens"])


def _new_predictor(source: Path, model: config.Model, objective: Objective) -> dict[str, Tensor]:
    name = "projector" if objective == "levjepa" else "predictor"
    log.warning("%s has no %s; an untrained one is added, so use the checkpoint for features only", source, name)
    if objective == "levjepa":
        return dict(Projector(model.encoder.width, *LeVJEPASettings().projector).state_dict())
    return dict(Predictor(model, len(config.BLOCKS)).state_dict())


def _check(source: Path, model: config.Model, parts: Parts) -> None:
    """Raise for the first tensors that are missing, unknown, or of another shape."""
    tokens = parts["predictor"].get("mask_tokens")
    shapes = expected_shapes(model, 0 if tokens is None else len(tokens))
    for part, named in parts.items():
        name = _PARTS[part]
        if part == "predictor" and tokens is None:
            continue  # a new projector
        expected = {key.removeprefix(f"{name}."): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
        differences: Sequence[tuple[str, list[str]]] = (
            ("lacks", sorted(expected.keys() - named.keys())),
            ("has", sorted(named.keys() - expected.keys())),
        )
        for word, names in differences:
            if names:
                raise BadInput(f"{source}: its {part} {word} {some(names)}; this architecture is not supported")
        for key, shape in expected.items():
            if tuple(named[key].shape) != shape:
                raise BadInput(f"{source}: {part} {key} is {list(named[key].shape)}, expected {list(shape)}")
            named[key] = named[key].float().contiguous()
