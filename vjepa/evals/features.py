"""Frozen features of corpus clips, and the pixels that serve as a baseline.

Letters: B clips, T frames, H W pixels, t h w the grid of tokens, D channels, d numbers per row.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vjepa.evals.base import EvaluationContext
from vjepa.evals.labels import scalars
from vjepa.evals.object_labels import TokenLabels, mean_velocity, token_labels
from vjepa.evals.parts import Advance, write_parts
from vjepa.nn.grid import Grid
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.world_model import WorldModel
from vjepa_data.corpus.format import read_manifest
from vjepa_data.errors import Unreadable
from vjepa_data.evaluation.clips import EvalClip, EvalClips, Short
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

BATCH = 8  # clips that are encoded together

Pooling = Literal["clip", "time", "token"]
"""A feature for a clip [D], for each time [t D], or for each token [t h w D]."""


# ---- encoders and pixels


class PixelEncoder(VideoEncoder):
    """Raw pixels behind the interface of an encoder: a token is its own pixels."""

    def __init__(self, like: VideoEncoder) -> None:
        """Args:
        like: the encoder whose clips and grid are used.
        """
        nn.Module.__init__(self)
        self.model, self.px, self.frames, self.fps = like.model, like.px, like.frames, like.fps
        self.provenance = {"part": "pixels"}
        sides = torch.tensor([like.model.tubelet_frames, like.model.patch_px], dtype=torch.float32)
        self.sides = nn.Parameter(sides, requires_grad=False)

    @property
    def width(self) -> int:
        return self.model.tubelet_frames * self.model.patch_px**2 * 3

    def forward(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w D"]:
        clips, steps, height, width, _ = frames.shape
        tubelet, patch = self.model.tubelet_frames, self.model.patch_px
        t, h, w = steps // tubelet, height // patch, width // patch
        tokens = (frames.float() / 255).view(clips, t, tubelet, h, patch, w, patch, 3)
        return tokens.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)

    def shrink(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B d"]:
        """Return the frames of each clip, shrunk to a pixel per token."""
        values = (frames.float() / 255).flatten(0, 1).permute(0, 3, 1, 2)
        size = (frames.shape[2] // self.model.patch_px, frames.shape[3] // self.model.patch_px)
        return adaptive_avg_pool2d(values, size).reshape(len(frames), -1)


@dataclass(frozen=True)
class ClipFeatures:
    """Features of the tokens of some clips, and of the clips."""

    tokens: Float[Tensor, "B t h w D"]
    pooled: Float[Tensor, "B d"]


@torch.no_grad()
def encode(encoder: VideoEncoder, frames: UInt8[Tensor, "B T H W C"], pooling: Pooling) -> ClipFeatures:
    """Encode clips on the device of the encoder and return their features on the CPU.

    Pixels are not pooled: the feature of a clip is its frames, shrunk to one pixel per token.
    """
    tokens = encoder(frames.to(next(encoder.parameters()).device)).cpu()
    is_pixels = isinstance(encoder, PixelEncoder)
    return ClipFeatures(tokens, encoder.shrink(frames) if is_pixels else reduce_tokens(tokens, pooling).flatten(1))


def reduce_tokens(tokens: Float[Tensor, "B t h w D"], pooling: Pooling) -> Float[Tensor, "B ..."]:
    """Average the features of tokens over space and time, over space, or not at all."""
    dims = {"clip": (1, 2, 3), "time": (2, 3), "token": ()}[pooling]
    return tokens.mean(dims) if dims else tokens


def fingerprint(encoder: VideoEncoder) -> str:
    """Return a hash of two tensors of an encoder, which no two trained models share."""
    digest = hashlib.sha256()
    parameters = list(encoder.parameters())
    for tensor in (parameters[0], parameters[-1]):
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- clips of a corpus


def clips_for(
    model: VideoEncoder | WorldModel,
    shards: Path,
    *,
    split: str,
    per_video: int = 1,
    views: int = 1,
    max_videos: int | None = None,
    short: Short | None = None,
) -> EvalClips:
    """Open the clips of a corpus in the size, length and frame rate that a model was trained on.

    Args:
        model: the model, for size, length and frame rate.
        shards, split, per_video, views, max_videos: as in `EvalClips`.
        short: treatment of videos shorter than a clip, by default as in the model's training.

    Raises:
        BadInput: see `EvalClips`.
    """
    form: dict[str, Any] = {"px": model.px, "frames": model.frames, "fps": model.fps}
    form["short"] = short or trained_short(model)
    return EvalClips(shards, split=split, per_video=per_video, views=views, max_videos=max_videos, **form)


def trained_short(model: VideoEncoder | WorldModel) -> Short:
    """Return how a model's training treated videos shorter than a clip, or `leave_out` if it is not recorded."""
    try:
        return "hold" if model.provenance["settings"]["data"]["clip"]["short"] == "hold" else "leave_out"
    except (KeyError, TypeError):
        return "leave_out"


