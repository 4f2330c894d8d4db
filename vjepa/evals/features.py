"""Frozen features of clips, and of the tokens that lie on an object; and the baselines that see the same clips.

Letters: B clips, T frames, H W pixels, t h w the grid of tokens, D channels, d numbers per row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vjepa.config import Model
from vjepa.evals.object_labels import TokenLabels, mean_velocity, token_labels
from vjepa.nn.grid import Grid
from vjepa.weights.native import VideoEncoder
from vjepa_data.evaluation.clips import EvalClip, EvalClips


@runtime_checkable
class Reader(Protocol):
    """Something that turns frames into numbers: the encoder, or what it must beat."""

    def __call__(self, frames: UInt8[Tensor, "B T H W C"]) -> tuple[Float[Tensor, "B t h w D"], Float[Tensor, "B d"]]:
        """Features of each token, and of the whole clip."""
        ...


class EncoderReader:
    """Tokens of a frozen encoder; a clip is their mean over space at each time, one after another (d = t D).

    The encoder is moved to a GPU if there is one; what it gives is on the CPU.
    """

    def __init__(self, encoder: VideoEncoder) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = encoder.to(self.device)

    @torch.no_grad()
    def __call__(self, frames: UInt8[Tensor, "B T H W C"]) -> tuple[Float[Tensor, "B t h w D"], Float[Tensor, "B d"]]:
        tokens = self.encoder(frames.to(self.device)).cpu()
        return tokens, tokens.mean((2, 3)).flatten(1)


class PixelReader:
    """Raw pixels: a token is its own pixels; a clip is its frames, shrunk to a pixel per token."""

    def __init__(self, model: Model) -> None:
        self.tubelet, self.patch = model.tubelet_frames, model.patch_px

    def __call__(self, frames: UInt8[Tensor, "B T H W C"]) -> tuple[Float[Tensor, "B t h w D"], Float[Tensor, "B d"]]:
        clips, steps, height, width, _ = frames.shape
        t, h, w = steps // self.tubelet, height // self.patch, width // self.patch
        values = frames.float() / 255
        tokens = values.view(clips, t, self.tubelet, h, self.patch, w, self.patch, 3)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
        small = adaptive_avg_pool2d(values.flatten(0, 1).permute(0, 3, 1, 2), (h, w))
        return tokens, small.reshape(clips, -1)


class PixelEncoder(VideoEncoder):
    """Raw pixels in the place of an encoder: the same clips in the same grid, a token is its own pixels."""

    def __init__(self, like: VideoEncoder) -> None:
        """Args:
        like: the encoder whose clips it is shown.
        """
        nn.Module.__init__(self)
        self.model, self.px, self.frames, self.fps = like.model, like.px, like.frames, like.fps
        self.provenance = {"part": "pixels"}
        sides = torch.tensor([like.model.tubelet_frames, like.model.patch_px], dtype=torch.float32)
        self.sides = nn.Parameter(sides, requires_grad=False)
        self.read = PixelReader(like.model)

    @property
    def width(self) -> int:
        return self.model.tubelet_frames * self.model.patch_px**2 * 3

    def forward(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w D"]:
        return self.read(frames)[0]


@dataclass(frozen=True)
class Features:
    """What one reader saw in all clips."""

    pooled: Float[Tensor, "clips d"]
    tokens: Float[Tensor, "n D"]
    """Of the labelled tokens only, in the order of `ReadClips.labels`."""


@dataclass(frozen=True)
class ReadClips:
    """The clips that were read, in order."""

    keys: tuple[str, ...]
    videos: Int[ndarray, " clips"]
    """Number of the video of each."""
    scalars: tuple[Mapping[str, Any], ...]
    """Labels of each clip that are single words or numbers."""
    velocity: Float[ndarray, "clips 2"]
    """Of the objects of each clip, on average; nan where that is not known."""
    labels: TokenLabels
    """Of all tokens that lie on an object; `labels.clip` counts clips."""
    features: dict[str, Features]


def read_features(
    readers: Mapping[str, Reader], clips: Iterable[EvalClip], model: Model, *, batch: int = 8
) -> ReadClips:
    """Let every reader look at the same clips, each decoded once.

    Args:
        readers: by name.
        clips: all of one size.
        model: patch and tubelet of the tokens.
        batch: clips that go through a reader together.
    """
    pooled: dict[str, list[Tensor]] = {name: [] for name in readers}
    tokens: dict[str, list[Tensor]] = {name: [] for name in readers}
    keys, videos, scalars, velocities, labels = [], [], [], [], []
    for group in batches(clips, batch):
        frames = torch.stack([clip.frames for clip in group])
        _, steps, height, width, _ = frames.shape
        grid = Grid.of(steps, height, width, model)
        found = [token_labels(clip, grid, model, clip_number=len(keys) + n) for n, clip in enumerate(group)]
        for name, reader in readers.items():
            every, whole = reader(frames)
            pooled[name].append(whole)
            tokens[name] += [one.flatten(0, 2)[ids.token] for one, ids in zip(every, found, strict=True)]
        keys += [clip.key for clip in group]
        videos += [clip.video for clip in group]
        scalars += [_scalars(clip.labels) for clip in group]
        velocities += [mean_velocity(clip) for clip in group]
        labels += found
    features = {name: Features(torch.cat(pooled[name]), torch.cat(tokens[name])) for name in readers}
    return ReadClips(
        tuple(keys), np.array(videos), tuple(scalars), np.stack(velocities), TokenLabels.join(labels), features
    )


def clips_for(
    encoder: VideoEncoder,
    shards: Path,
    *,
    split: str,
    per_video: int = 1,
    views: int = 1,
    max_videos: int | None = None,
) -> EvalClips:
    """Clips of a corpus in the size, the length and the rate that an encoder was trained on.

    Args:
        encoder: for which they are.
        shards, split, per_video, views, max_videos: as in `EvalClips`.

    Raises:
        BadInput: see `EvalClips`.
    """
    form: dict[str, Any] = {"px": encoder.px, "frames": encoder.frames, "fps": encoder.fps}
    return EvalClips(shards, split=split, per_video=per_video, views=views, max_videos=max_videos, **form)


def batches(clips: Iterable[EvalClip], size: int) -> Iterable[Sequence[EvalClip]]:
    """Clips in groups of `size`, the last one smaller."""
    group: list[EvalClip] = []
    for clip in clips:
        group.append(clip)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _scalars(labels: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in labels.items() if isinstance(value, str | bool | int | float)}
