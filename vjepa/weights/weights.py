"""What a trained model is outside of training: its shape, its tensors by V-JEPA 2's names, and where it came from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vjepa import config
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor
from vjepa.weights.native import VideoEncoder
from vjepa.weights.tensors import InMemory, Tensors, some
from vjepa_data.settings import BadInput

Part = Literal["target", "encoder"]
"""Which encoder of a checkpoint: the moving average, or the one that was trained."""


@dataclass(frozen=True)
class Weights:
    """A model's shape, its tensors and where it came from."""

    model: config.Model
    px: int
    """Height and width of the frames it was trained on last."""
    frames: int
    """Frames per clip it was trained on last."""
    fps: float
    """Frames per second of video time."""
    masks: tuple[config.Mask, ...]
    """Kinds of mask, in the order of the predictor's mask tokens; empty if not known."""
    tensors: Tensors
    """`encoder.*` and `predictor.*`, read when asked for."""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def mask_tokens(self) -> int:
        """Of the predictor; 0 where there is none, as in what LeVJEPA trained."""
        name = "predictor.mask_tokens"
        return self.tensors.shape(name)[0] if name in self.tensors else 0

    def encoder(self) -> VideoEncoder:
        """The encoder to use, on the CPU."""
        clip = {"px": self.px, "frames": self.frames, "fps": self.fps}
        return VideoEncoder(self.model, self.tensors, **clip, provenance=self.provenance)


def random_encoder(like: VideoEncoder, seed: int) -> VideoEncoder:
    """The same encoder as it was before training, for baselines: initialised from `seed`."""
    tensors = {f"encoder.{name}": tensor for name, tensor in Encoder(like.model, seed=seed).state_dict().items()}
    clip = {"px": like.px, "frames": like.frames, "fps": like.fps}
    return VideoEncoder(like.model, InMemory(tensors), **clip, provenance={"part": "random", "seed": seed})


def sized_encoder(width: int, depth: int, heads: int, mlp_ratio: float) -> config.EncoderSize:
    """An encoder by its numbers, under its registry name if it has one."""
    for name, numbers in config.ENCODERS.items():
        if numbers[:3] == (width, depth, heads) and int(width * numbers[3]) == int(width * mlp_ratio):
            return config.EncoderSize.model_validate(name)
    return config.EncoderSize(name="custom", width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)


def expected_shapes(model: config.Model, mask_tokens: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a model, without making it; without a predictor for 0 mask tokens."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"encoder": Encoder(model)}
        if mask_tokens:
            parts["predictor"] = Predictor(model, mask_tokens)
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def check_shapes(path: Path, weights: Weights) -> None:
    """See whether the tensors are those that the settings describe.

    Raises:
        BadInput: they are not; names the first that do not fit.
    """
    expected = expected_shapes(weights.model, weights.mask_tokens)
    missing, extra = expected.keys() - set(weights.tensors), set(weights.tensors) - expected.keys()
    if missing or extra:
        sides = (("lacks", missing), ("has", extra))
        what = " and ".join(f"{word} {some(sorted(names))}" for word, names in sides if names)
        raise BadInput(f"{path}: not the model that its settings describe: it {what}")
    for name, shape in expected.items():
        if (got := weights.tensors.shape(name)) != shape:
            raise BadInput(f"{path}: {name} has shape {list(got)}, its settings ask for {list(shape)}")
