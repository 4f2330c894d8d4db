"""A checkpoint of any world size, read tensor by tensor, without a process group."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vjepa import config
from vjepa.checkpoints import checkpoint, storage
from vjepa.checkpoints.safe_unpickle import check_metadata
from vjepa.weights.tensors import Tensors
from vjepa.weights.weights import Part, Weights
from vjepa_data.settings import BadInput


def read_checkpoint(path: Path, part: Part) -> Weights:
    """Open a checkpoint, or the newest intact one of a run.

    Args:
        path: its folder.
        part: which of its encoders: `target` or `encoder`.

    Raises:
        BadInput: there is none, it is damaged, or another version wrote it.
    """
    path = checkpoint.resolve(path)
    facts = checkpoint.read_metadata(path)
    try:
        run = config.Run.model_validate(facts.settings)
    except ValidationError as error:
        raise BadInput(f"{path}: its settings are not of this version: {error.errors()[0]['msg']}") from None
    provenance = {
        "part": part,
        "run": run.name,
        "step": facts.step,
        "settings": dict(facts.settings),
        "settings_hash": facts.settings_hash,
        "manifests": list(facts.manifests),
        "versions": dict(facts.versions),
    }
    tensors = Sharded(path, {"encoder": part, "predictor": "predictor"})
    data = run.data
    return Weights(
        run.model, data.crop.px, data.clip.frames, data.clip.fps, run.objective.mask_kinds, tensors, provenance
    )


class Sharded(Tensors):
    """Tensors of a sharded checkpoint, each put together from its slices when asked for."""

    def __init__(self, path: Path, parts: Mapping[str, str]) -> None:
        """Args:
        path: a checkpoint.
        parts: which of its models stands for each of our parts.

        Raises:
            BadInput: it is damaged.
        """
        if wrong := checkpoint.find_corruption(path):
            raise BadInput(f"{path} is damaged: {wrong}; choose another checkpoint of the run")
        check_metadata(path)
        self.reader = storage.open_reader(path)
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.stored = {
            f"{ours}.{name.removeprefix(f'{theirs}.')}": (name, entry)
            for ours, theirs in parts.items()
            for name, entry in self.metadata.state_dict_metadata.items()
            if name.startswith(f"{theirs}.") and isinstance(entry, TensorStorageMetadata)
        }
        if "predictor.mask_tokens" not in self.stored:  # the head of another objective, of no use outside of training
            self.stored = {name: one for name, one in self.stored.items() if not name.startswith("predictor.")}
        self.names = self.stored.keys()

    def __getitem__(self, name: str) -> Tensor:
        stored, entry = self.stored[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        # The steps of DCP's own `load`, which reads the metadata of everything anew for every call.
        planner = DefaultLoadPlanner()
        planner.set_up_planner({stored: tensor}, self.metadata, is_coordinator=True)
        self.reader.read_data(planner.create_local_plan(), planner).wait()
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.stored[name][1].size)