class CorpusVideos:
    """Videos of a split of a corpus. A thread decodes ahead of the encoder."""

    def __init__(self, clips: EvalClips, videos: Sequence[int] | None = None) -> None:
        """Args:
        clips: of the corpus.
        videos: numbers of the videos in the index. The default is all, including videos too short for a clip.
        """
        self.clips = clips
        self.videos = range(len(clips.index)) if videos is None else videos
        self.keys: Sequence[str] = [clips.index.key(video) for video in self.videos]

    @classmethod
    def chosen(cls, clips: EvalClips) -> "CorpusVideos":
        """Return the videos that are long enough, and at most `max_videos` of them."""
        return cls(clips, list(dict.fromkeys(video for video, _ in clips.chosen)))

    def read(self, videos: Sequence[int]) -> Iterator[list[EvalClip] | Unreadable]:
        """Yield the clips of each video in order, or the reason why there are none."""
        with ThreadPoolExecutor(1) as thread:
            ahead: deque[Future[list[EvalClip] | Unreadable]] = deque()
            rest = iter(videos)
            while True:
                while len(ahead) < 2 and (video := next(rest, None)) is not None:
                    ahead.append(thread.submit(self._decode, self.videos[video]))
                if not ahead:
                    return
                yield ahead.popleft().result()

    def _decode(self, video: int) -> list[EvalClip] | Unreadable:
        try:
            found = self.clips.read(video)
        except Unreadable as error:
            return error
        index = self.clips.index
        return found or Unreadable("short", f"{index.frames[video]} frames at {index.fps[video]:g} per second")


# ---- features of a corpus


@dataclass(frozen=True)
class EncodedCorpus:
    """Features that an encoder gives for all clips."""

    pooled: Float[Tensor, "clips d"]
    tokens: Float[Tensor, "n D"]
    """Features of the labelled tokens only, in the order of `LabelledClips.labels`."""


