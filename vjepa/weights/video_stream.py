"""The features of a video without end, in flat memory: `stream = model.stream()`.

This module imports torch and the network alone, as `video_encoder` does.

Letters: B videos at once, T frames, H W pixels, t h w the grid of tokens, D width.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vjepa.nn.encoder import normalise
from vjepa.nn.shapes import Float, UInt8
from vjepa.nn.streaming import EncoderStream

if TYPE_CHECKING:
    from vjepa.weights.video_encoder import VideoEncoder


class VideoStream:
    """A causal encoder that goes through videos tubelet by tubelet and keeps the last tubelets in sight.

    Attributes:
        window: tubelets that a token attends to, its own included.
    """

    def __init__(self, encoder: "VideoEncoder", window: int | None = None) -> None:
        """Begin a stream, usually through `model.stream()`.

        Args:
            encoder: the encoder of a model.
            window: tubelets that a token attends to, its own included. By default `model.window`, else the tubelets
                of the clips that the model was trained on.

        Raises:
            BadInput: the encoder attends to later tubelets, or its positions are not a rotation.
        """
        model = encoder.model
        trained = getattr(model, "window", None) or max(1, encoder.frames // model.tubelet_frames)
        self.window = trained if window is None else window
        self.tubelet_frames = model.tubelet_frames
        self.tubelet_s = model.tubelet_frames / encoder.fps
        """Seconds of video in a tubelet."""
        self._encoder = encoder
        self._stream = EncoderStream(encoder.encoder, window=self.window)

    @property
    def time(self) -> int:
        """Number of tubelets so far."""
        return self._stream.time

    @property
    def class_features(self) -> Float[Tensor, "B t D"] | None:
        """Features of the class token after each tubelet of the last call, or None without a class token."""
        return self._stream.class_features

    @torch.no_grad()
    def __call__(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w D"]:
        """Encode the next frames: whole tubelets, in order, at the model's rate (`model.fps`).

        The features of a tubelet equal the features of a single pass over all frames so far, in which a token attends
        to its own tubelet and to the `window` - 1 before it. They do not depend on how frames are cut into calls.

        Args:
            frames: RGB frames of B videos that run side by side. T is a multiple of the tubelet.

        Raises:
            BadInput: the frames have an unsupported form, or another size than earlier frames.

        Example:
            >>> model = vjepa.load("levjepa-native")
            >>> stream = model.stream(window=16)
            >>> stream(torch.zeros(1, 4, 224, 224, 3, dtype=torch.uint8)).shape
            torch.Size([1, 4, 14, 14, 768])
        """
        grid = self._encoder.grid(frames)
        return self._stream(normalise(frames)).unflatten(2, (grid.h, grid.w))

    def follow(self, frames: Iterable[UInt8[Tensor, "H W C"]]) -> Iterator[Float[Tensor, "h w D"]]:
        """Yield the features of each tubelet of live frames as soon as its last frame is there.

        Frames at the end that do not fill a tubelet give no features.

        Args:
            frames: single RGB frames at the model's rate, such as frames of a camera.
        """
        waiting: list[Tensor] = []
        for frame in frames:
            waiting.append(torch.as_tensor(frame))
            if len(waiting) == self.tubelet_frames:
                device = next(self._encoder.parameters()).device
                yield self(torch.stack(waiting)[None].to(device))[0, 0]
                waiting = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return keys, values and the place in the video, from which `load_state_dict` goes on exactly."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another stream was.

        Raises:
            BadInput: that stream had another model or window.
        """
        self._stream.load_state_dict(state)
