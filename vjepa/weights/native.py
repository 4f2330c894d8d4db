"""Our own format: `model.safetensors`, and `model.json` for what the tensors do not tell.

It can hold whatever we train, and loads with torch and safetensors alone: this module and the network import nothing
else. Where pydantic is installed too, the settings are checked as all settings are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.grid import Grid
from vjepa.nn.shapes import Float, Model, UInt8
from vjepa.weights.tensors import SafeTensors, Tensors, read_json
from vjepa_data.errors import BadInput

FORMAT = 1


class VideoEncoder(nn.Module):
    """A frozen encoder: clips of uint8 frames in, one feature per token out."""

    def __init__(
        self, model: Model, tensors: Tensors, *, px: int, frames: int, fps: float, provenance: Mapping[str, Any]
    ) -> None:
        """Args:
        model: sizes, patch, positions.
        tensors: those of the encoder, under `encoder.`.
        px, frames, fps: of the clips that it was trained on last.
        provenance: where it came from.
        """
        super().__init__()
        with torch.device("meta"):
            self.encoder = Encoder(model)
        self.encoder.load_state_dict(tensors.part("encoder"), assign=True)
        self.model, self.px, self.frames, self.fps = model, px, frames, fps
        self.provenance = provenance
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return self.model.encoder.width

    def forward(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w D"]:
        """Encode clips of one shape: RGB, H and W multiples of the patch, T of the tubelet.

        Raises:
            BadInput: other frames. Floats are refused, since whether they end at 1 or at 255 is not to be seen.
        """
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
            raise BadInput(
                f"frames are uint8 [B T H W 3], got {str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}; "
                "channels that come before the height are moved by frames.movedim(-3, -1)"
            )
        _, steps, height, width, _ = frames.shape
        grid = Grid.of(steps, height, width, self.model)
        (tokens,) = self.encoder([View(normalise(frames))])
        return tokens.unflatten(1, (grid.t, grid.h, grid.w))


def check_there(path: Path) -> None:
    """Make sure that there is something to read a model from.

    Raises:
        BadInput: nothing is there.
    """
    if not path.exists():
        raise BadInput(
            f"{path}: no such model; give a run, a checkpoint, or a folder made by `vjepa export` (what is called so "
            "on the Hugging Face hub is copied first: `hf download NAME --local-dir DIR`)"
        )


def load_native(folder: Path) -> VideoEncoder:
    """Load the encoder of a native export, onto the CPU in fp32.

    Raises:
        BadInput: the folder is torn, or of another version.
    """
    content, tensors = open_native(folder)
    try:
        clip = {"px": int(content["px"]), "frames": int(content["frames"]), "fps": float(content["fps"])}
        return VideoEncoder(_shape_of(content["model"]), tensors, **clip, provenance=read_provenance(folder))
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"{folder}: model.json and model.safetensors do not make a model ({reason}); copy or export it again"
        ) from None


def open_native(folder: Path) -> tuple[dict[str, Any], SafeTensors]:
    """The settings and the tensors of a native export.

    Raises:
        BadInput: the folder is torn, or of another version.
    """
    content = read_json(folder / "model.json")
    if content.get("format") != FORMAT:
        raise BadInput(
            f"{folder / 'model.json'}: format {content.get('format')!r}, this version reads {FORMAT}; "
            "export the model again"
        )
    return content, SafeTensors(folder / "model.safetensors")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What `vjepa export` wrote about where a model came from; empty for models of others."""
    file = folder / "provenance.json"
    return read_json(file) if file.is_file() else {}


def _shape_of(settings: dict[str, Any]) -> Model:
    try:
        from vjepa.config import Model
    except ModuleNotFoundError:  # no pydantic: the numbers as they are
        return json.loads(json.dumps(settings), object_hook=lambda group: SimpleNamespace(**group))
    return Model.model_validate(settings)
