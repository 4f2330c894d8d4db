"""Add a method from outside of the package and train it: an encoder that predicts the mean colour of each token.

    python examples/custom_method.py CORPUS [FOLDER]

A settings class, a method class, a registry line. Training, checkpoints, resume and loading are unchanged.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import vjepa
from vjepa.config import Run
from vjepa.engine.trainer import train
from vjepa.methods.base import Loss, Method, Networks, TokenCounts, sample_tokens, send
from vjepa.methods.settings import METHODS, MethodEntry, MethodSettings
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder, View, normalise
from vjepa_data.reader.batch import Batch


class ColourSettings(MethodSettings):
    """Predict the mean colour of every token from its features."""

    name: Literal["colour"] = "colour"


class Head(nn.Module):
    """Linear readout of three colour channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)
        self.init_weights()

    def init_weights(self, seed: int = 0) -> None:
        """Fill the parameters with zeros, which depend neither on the device nor on the number of ranks."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


class Colour(Method):
    """Encoder and head, without teacher and without masks."""

    settings: ColourSettings

    def build(self, attention: Backend = "sdpa") -> Networks:
        model = self.run.model
        encoder = Encoder(model, seed=self.run.seed, attention=attention)
        return Networks(trained={"encoder": encoder, "head": Head(model.encoder.width)}, exported="encoder")

    def prepare(self, batch: Batch, device: torch.device) -> list[Tensor]:
        return [normalise(send(clips.frames, device)) for clips in batch.groups]  # [B C T Y X]

    def loss(self, networks: Networks, inputs: Sequence[Tensor], *, step: int) -> Loss:
        features = networks["encoder"]([View(frames) for frames in inputs])  # [B N D] each
        error = baseline = torch.zeros((), device=inputs[0].device)
        for frames, h in zip(inputs, features, strict=True):
            colours = self.colours(frames)  # [B N 3]
            error = error + (networks["head"](h).float() - colours).square().mean((1, 2)).sum()
            baseline = baseline + (colours.mean(1, keepdim=True) - colours).square().mean((1, 2)).sum()
        # Sums over micro-batches and ranks are the loss, so divide by the clips of the whole step.
        value, baseline = error / self.run.batch_size, baseline / self.run.batch_size
        tokens = TokenCounts(total=sum(h.shape[0] * h.shape[1] for h in features))
        metrics = {"prediction": value.detach(), "baseline": baseline}
        return Loss(value=value, metrics=metrics, features=sample_tokens([h.detach() for h in features]), tokens=tokens)

    def colours(self, frames: Tensor) -> Tensor:
        """Return the mean colour of each token, [B N 3]."""
        model = self.run.model
        size = (model.tubelet_frames, model.patch_px, model.patch_px)
        return nn.functional.avg_pool3d(frames, size).flatten(2).transpose(1, 2)


METHODS["colour"] = MethodEntry(ColourSettings, Colour)  # the one registry line


def main(corpus: Path, folder: Path) -> None:
    """Train the method for a few steps and load its encoder."""
    run = Run.model_validate(
        {
            "name": "colour",
            "steps": 20,
            "batch_size": 8,
            "precision": "fp32",
            "data": {"sources": [{"shards": str(corpus)}], "clip": {"frames": 4, "fps": 6}, "crop": {"px": 48}},
            "model": {"encoder": {"name": "custom", "width": 48, "depth": 2, "heads": 2}, "patch_px": 8},
            "objective": {"name": "colour"},
            "optim": {"lr": 3e-3, "warmup_steps": 2},
            "loader": {"workers": 0},
            "track": {"wandb": "off"},
        }
    )
    train(run, folder)
    features = vjepa.load(folder).encode(torch.zeros(1, 4, 48, 48, 3, dtype=torch.uint8))
    print("features:", tuple(features.shape))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.mkdtemp()))
