"""Read a checkpoint of any world size tensor by tensor, without a process group."""

import hashlib
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vjepa import config
from vjepa.checkpoints import checkpoint, storage
from vjepa.checkpoints.safe_unpickle import unpickle_metadata
from vjepa.methods.dynamics.settings import DynamicsSettings
from vjepa.methods.memory.settings import MemorySettings
from vjepa.weights.tensors import Joined, Renamed, SafeTensors, Tensors
from vjepa.weights.weights import Part, Weights
from vjepa.weights.world_model import part_kinds
from vjepa_data.errors import BadInput


def read_checkpoint(path: Path, part: Part) -> Weights:
    """Open a checkpoint, or the newest intact checkpoint of a run.

    Args:
        path: its folder.
        part: which of its encoders: `target` or `encoder`. A method without a moving average has the second alone.

    Raises:
        BadInput: there is none, it is damaged, or another version wrote it.
    """
    path = checkpoint.resolve(path)
    metadata = checkpoint.read_metadata(path)
    try:
        run = config.Run.model_validate(metadata.settings)
    except ValidationError as error:
        raise BadInput(f"{path}: its settings are not of this version: {error.errors()[0]['msg']}") from None
    tensors = Sharded(path)
    prefixes = {name.partition(".")[0] for name in tensors}
    exported = part if part in prefixes else "encoder"
    provenance = {
        "part": exported,
        "run": run.name,
        "step": metadata.step,
        "settings": dict(metadata.settings),
        "settings_hash": metadata.settings_hash,
        "manifests": list(metadata.manifests),
        "signals": dict(metadata.signals),
        "versions": dict(metadata.versions),
    }
    # Networks that only training uses (a projector, the other encoder, the optimizer) are left out.
    if "encoder" not in prefixes:
        tensors = Joined(tensors, read_frozen_encoder(path, run, tensors))
    parts = {"encoder": exported} | {kind.name: kind.name for kind in part_kinds(tensors.names)}
    clip = (run.data.crop.px, run.data.clip.frames, run.data.clip.fps)
    return Weights(run.model, *clip, run.objective.mask_kinds, Renamed(tensors, parts), provenance)


def read_frozen_encoder(path: Path, run: config.Run, tensors: Tensors) -> Tensors:
    """Open the file of the frozen encoder that a checkpoint refers to.

    Raises:
        BadInput: it is missing, or not the file that the run was trained with.
    """
    assert isinstance(run.objective, DynamicsSettings | MemorySettings), f"{run.objective.name} saves its encoder"
    assert run.objective.encoder is not None
    folder = Path(run.objective.encoder)
    try:
        with (folder / "model.safetensors").open("rb") as file:
            digest = list(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise BadInput(f"{path} refers to the encoder in {folder}, which cannot be read ({error.strerror})") from None
    if tensors["encoder_file.sha256"].tolist() != digest:
        raise BadInput(f"{path} was trained on another encoder than {folder} holds now; restore that file")
    return Renamed(SafeTensors(folder / "model.safetensors"), {"encoder": "encoder"})  # it may have dynamics of its own


class Sharded(Tensors):
    """All tensors of a sharded checkpoint. Each is assembled from its shards when it is used."""

    def __init__(self, path: Path) -> None:
        """Open the checkpoint in this folder and verify its files.

        Raises:
            BadInput: it is damaged.
        """
        if damage := checkpoint.find_corruption(path):
            raise BadInput(f"{path} is damaged: {damage}; choose another checkpoint of the run")
        self.reader = storage.open_reader(path)
        self.metadata = unpickle_metadata(path)
        self.entries = {
            name: entry
            for name, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.names = self.entries.keys()

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        checkpoint.read_tensors({name: tensor}, self.metadata, self.reader)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name].size)
