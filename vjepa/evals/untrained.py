"""The networks of a trained model as they were before training: a baseline of what training taught."""

import copy
from typing import Any

from vjepa.nn.encoder import Encoder
from vjepa.weights.tensors import InMemory
from vjepa.weights.world_model import WorldModel

CONSTANTS = ("actions.", "scales.", "centre.")
"""Statistics of a corpus in the parts of a model, which no training changes."""


def untrained_model(like: WorldModel, seed: int, *, encoder: bool = True) -> WorldModel:
    """Return a model of the same shape before training.

    Args:
        like: the model.
        seed: of the initial weights.
        encoder: also the encoder is untrained. Otherwise it is the trained encoder.
    """
    fresh = Encoder(like.model, seed=seed) if encoder else like.encoder.encoder
    tensors = {f"encoder.{name}": tensor for name, tensor in fresh.state_dict().items()}
    for part_name, part in like.parts.items():
        network: Any = copy.deepcopy(part)
        network.init_weights(seed)
        own = {name: tensor for name, tensor in part.state_dict().items() if name.startswith(CONSTANTS)}
        tensors |= {f"{part_name}.{name}": tensor for name, tensor in (network.state_dict() | own).items()}
    clip = {"px": like.px, "frames": like.frames, "fps": like.fps}
    return WorldModel(like.model, InMemory(tensors), **clip, provenance={"part": "random", "seed": seed})
