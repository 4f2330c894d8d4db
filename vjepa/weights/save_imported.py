"""Save tensors of another project as the checkpoint of a run that has not begun."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vjepa import config
from vjepa.checkpoints.checkpoint import CheckpointMetadata
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.checkpoints.run_folder import settings_hash, versions
from vjepa.distributed.world import join


def initial_metadata(run: config.Run, source: str) -> CheckpointMetadata:
    """Return the metadata of an imported checkpoint."""
    return CheckpointMetadata(
        step=0,
        world=1,
        settings=run.model_dump(mode="json"),
        settings_hash=settings_hash(run),
        manifests=[],
        wandb_id=None,
        versions={**versions(), "imported_from": source},
    )


def save_imported(
    run: config.Run, tensors: Mapping[str, Tensor], folder: Path, source: Path, *, trained: Collection[str]
) -> None:
    """Write the checkpoint, with an optimizer state of zeros.

    Args:
        run: settings of the run.
        tensors: all tensors, by their full names.
        folder: folder of the run.
        source: where the tensors are from.
        trained: names of the networks that are optimized.
    """
    state = {}
    for name, tensor in tensors.items():
        if name.partition(".")[0] in trained and not name.startswith("dynamics.scales."):
            state[f"optimizer.step.{name}"] = torch.zeros(())
            state[f"optimizer.exp_avg.{name}"] = torch.zeros_like(tensor)
            state[f"optimizer.exp_avg_sq.{name}"] = torch.zeros_like(tensor)
    with join(run.parallel) as world:
        CheckpointManager(folder, config.Checkpoint(), world).save(
            {**tensors, **state}, initial_metadata(run, source.name)
        )