@dataclass(frozen=True)
class LabelledClips:
    """Labels and features of clips, in order."""

    keys: tuple[str, ...]
    videos: Int[ndarray, " clips"]
    """Number of the video of each clip in the index."""
    scalars: tuple[Mapping[str, Any], ...]
    """Labels of each clip that are single words or numbers."""
    velocity: Float[ndarray, "clips 2"]
    """Mean velocity of the objects of each clip, nan where it is unknown."""
    labels: TokenLabels
    """Labels of all tokens that lie on an object. `labels.clip` is a position in this record."""
    features: dict[str, EncodedCorpus]
    """Features by encoder."""

    @classmethod
    def join(cls, parts: Sequence["LabelledClips"]) -> "LabelledClips":
        """Join the clips of several parts. Parts without clips have no features and are left out."""
        parts = [part for part in parts if part.keys]
        if not parts:
            return cls((), np.zeros(0, int), (), np.zeros((0, 2)), TokenLabels.none(), {})
        starts = np.cumsum([0, *(len(part.keys) for part in parts)])
        return cls(
            tuple(key for part in parts for key in part.keys),
            np.concatenate([part.videos for part in parts]),
            tuple(scalars for part in parts for scalars in part.scalars),
            np.concatenate([part.velocity for part in parts]),
            TokenLabels.join([part.labels.shifted(int(n)) for part, n in zip(parts, starts[:-1], strict=True)]),
            {
                name: EncodedCorpus(
                    torch.cat([part.features[name].pooled for part in parts]),
                    torch.cat([part.features[name].tokens for part in parts]),
                )
                for name in parts[0].features
            },
        )

    def save(self, file: Path) -> None:
        """Write the record as an npz file."""
        arrays = {"keys": np.array(self.keys, str), "videos": self.videos, "velocity": self.velocity}
        arrays["scalars"] = np.array(json.dumps(self.scalars))
        arrays |= {f"labels.{one.name}": getattr(self.labels, one.name) for one in fields(TokenLabels)}
        for name, features in self.features.items():
            arrays |= {f"pooled.{name}": features.pooled.numpy(), f"tokens.{name}": features.tokens.numpy()}
        with file.open("wb") as stream:
            np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]  numpy's own stub

    @classmethod
    def load(cls, file: Path) -> "LabelledClips":
        """Read a record that `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            names = [name.removeprefix("pooled.") for name in arrays.files if name.startswith("pooled.")]
            return cls(
                tuple(arrays["keys"].tolist()),
                arrays["videos"],
                tuple(json.loads(str(arrays["scalars"]))),
                arrays["velocity"],
                TokenLabels(*(arrays[f"labels.{one.name}"] for one in fields(TokenLabels))),
                {
                    name: EncodedCorpus(*(torch.from_numpy(arrays[f"{kind}.{name}"]) for kind in ("pooled", "tokens")))
                    for name in names
                },
            )


def read_features(
    encoders: Mapping[str, VideoEncoder],
    shards: Path,
    clips: EvalClips,
    context: EvaluationContext,
    *,
    pooling: Pooling = "time",
    tokens: bool = True,
) -> LabelledClips:
    """Encode clips of a corpus with several encoders. Each clip is decoded once.

    Features are kept in `context.cache`, by encoders, corpus and clips, and are not computed again.

    Args:
        encoders: by name. All have the clip size of the first.
        shards: the corpus.
        clips: its clips.
        context: ranks, cache and progress.
        pooling: how the tokens of a clip are averaged.
        tokens: whether motion, and tokens that lie on an object, are labelled and kept too.

    Raises:
        BadInput: no clip could be decoded.
    """
    videos = CorpusVideos.chosen(clips)

    def write(group: range, file: Path, advance: Advance) -> None:
        batches = _batches(_readable(videos, group, advance), BATCH)
        LabelledClips.join([_encode_batch(encoders, batch, pooling, tokens=tokens) for batch in batches]).save(file)

    split = clips.index.split
    form = [pooling, tokens, clips.px, clips.frames, clips.rate, clips.per_video, clips.views, list(videos.videos)]
    form += ["hold"] if clips.short == "hold" else []
    folder = context.cache / _cache_name(encoders, shards, split, form)
    text = f"encode {len(videos.keys)} videos of split {split}"
    found = LabelledClips.join([LabelledClips.load(file) for file in write_parts(
        context.world, folder, len(videos.keys), ".npz", write, text=text
    )])  # fmt: skip
    if not found.keys:
        raise BadInput(f"{shards}: no video of split {split!r} can be decoded; see `vjepa verify`")
    return found


def _cache_name(encoders: Mapping[str, VideoEncoder], shards: Path, split: str, form: Sequence[Any]) -> str:
    """Name a cache entry by everything that its features depend on."""
    weights = {name: fingerprint(encoder) for name, encoder in encoders.items()}
    facts = json.dumps([weights, read_manifest(shards).hash, split, form])
    return f"{split}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"


def _readable(videos: CorpusVideos, group: range, advance: Advance) -> Iterator[EvalClip]:
    """Yield the clips of some videos. Videos that cannot be decoded are logged and left out."""
    for number, clips in zip(group, videos.read(group), strict=True):
        if isinstance(clips, Unreadable):
            log.warning("%s is left out: %s", videos.keys[number], clips.detail)
        else:
            yield from clips
        advance(1)


def _encode_batch(
    encoders: Mapping[str, VideoEncoder], batch: Sequence[EvalClip], pooling: Pooling, *, tokens: bool
) -> LabelledClips:
    frames = torch.stack([clip.frames for clip in batch])
    model = next(iter(encoders.values())).model
    _, steps, height, width, _ = frames.shape
    grid = Grid.of(steps, height, width, model)
    labels = [
        token_labels(clip, grid, model, clip_number=number) if tokens else TokenLabels.none()
        for number, clip in enumerate(batch)
    ]
    features = {}
    for name, encoder in encoders.items():
        encoded = encode(encoder, frames, pooling)
        kept = [clip.flatten(0, 2)[found.token] for clip, found in zip(encoded.tokens, labels, strict=True)]
        features[name] = EncodedCorpus(encoded.pooled, torch.cat(kept))
    return LabelledClips(
        tuple(clip.key for clip in batch),
        np.array([clip.video for clip in batch]),
        tuple(scalars(clip.labels) for clip in batch),
        np.stack([mean_velocity(clip) if tokens else np.full(2, np.nan) for clip in batch]),
        TokenLabels.join(labels),
        features,
    )


def _batches(clips: Iterable[EvalClip], size: int) -> Iterator[Sequence[EvalClip]]:
    """Group clips. The last group may be smaller."""
    group: list[EvalClip] = []
    for clip in clips:
        group.append(clip)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
