"""The record of a trained model that has not been loaded: settings, tensors, origin."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vjepa import config
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor
from vjepa.weights.tensors import InMemory, Tensors, some
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.world_model import WorldModel, part_kinds
from vjepa_data.errors import BadInput

Part = Literal["target", "encoder"]
"""Encoder of a checkpoint: the moving average, or the trained weights."""


@dataclass(frozen=True)
class Weights:
    """Settings, tensors and origin of a model."""

    model: config.Model
    px: int
    """Height and width of the frames that it was trained on last."""
    frames: int
    """Frames per clip that it was trained on last."""
    fps: float
    """Frames per second of video time."""
    masks: tuple[config.Mask, ...]
    """Kinds of mask, in the order of the predictor's mask tokens. Empty if unknown."""
    tensors: Tensors
    """`encoder.*`, and the other parts under their names (`predictor.*`). They are read when they are used."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def mask_tokens(self) -> int:
        """Number of mask tokens of the predictor, or 0 for a model without a predictor (LeVJEPA)."""
        name = "predictor.mask_tokens"
        return self.tensors.shape(name)[0] if name in self.tensors else 0

    def encoder(self) -> VideoEncoder:
        """Load the encoder onto the CPU."""
        return VideoEncoder(self.model, self.tensors, **self._clip(), provenance=self.provenance)

    def world_model(self) -> WorldModel:
        """Load all networks onto the CPU."""
        return WorldModel(self.model, self.tensors, **self._clip(), provenance=self.provenance)

    def _clip(self) -> dict[str, Any]:
        return {"px": self.px, "frames": self.frames, "fps": self.fps}


def random_encoder(like: VideoEncoder, seed: int) -> VideoEncoder:
    """Return the encoder as it was before training, initialized from `seed`: a baseline."""
    tensors = {f"encoder.{name}": tensor for name, tensor in Encoder(like.model, seed=seed).state_dict().items()}
    clip = {"px": like.px, "frames": like.frames, "fps": like.fps}
    return VideoEncoder(like.model, InMemory(tensors), **clip, provenance={"part": "random", "seed": seed})


def sized_encoder(width: int, depth: int, heads: int, mlp_ratio: float) -> config.EncoderSize:
    """Return the settings of an encoder of this size, under its registry name, if any."""
    for name, numbers in config.ENCODERS.items():
        if numbers[:3] == (width, depth, heads) and int(width * numbers[3]) == int(width * mlp_ratio):
            return config.EncoderSize.model_validate(name)
    return config.EncoderSize(name="custom", width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)


def expected_shapes(model: config.Model, mask_tokens: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor of an encoder and, for mask_tokens > 0, a masked predictor."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"encoder": Encoder(model)}
        if mask_tokens:
            parts["predictor"] = Predictor(model, mask_tokens)
    return _shapes(parts)


def check_shapes(path: Path, weights: Weights) -> None:
    """Check that the tensors match the settings.

    Raises:
        BadInput: they do not match. The text names the first mismatches.
    """
    with torch.device("meta"):
        parts = {
            kind.name: kind.build(weights.model, weights.tensors.find_shape)
            for kind in part_kinds(weights.tensors.names)
        }
        expected = _shapes({"encoder": Encoder(weights.model), **parts})
    missing, extra = expected.keys() - set(weights.tensors), set(weights.tensors) - expected.keys()
    if missing or extra:
        sides = (("lacks", missing), ("has", extra))
        difference = " and ".join(f"{word} {some(sorted(names))}" for word, names in sides if names)
        raise BadInput(f"{path}: not the model that its settings describe: it {difference}")
    for name, shape in expected.items():
        if (got := weights.tensors.shape(name)) != shape:
            raise BadInput(f"{path}: {name} has shape {list(got)}, its settings ask for {list(shape)}")


def _shapes(parts: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
