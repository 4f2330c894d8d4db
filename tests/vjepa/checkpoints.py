"""Checkpoints for tests: made without models, read by DCP alone, broken on purpose."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from vjepa.checkpoints.checkpoint import CheckpointMetadata, resolve
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.checkpoints.storage import open_reader
from vjepa.config import Checkpoint
from vjepa.distributed.world import World


def facts(step: int) -> CheckpointMetadata:
    """Return the metadata of a checkpoint of a step."""
    return CheckpointMetadata(step, 1, {"name": "x"}, "hash", ["corpus"], "id", {"vjepa": "0"})


def saved(folder: Path, world: World, steps: range, **settings: Any) -> CheckpointManager:
    """Save a checkpoint for each of some steps, all of whose weights are the step."""
    saver = CheckpointManager(folder, Checkpoint.model_validate(settings), world)
    for step in steps:
        saver.save(
            {"target.weight": torch.full((300,), float(step)), "optimizer.step.x": torch.tensor(1.0)}, facts(step)
        )
    return saver


def load_weights(path: Path, part: str = "target") -> dict[str, torch.Tensor]:
    """Return the `encoder`, `predictor` or `target` of a checkpoint, or of a run's newest intact checkpoint."""
    reader = open_reader(resolve(path))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(f"{part}.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def flip_a_bit(path: Path) -> None:
    """Damage the slices of a checkpoint as a bad disk would."""
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
