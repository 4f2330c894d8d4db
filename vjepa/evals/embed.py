"""Embed videos into a file of features.

    vjepa embed MODEL VIDEOS... --out features.parquet

The file has a row for every clip, in the order of the videos. The row of an unreadable video holds the reason.
Parts are kept next to the file until it is complete, and the same command continues from them.

    .parquet       rows with their features
    .npy           features [rows, ...] of the readable clips, and the rows in a .json of the same name
    .safetensors   the same features, and the rows in the file's metadata
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor

from vjepa.atomic import check_free, new_file
from vjepa.distributed.world import World, join
from vjepa.evals.base import PATIENT
from vjepa.evals.features import CorpusVideos, Pooling, fingerprint, reduce_tokens, trained_short
from vjepa.evals.parts import Advance, write_parts
from vjepa.weights.load import load_encoder
from vjepa.weights.tensors import read_json
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.weights import Part
from vjepa_data.errors import Unreadable
from vjepa_data.evaluation.clips import EvalClip, EvalClips, Short
from vjepa_data.evaluation.video_files import TIMEOUT_S, FileClip, FileVideos, find_videos, printable
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

ROW_GROUP = 1024

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("clip", pa.int32()),
        ("view", pa.int32()),
        ("start_s", pa.float64()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
        ("features", pa.list_(pa.float32())),
    ]
)


@runtime_checkable
class VideoReader(Protocol):
    """A source of clips: video files or a corpus."""

    keys: Sequence[str]
    """Name of each video."""

    def read(self, videos: Sequence[int]) -> Iterator[Sequence[FileClip | EvalClip] | Refused | Unreadable]:
        """Yield the clips of each video in order, or the reason why there are none."""
        ...


@dataclass(frozen=True)
class EmbedSummary:
    """Counts of an embedding."""

    clips: int
    videos: int
    broken: int
    """Videos without features."""
    shape: tuple[int, ...]
    """Shape of the features of a clip."""


def embed(
    model: Path,
    videos: Sequence[Path],
    out: Path,
    *,
    what: Pooling = "clip",
    split: str = "train",
    clips_per_video: int = 1,
    views: int = 1,
    short: Short | None = None,
    clip_s: float | None = None,
    every_s: float | None = None,
    part: Part = "target",
    device: str | None = None,
    batch: int = 8,
    workers: int = 2,
    timeout_s: float = TIMEOUT_S,
    overwrite: bool = False,
) -> EmbedSummary:
    """Write the features of videos. Under torchrun the ranks share the videos.

    Args:
        model: a run, a checkpoint, or an export.
        videos: files and folders of files, or a corpus of shards.
        out: file to write. Its suffix gives the format.
        what: mean over all tokens [D], mean over space at each time [t D], or all tokens [t h w D].
        split: split of a corpus.
        clips_per_video: clips of each video, evenly spaced.
        views: views of each clip. 1 is the whole frame, more are squares of it.
        short: treatment of videos shorter than a clip, by default as in the model's training.
        clip_s: seconds of video that a clip spans. The default is that of the model's training.
        every_s: seconds from the start of a clip to the next, instead of `clips_per_video`. Clips may overlap.
        part: which encoder of a run or checkpoint.
        device: torch device. The default is a GPU, if any.
        batch: clips that are encoded together.
        workers: decoding processes of each rank.
        timeout_s: time limit for opening and decoding a file, in seconds.
        overwrite: replace `out` and discard its unfinished parts.

    Raises:
        BadInput: the model, a video or the suffix is unknown, `out` exists, there are parts of another command, or both
            `clips_per_video` and `every_s` are given.
    """
    if every_s is not None and clips_per_video != 1:
        raise BadInput(f"--clips-per-video {clips_per_video} and --every-s {every_s:g} exclude each other; drop one")
    check_free(out, overwrite=overwrite)
    check_suffix(out)
    encoder = load_encoder(model, part)
    if clip_s is not None:
        encoder.fps = encoder.frames / clip_s
    form: dict[str, Any] = {"px": encoder.px, "frames": encoder.frames, "fps": encoder.fps}
    form |= {"per_video": clips_per_video, "views": views, "short": short or trained_short(encoder)}
    form |= {"every_s": every_s}
    corpora = [path for path in videos if (path / "manifest.json").is_file()]
    if corpora and len(videos) > 1:
        raise BadInput(f"{corpora[0]} is a corpus and cannot be mixed with other paths; embed it alone")
    with join(PATIENT) as world, ExitStack() as stack:
        if corpora:
            found: VideoReader = CorpusVideos(EvalClips(corpora[0], split=split, **form))
        else:
            files = FileVideos(find_videos(videos), workers=workers, timeout_s=timeout_s, **form)
            found = stack.enter_context(files)
        encoder.to(device or world.device)
        request = EmbedRequest(found, what, printable(model), clips_per_video, views, form["short"], batch, every_s)
        parts = embed_parts(world, encoder, request, out, overwrite=overwrite)
        return world.first(lambda: parts.write(out, overwrite=overwrite))


def check_suffix(out: Path) -> None:
    """Check that the suffix of a file names a format of features.

    Raises:
        BadInput: it does not.
    """
    if out.suffix not in WRITERS:
        raise BadInput(f"unsupported feature format {out.suffix!r} of {out}; use {', '.join(WRITERS)}")


@dataclass(frozen=True)
class EmbedRequest:
    """The videos to embed and the kind of features."""

    videos: VideoReader
    what: Pooling
    model: str
    """Name of the model, for the record."""
    clips_per_video: int
    views: int
    short: Short = "leave_out"
    batch: int = 8
    every_s: float | None = None


@dataclass(frozen=True)
class EmbeddedParts:
    """Part files with the features of all videos."""

    folder: Path
    files: Sequence[Path]
    facts: Mapping[str, Any]
    """Model, videos and kind of features."""

    def write(self, out: Path, *, overwrite: bool = False) -> EmbedSummary:
        """Join the parts to a file and remove them."""
        counts = [_count(file) for file in self.files]
        clips, broken = sum(count[0] for count in counts), sum(count[2] for count in counts)
        videos = len(set().union(*(count[1] for count in counts)))
        WRITERS[out.suffix](self, out, overwrite)
        shutil.rmtree(self.folder, ignore_errors=True)
        log.info("%s: %d clips of %d videos, %d videos broken", out, clips, videos, broken)
        return EmbedSummary(clips, videos, broken, tuple(self.facts["shape"]))


def embed_parts(
    world: World, encoder: VideoEncoder, request: EmbedRequest, out: Path, *, overwrite: bool = False
) -> EmbeddedParts:
    """Embed videos into part files next to `out`, shared among the ranks and continued after an interruption.

    Raises:
        BadInput: there are unfinished parts of another command.
    """
    keys = request.videos.keys
    facts = {
        "model": request.model,
        "weights": fingerprint(encoder),
        "what": request.what,
        "shape": list(shape_of(encoder, request.what)),
        "frames": encoder.frames,
        "fps": encoder.fps,
        "px": encoder.px,
        "clips_per_video": request.clips_per_video,
        "views": request.views,
        "short": request.short,
        "every_s": request.every_s,
        "videos": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
    }

    def write(videos: range, file: Path, advance: Advance) -> None:
        rows = list(_rows(encoder, request, videos, advance))
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)

    folder = world.first(lambda: open_parts(out, facts, overwrite=overwrite))
    files = write_parts(world, folder, len(keys), ".parquet", write, text=f"embed {len(keys)} videos")
    return EmbeddedParts(folder, files, facts)


def shape_of(encoder: VideoEncoder, what: Pooling) -> tuple[int, ...]:
    """Return the shape of the features of a clip."""
    model = encoder.model
    t, side = encoder.frames // model.tubelet_frames, encoder.px // model.patch_px
    return {"clip": (encoder.width,), "time": (t, encoder.width), "token": (t, side, side, encoder.width)}[what]


# ---- encoding


def _rows(
    encoder: VideoEncoder, request: EmbedRequest, videos: Sequence[int], advance: Advance
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of some videos in order. The next videos are decoded while the encoder is busy."""
    seconds = encoder.frames / encoder.fps
    rows: list[dict[str, Any]] = []
    frames: list[Tensor] = []
    for video, clips in zip(videos, request.videos.read(videos), strict=True):
        key = request.videos.keys[video]
        advance(1)
        if isinstance(clips, Refused | Unreadable):
            error = f"{clips.reason}: {clips.detail}"
            log.warning("%s: %s", key, error)
            rows.append({"key": key, "clip": 0, "view": 0, "error": error})
            continue
        for number, clip in enumerate(clips):
            row = {"key": key, "clip": number // request.views, "view": clip.view}
            rows.append({**row, "start_s": clip.start_s, "seconds": seconds})
            frames.append(clip.frames)
        if len(frames) >= request.batch:
            yield from _with_features(encoder, rows, frames, request)
            rows, frames = [], []
    yield from _with_features(encoder, rows, frames, request)


@torch.no_grad()
def _with_features(
    encoder: VideoEncoder,
    rows: Sequence[dict[str, Any]],
    frames: Sequence[UInt8[Tensor, "T px px C"]],
    request: EmbedRequest,
) -> Iterator[dict[str, Any]]:
    """Encode the clips of some rows in batches."""
    device = next(encoder.parameters()).device
    features: list[np.ndarray] = []
    for start in range(0, len(frames), request.batch):
        tokens = encoder(torch.stack(list(frames[start : start + request.batch])).to(device))
        features += list(reduce_tokens(tokens, request.what).flatten(1).float().cpu().numpy())
    found = iter(features)
    for row in rows:
        yield row if "error" in row else {**row, "features": next(found)}


def open_parts(out: Path, facts: Mapping[str, Any], *, overwrite: bool) -> Path:
    """Return the folder of the parts that exist so far, which must be of the same command."""
    parts = out.with_name(f".{out.name}.parts")
    file = parts / "plan.json"
    if file.is_file() and overwrite:
        shutil.rmtree(parts)
    if file.is_file():
        before = read_json(file)
        changed = [name for name in facts if before.get(name) != facts[name]]
        if changed:
            raise BadInput(
                f"{parts} holds parts of another command ({changed[0]} was {before.get(changed[0])!r}, is "
                f"{facts[changed[0]]!r}). Finish that command, or give --overwrite to start again."
            )
        log.info("resuming from %d parts in %s", len(list(parts.glob("*.parquet"))), parts)
        return parts
    parts.mkdir(parents=True, exist_ok=True)
    with new_file(file, overwrite=True) as partial:
        partial.write_text(json.dumps(facts))
    return parts


# ---- the file


def _count(file: Path) -> tuple[int, set[str], int]:
    """Return the number of clips with features, the videos, and the number of broken videos of a part."""
    table = pq.read_table(file, columns=["key", "error"])
    broken = len(table) - table["error"].null_count
    return len(table) - broken, set(table["key"].unique().to_pylist()), broken


def _write_parquet(parts: EmbeddedParts, out: Path, overwrite: bool) -> None:
    schema = SCHEMA.with_metadata({"vjepa": json.dumps(parts.facts)})
    with new_file(out, overwrite=overwrite) as partial, pq.ParquetWriter(partial, schema) as writer:
        for file in parts.files:
            writer.write_table(pq.read_table(file).cast(schema), row_group_size=ROW_GROUP)


def _write_npy(parts: EmbeddedParts, out: Path, overwrite: bool) -> None:
    rows_file = out.with_suffix(".json")
    check_free(rows_file, overwrite=overwrite)
    shape = parts.facts["shape"]
    clips = sum(_count(file)[0] for file in parts.files)
    rows: list[dict[str, Any]] = []
    with new_file(out, overwrite=overwrite) as partial:
        array = np.lib.format.open_memmap(partial, "w+", np.float32, (clips, *shape))
        start = 0
        for file in parts.files:
            features = _features(file, shape)
            array[start : start + len(features)] = features
            start += len(features)
            rows += _rows_without_features(file)
        array.flush()
        with new_file(rows_file, overwrite=overwrite) as text:
            text.write_text(json.dumps({**parts.facts, "rows": rows}, indent=1))


def _write_safetensors(parts: EmbeddedParts, out: Path, overwrite: bool) -> None:
    rows = [row for file in parts.files for row in _rows_without_features(file)]
    features = np.concatenate([_features(file, parts.facts["shape"]) for file in parts.files])
    with new_file(out, overwrite=overwrite) as partial:
        metadata = {"format": "pt", "vjepa": json.dumps({**parts.facts, "rows": rows})}
        save_file({"features": torch.from_numpy(features)}, partial, metadata)


def _features(file: Path, shape: Sequence[int]) -> Float[np.ndarray, "n ..."]:
    """Read the features of the rows without errors."""
    column = pq.read_table(file, columns=["features"])["features"]
    return column.drop_null().combine_chunks().flatten().to_numpy().reshape(-1, *shape)


def _rows_without_features(file: Path) -> list[dict[str, Any]]:
    """Read all rows without their features and empty entries."""
    rows = pq.read_table(file).drop_columns("features").to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


WRITERS: dict[str, Callable[[EmbeddedParts, Path, bool], None]] = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
}
