"""A pretrained encoder that a run uses as it is: read from a native export, and kept in checkpoints as its sha256.

It receives no gradient, and no checkpoint holds its weights. A run that resumes with another file stops.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder
from vjepa.nn.init import assign
from vjepa.nn.settings import Model as ModelSettings
from vjepa.nn.shapes import Model
from vjepa_data.errors import BadInput


def read_model(folder: Path) -> ModelSettings:
    """Return the settings of the networks of a native export.

    Raises:
        BadInput: there is none in the folder.
    """
    try:
        content: Any = json.loads((folder / "model.json").read_text())
        return ModelSettings.model_validate(content["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:  # pydantic's ValidationError is a ValueError
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise BadInput(
            f"{folder} is not a native export ({reason}); make one with `vjepa export --format native`"
        ) from None


class FrozenEncoder(Encoder):
    """The encoder of a native export, read when the weights are initialized."""

    def __init__(self, settings: Model, path: Path, *, attention: Backend = "sdpa"):
        self.path = path
        super().__init__(settings, attention=attention)
        self.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Read the file. Each rank keeps its shard.

        Raises:
            BadInput: the file is missing or damaged, or its encoder has another size than the settings.
        """
        with open_weights(self.path) as file:
            names = set(file.keys())
            for name, parameter in self.named_parameters():
                stored = f"encoder.{name}"
                shape = tuple(file.get_slice(stored).get_shape()) if stored in names else None
                if shape != tuple(parameter.shape):
                    found = "is missing" if shape is None else f"has shape {list(shape)}"
                    raise BadInput(
                        f"{self.path}: {stored} {found}, model.encoder asks for {list(parameter.shape)}; copy `model` "
                        f"from {self.path / 'model.json'} to the run's settings, all but the predictor"
                    )
                assign(parameter, file.get_tensor(stored).float())


def open_weights(folder: Path) -> safe_open:
    """Open the tensors of a native export.

    Raises:
        BadInput: there are none.
    """
    try:
        return safe_open(folder / "model.safetensors", framework="pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise BadInput(
            f"{folder} is not a native export ({error}); make one with `vjepa export --format native`"
        ) from None


class EncoderFile(nn.Module):
    """The sha256 of the file of the frozen encoder, which a checkpoint keeps in its place."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.sha256 = nn.Parameter(torch.zeros(32, dtype=torch.int32), requires_grad=False)
        self.is_checked = False
        if not self.sha256.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Hash the file."""
        self.sha256.copy_(self._digest())

    def check(self) -> None:
        """Make sure, once, that a restored checkpoint was trained with the same file.

        Raises:
            BadInput: it was not.
        """
        if not self.is_checked and not self.sha256.is_meta:
            if not torch.equal(self.sha256.cpu(), self._digest()):
                raise BadInput(
                    f"{self.folder / 'model.safetensors'} is not the encoder that the checkpoint was trained with; "
                    "restore that file, or begin another run"
                )
            self.is_checked = True

    def _digest(self) -> Tensor:
        with (self.folder / "model.safetensors").open("rb") as file:
            return torch.tensor(list(hashlib.file_digest(file, "sha256").digest()), dtype=torch.int32)
