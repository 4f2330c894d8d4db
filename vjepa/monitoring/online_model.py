"""The model of the moment, for evaluations during training."""

from torch.distributed.tensor import DTensor

from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.methods.base import Networks, named_parameters
from vjepa.weights.tensors import InMemory, Renamed
from vjepa.weights.world_model import WorldModel, part_kinds


def copy_model(run: Run, world: World, networks: Networks) -> WorldModel | None:
    """Return the model that `vjepa.load` would read from a checkpoint written now, on the first rank's device.

    All ranks must call it together, to gather sharded weights. Ranks other than the first get None.
    """
    tensors = InMemory(
        {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in named_parameters(dict(networks.items())).items()
        }
    )
    if not world.is_first:
        return None
    parts = {"encoder": networks.exported} | {kind.name: kind.name for kind in part_kinds(tensors.names)}
    clip = run.data.clip
    form = {"px": run.data.crop.px, "frames": clip.frames, "fps": clip.fps}
    return WorldModel(run.model, Renamed(tensors, parts), **form, provenance={}).to(world.device)
