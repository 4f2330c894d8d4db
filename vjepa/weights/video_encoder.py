"""The frozen encoder of a trained model: clips of uint8 frames in, a feature per token out.

This module imports torch and the network alone, so that a native export loads without our other dependencies.

Letters: B clips, T frames, H W pixels, t h w the grid of tokens, V visible tokens, D width, LD width times levels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.grid import Grid
from vjepa.nn.shapes import Float, Int, Model, UInt8
from vjepa.weights.tensors import Tensors
from vjepa.weights.video_stream import VideoStream
from vjepa_data.errors import BadInput


class VideoEncoder(nn.Module):
    """A frozen encoder with the form of the clips that it was trained on.

    Attributes:
        model: sizes, patch, positions.
        px: height and width of the clips.
        frames: frames per clip.
        fps: frames per second of video time.
        provenance: run, step, settings and corpora, as far as they are known.
    """

    def __init__(
        self, model: Model, tensors: Tensors, *, px: int, frames: int, fps: float, provenance: Mapping[str, Any]
    ) -> None:
        """Build the encoder on the CPU from tensors named `encoder.*`."""
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

    def grid(self, frames: UInt8[Tensor, "B T H W C"]) -> Grid:
        """Return the grid of tokens of these clips.

        Raises:
            BadInput: the frames are not uint8 [B T H W 3], or not a whole number of tokens.
        """
        check_frames(frames)
        _, steps, height, width, _ = self._filled(frames).shape
        return Grid.of(steps, height, width, self.model)

    def forward(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w D"]:
        """Encode RGB clips of equal shape. H and W are multiples of the patch, T of the tubelet.

        A still picture (T = 1) is repeated to fill a tubelet, unless the model has `still_tokens`.

        Raises:
            BadInput: the frames have another form. Float frames are rejected because their range ([0, 1] or
                [0, 255]) is ambiguous.
        """
        grid = self.grid(frames)
        return self.features(frames).unflatten(1, (grid.t, grid.h, grid.w))

    def features(
        self, frames: UInt8[Tensor, "B T H W C"], visible: Int[Tensor, "B V"] | None = None, *, levels: bool = False
    ) -> Float[Tensor, "B V LD"]:
        """Encode the visible tokens of clips, as training does: hidden tokens are not read.

        Args:
            frames: RGB clips of one shape.
            visible: sorted token ids (see `Grid`), by default all tokens.
            levels: return the features of all `model.levels` side by side, the last block's last. By default, and for
                a model without levels, L = 1: the last block alone.

        Raises:
            BadInput: as for `forward`.
        """
        self.grid(frames)
        return self.encoder([View(normalise(self._filled(frames)), visible)], levels=levels)[0]

    def stream(self, window: int | None = None) -> VideoStream:
        """Begin to encode a video without end, tubelet by tubelet in constant memory (see `VideoStream`).

        Args:
            window: tubelets that a token attends to, its own included. By default `model.window`, else the tubelets
                of the clips that the model was trained on.

        Raises:
            BadInput: the encoder attends to later tubelets, or its positions are not a rotation.
        """
        return VideoStream(self, window)

    def _filled(self, frames: Tensor) -> Tensor:
        is_repeated = frames.shape[1] == 1 and not self.model.still_tokens
        return frames.expand(-1, self.model.tubelet_frames, -1, -1, -1) if is_repeated else frames


def check_frames(frames: Any) -> None:
    """Check that frames are a uint8 tensor [B T H W 3]. The error names the call that converts them.

    Raises:
        BadInput: they are not.
    """
    is_tensor = isinstance(frames, Tensor)
    is_array = not is_tensor and hasattr(frames, "__array_interface__")
    if not is_tensor and not is_array:
        raise BadInput(
            f"frames are a uint8 tensor [B T H W 3], got a {type(frames).__name__}. Convert a list "
            "of clips with torch.stack, and a list of pictures with torch.from_numpy(numpy.stack(pictures))[None]"
        )
    shape, kind = tuple(frames.shape), str(frames.dtype).removeprefix("torch.")
    advice = ["torch.from_numpy(frames)"] if is_array else []
    if shape[-1:] != (3,) or len(shape) != 5:
        advice += _layout_advice(shape)
    if kind != "uint8":
        advice.append(
            "(frames * 255).round().to(torch.uint8) for values from 0 to 1, frames.to(torch.uint8) for values from 0 "
            "to 255; normalised frames must first be multiplied by the standard deviation and added to the mean"
        )
    if advice:
        library = "numpy array" if is_array else "tensor"
        raise BadInput(
            f"frames are a uint8 tensor [B T H W 3], got a {kind} {library} {list(shape)}; use {', then '.join(advice)}"
        )


def _layout_advice(shape: tuple[int, ...]) -> list[str]:
    """Return the calls that bring frames of this shape to [B T H W 3], as far as the shape tells."""
    # Of several axes of 3, the likelier layout counts: [B T C H W], [B C T H W], [C B T H W]; [T C H W], [C T H W].
    order, lead, name = {
        5: ((4, 2, 1, 0), "", ""),
        4: ((3, 1, 0), "[None]", " (one clip)"),
        3: ((2, 0), "[None, None]", " (one picture)"),
    }.get(len(shape), ((), "", ""))
    for axis in order:
        if shape[axis] == 3:
            move = "" if axis == len(shape) - 1 else f".movedim({axis}, -1)"
            return [f"frames{move}{lead}{name}"]
    if len(shape) == 5 and shape[-1] in (1, 4):
        return ["frames.expand(-1, -1, -1, -1, 3) (grey)" if shape[-1] == 1 else "frames[..., :3] (RGBA)"]
    return ["RGB clips of five axes: batch, time, height, width, channels"]
