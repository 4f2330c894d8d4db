"""A model of others becomes a checkpoint of ours, to evaluate, export, or begin a run from (`start=OUT`).

    vjepa import vitl.pt --out runs/vitl                 V-JEPA, 2 or 2.1, as their authors release them
    vjepa import DIR --out runs/vitl                     a Hugging Face folder, or a native export

Tensors are taken over as they are, byte for byte; the optimizer's moments start at zero. What does not fit our network
is refused, with the first names that do not.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa import config
from vjepa.atomic import new_folder
from vjepa.checkpoints.checkpoint import CheckpointMetadata
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.checkpoints.run_folder import settings_hash, versions
from vjepa.distributed.world import join
from vjepa.nn.predictor import Predictor
from vjepa.weights.fair_checkpoints import Sizes, read_fair_checkpoint
from vjepa.weights.load import read_weights
from vjepa.weights.tensors import some
from vjepa.weights.weights import expected_shapes
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)


# A file that needs no more than its tensors tell.
NOTHING_TOLD = Sizes()


def import_checkpoint(source: Path, out: Path, sizes: Sizes = NOTHING_TOLD, *, overwrite: bool = False) -> Path:
    """Write a checkpoint from a model of others.

    Args:
        source: a file that `fair_checkpoints` reads, or a folder that `load.read_weights` reads.
        out: folder for the checkpoint, laid out as a run's.
        sizes: what cannot be told from a `.pt` file.
        overwrite: replace what an earlier import wrote there.

    Returns:
        The checkpoint.

    Raises:
        BadInput: no such file, one that holds more than tensors, another kind of model, or a place that is taken.
    """
    if source.is_file():
        found = read_fair_checkpoint(source, sizes)
        model, px, frames, fps = found.model, found.px, found.frames, sizes.fps
        encoder = found.online or found.average or {}
        parts = {"encoder": encoder, "target": found.average or encoder, "predictor": found.predictor or {}}
    else:
        weights = read_weights(source)
        model, px, frames, fps = weights.model, weights.px, weights.frames, weights.fps
        parts = {part: weights.tensors.part(name) for part, name in _PARTS.items()}
    if not parts["predictor"]:
        parts["predictor"] = _new_predictor(source, model)
    if "mask_tokens" not in parts["predictor"]:
        raise BadInput(f"{source}: its predictor has no mask_tokens; our network cannot be it")
    tokens = parts["predictor"]["mask_tokens"]
    if sizes.mask_tokens is not None:
        if strange := [one for one in sizes.mask_tokens if not 0 <= one < len(tokens)]:
            raise BadInput(f"mask_tokens has {strange[0]}, and the file has tokens 0 to {len(tokens) - 1}")
        parts["predictor"]["mask_tokens"] = tokens[list(sizes.mask_tokens)]
    run = run_for_weights(model, px=px, frames=frames, fps=fps, kinds=len(parts["predictor"]["mask_tokens"]))
    _check(source, model, parts)
    with new_folder(out, overwrite=overwrite, ours="imported") as folder:
        (folder / "imported").write_text(f"{source}\n")
        _save(run, parts, folder, source)
    path = out / "checkpoints" / "step_00000000"
    log.info("%s: %s from %s", path, model.encoder.name, source)
    return path


_PARTS = {"encoder": "encoder", "target": "encoder", "predictor": "predictor"}
Parts = dict[str, dict[str, Tensor]]


def run_for_weights(model: config.Model, *, px: int, frames: int, fps: float, kinds: int) -> config.Run:
    """A run that never was: only its model and the form of its clips mean something."""
    data: dict[str, Any] = {
        "sources": [{"shards": "unknown"}],
        "clip": {"frames": frames, "fps": fps},
        "crop": {"px": px},
    }
    masks = tuple(config.BLOCKS[kind % len(config.BLOCKS)] for kind in range(kinds))
    return config.Run.model_validate(
        {
            "name": "imported",
            "steps": 1,
            "batch_size": 1,
            "data": data,
            "model": model,
            "masks": masks,
            "objective": {"name": "vjepa2_1" if model.predict_context else "vjepa2"},
            "optim": {"lr": 1e-4},
        }
    )


def initial_metadata(run: config.Run, source: str) -> CheckpointMetadata:
    """What a checkpoint says of itself that was never trained here."""
    return CheckpointMetadata(
        step=0,
        world=1,
        settings=run.model_dump(mode="json"),
        settings_hash=settings_hash(run),
        manifests=[],
        wandb_id=None,
        versions={**versions(), "imported_from": source},
    )


def _save(run: config.Run, parts: Parts, folder: Path, source: Path) -> None:
    tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    for part in ("encoder", "predictor"):
        for name, tensor in parts[part].items():
            tensors[f"optimizer.step.{part}.{name}"] = torch.zeros(())
            tensors[f"optimizer.exp_avg.{part}.{name}"] = torch.zeros_like(tensor)
            tensors[f"optimizer.exp_avg_sq.{part}.{name}"] = torch.zeros_like(tensor)
    with join(run.parallel) as world:
        CheckpointManager(folder, config.Checkpoint(), world).save(tensors, initial_metadata(run, source.name))


def _new_predictor(source: Path, model: config.Model) -> dict[str, Tensor]:
    log.warning("%s has no predictor: a new one is made, good for features but not for predictions", source)
    return dict(Predictor(model, len(config.BLOCKS)).state_dict())


def _check(source: Path, model: config.Model, parts: Parts) -> None:
    """Name the first tensors that are missing, too many, or of another shape."""
    shapes = expected_shapes(model, len(parts["predictor"]["mask_tokens"]))
    for part, named in parts.items():
        name = _PARTS[part]
        expected = {one.removeprefix(f"{name}."): shape for one, shape in shapes.items() if one.startswith(f"{name}.")}
        complaints: Sequence[tuple[str, list[str]]] = (
            ("lacks", sorted(expected.keys() - named.keys())),
            ("has", sorted(named.keys() - expected.keys())),
        )
        for word, names in complaints:
            if names:
                raise BadInput(f"{source}: its {part} {word} {some(names)}; it is not a model of this kind")
        for one, shape in expected.items():
            if tuple(named[one].shape) != shape:
                raise BadInput(f"{source}: {part} {one} is {list(named[one].shape)}, expected {list(shape)}")
            named[one] = named[one].float().contiguous()
