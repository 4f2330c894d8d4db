"""Features of videos, any number of them, in one file.

    vjepa embed MODEL VIDEOS... --out features.parquet

A row for every clip, in the order of the videos. A video that cannot be read is a row that says why, not a crash. What
is done is kept in parts beside the file until it is whole: the same command goes on where it was stopped.

    .parquet       rows with their features
    .npy           features [rows, ...] of the good rows; the rows in a .json of the same name
    .safetensors   the same, the rows in the file's metadata
"""

import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, UInt8
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from vjepa.atomic import check_free, new_file
from vjepa.config import Parallel
from vjepa.distributed.world import World, join
from vjepa.weights.load import load_encoder
from vjepa.weights.native import VideoEncoder
from vjepa.weights.tensors import read_json
from vjepa.weights.weights import Part
from vjepa_data.errors import Unreadable
from vjepa_data.evaluation.clips import EvalClips
from vjepa_data.evaluation.video_files import TIMEOUT_S, FileClip, FileVideos, find_videos
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

What = Literal["clip", "time", "token"]

PART_VIDEOS = 64  # videos of one part: what is done again, at most, after a stop
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
class Videos(Protocol):
    """Where clips come from."""

    keys: Sequence[str]

    def read(self, videos: Sequence[int]) -> Iterator[Sequence[FileClip] | Refused | Unreadable]:
        """The clips of each video, or why there are none, in order."""
        ...


@dataclass(frozen=True)
class Summary:
    """What came of it."""

    clips: int
    videos: int
    broken: int
    """Videos that gave no features."""
    shape: tuple[int, ...]
    """Of the features of one clip."""


def embed(
    model: Path,
    videos: Sequence[Path],
    out: Path,
    *,
    what: What = "clip",
    split: str = "train",
    clips_per_video: int = 1,
    views: int = 1,
    part: Part = "target",
    device: str | None = None,
    batch: int = 8,
    workers: int = 2,
    timeout_s: float = TIMEOUT_S,
    overwrite: bool = False,
) -> Summary:
    """Write the features of videos; under torchrun the ranks share them.

    Args:
        model: a run, a checkpoint, or an export.
        videos: files and folders of files, or one corpus of shards.
        out: the file; its suffix says of which kind.
        what: mean over all tokens [D], over space at each time [t D], or every token [t h w D].
        split: which split of a corpus.
        clips_per_video: clips of each video, evenly spaced.
        views: of each clip: 1 is the whole frame, more are squares of it.
        part: whose features, where `model` is a run or a checkpoint.
        device: where to compute; by default a GPU if there is one.
        batch: clips that are encoded together.
        workers: processes of each rank that decode files.
        timeout_s: seconds that one file may take to be opened and decoded.
        overwrite: replace `out`, and forget unfinished parts of it.

    Raises:
        BadInput: no such model or video, an unknown suffix, a place that is taken, or parts of another command.
    """
    check_free(out, overwrite=overwrite)
    if out.suffix not in WRITERS:
        raise BadInput(f"{out}: features are written as {', '.join(WRITERS)}; give --out such a name")
    encoder = load_encoder(model, part)
    form: dict[str, Any] = {"px": encoder.px, "frames": encoder.frames, "fps": encoder.fps}
    form |= {"per_video": clips_per_video, "views": views}
    corpora = [place for place in videos if (place / "manifest.json").is_file()]
    if corpora and len(videos) > 1:
        raise BadInput(f"{corpora[0]} is a corpus, and is embedded alone; give it as the only place")
    with join(TOGETHER) as world, ExitStack() as stack:
        if corpora:
            found: Videos = CorpusVideos(EvalClips(corpora[0], split=split, **form))
        else:
            files = FileVideos(find_videos(videos), workers=workers, timeout_s=timeout_s, **form)
            found = stack.enter_context(files)
        encoder.to(device or world.device)
        job = EmbedRequest(found, what, str(model), clips_per_video, views, batch)
        return write_features(world, encoder, job, out, overwrite=overwrite)


# Ranks do not wait for each other's videos, only for the last of them; a day is no reason to give up.
TOGETHER = Parallel(timeout_s=86_400)


@dataclass(frozen=True)
class EmbedRequest:
    """What to encode, and how."""

    videos: Videos
    what: What
    model: str
    """For the record."""
    clips_per_video: int
    views: int
    batch: int = 8


def write_features(
    world: World, encoder: VideoEncoder, job: EmbedRequest, out: Path, *, overwrite: bool = False
) -> Summary:
    """Write the features of videos, all ranks together: parts of some videos each, then one file.

    Raises:
        BadInput: parts of another command are in the way.
    """
    keys = job.videos.keys
    plan = {
        "model": job.model,
        "weights": fingerprint(encoder),
        "what": job.what,
        "shape": list(shape_of(encoder, job.what)),
        "frames": encoder.frames,
        "fps": encoder.fps,
        "px": encoder.px,
        "clips_per_video": job.clips_per_video,
        "views": job.views,
        "videos": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
    }
    parts = world.first(lambda: _open_parts(out, plan, overwrite=overwrite))
    files = [parts / f"{start:09d}.parquet" for start in range(0, len(keys), PART_VIDEOS)]
    mine = range(world.rank, len(files), world.size)
    for number in track(mine, f"{len(keys)} videos", disable=len(mine) < 2 or not world.is_first):
        if not files[number].exists():
            group = range(number * PART_VIDEOS, min(len(keys), (number + 1) * PART_VIDEOS))
            rows = list(_rows(encoder, job, group))
            with new_file(files[number]) as beside:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), beside)
    world.gather(None)  # all parts are there

    def finish() -> Summary:
        WRITERS[out.suffix](files, out, plan, overwrite)
        clips, broken = _count(files)
        shutil.rmtree(parts)
        log.info("%s: %d clips of %d videos, %d videos broken", out, clips, len(keys), broken)
        return Summary(clips, len(keys), broken, tuple(plan["shape"]))

    return world.first(finish)


class CorpusVideos:
    """The clips of one split of a corpus; a thread decodes ahead of the encoder."""

    def __init__(self, clips: EvalClips) -> None:
        self.clips = clips
        self.keys: Sequence[str] = [clips.index.key(number) for number in range(len(clips.index))]

    def read(self, videos: Sequence[int]) -> Iterator[list[FileClip] | Unreadable]:
        """The clips of each video, or why there are none, in order."""
        with ThreadPoolExecutor(1) as thread:
            ahead: deque[Future[list[FileClip] | Unreadable]] = deque()
            rest = iter(videos)
            while True:
                while len(ahead) < 2 and (video := next(rest, None)) is not None:
                    ahead.append(thread.submit(self._one, video))
                if not ahead:
                    return
                yield ahead.popleft().result()

    def _one(self, video: int) -> list[FileClip] | Unreadable:
        try:
            found = [FileClip(clip.frames, clip.start_s, clip.view) for clip in self.clips.read(video)]
        except Unreadable as error:
            return error
        index = self.clips.index
        return found or Unreadable("short", f"{index.frames[video]} frames at {index.fps[video]:g} per second")


def shape_of(encoder: VideoEncoder, what: What) -> tuple[int, ...]:
    """Shape of the features of one clip."""
    model = encoder.model
    t, side = encoder.frames // model.tubelet_frames, encoder.px // model.patch_px
    return {"clip": (encoder.width,), "time": (t, encoder.width), "token": (t, side, side, encoder.width)}[what]


def reduce_tokens(tokens: Float[Tensor, "B t h w D"], what: What) -> Float[Tensor, "B ..."]:
    """Features of whole clips, or of each time, or of each token."""
    match what:
        case "clip":
            return tokens.mean((1, 2, 3))
        case "time":
            return tokens.mean((2, 3))
        case "token":
            return tokens


def fingerprint(encoder: VideoEncoder) -> str:
    """One word for the weights of an encoder: two of its tensors, which no two trained models share."""
    digest = hashlib.sha256()
    parameters = list(encoder.parameters())
    for tensor in (parameters[0], parameters[-1]):
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- the work


def _rows(encoder: VideoEncoder, job: EmbedRequest, videos: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """Rows of some videos, in order; the next are decoded while the encoder is busy."""
    seconds = encoder.frames / encoder.fps
    waiting: list[dict[str, Any]] = []
    frames: list[Tensor] = []
    for video, clips in zip(videos, job.videos.read(videos), strict=True):
        key = job.videos.keys[video]
        if isinstance(clips, Refused | Unreadable):
            error = f"{clips.reason}: {clips.detail}"
            log.warning("%s: %s", key, error)
            waiting.append({"key": key, "clip": 0, "view": 0, "error": error})
            continue
        for number, clip in enumerate(clips):
            row = {"key": key, "clip": number // job.views, "view": clip.view}
            waiting.append({**row, "start_s": clip.start_s, "seconds": seconds})
            frames.append(clip.frames)
        if len(frames) >= job.batch:
            yield from _encoded(encoder, waiting, frames, job.what, job.batch)
            waiting, frames = [], []
    yield from _encoded(encoder, waiting, frames, job.what, job.batch)


@torch.no_grad()
def _encoded(
    encoder: VideoEncoder,
    rows: Sequence[dict[str, Any]],
    frames: Sequence[UInt8[Tensor, "T px px C"]],
    what: What,
    batch: int,
) -> Iterator[dict[str, Any]]:
    device = next(encoder.parameters()).device
    features: list[np.ndarray] = []
    for start in range(0, len(frames), batch):
        tokens = encoder(torch.stack(list(frames[start : start + batch])).to(device))
        features += list(reduce_tokens(tokens, what).flatten(1).float().cpu().numpy())
    found = iter(features)
    for row in rows:
        yield row if "error" in row else {**row, "features": next(found)}


def _open_parts(out: Path, plan: Mapping[str, Any], *, overwrite: bool) -> Path:
    """The folder of what is done so far; of the same command, or new."""
    parts = out.with_name(f".{out.name}.parts")
    file = parts / "plan.json"
    if file.is_file() and overwrite:
        shutil.rmtree(parts)
    if file.is_file():
        before = read_json(file)
        changed = [name for name in plan if before.get(name) != plan[name]]
        if changed:
            raise BadInput(
                f"{parts} holds parts of another command ({changed[0]} was {before.get(changed[0])!r}, is "
                f"{plan[changed[0]]!r}); run that one to its end, or --overwrite to begin anew"
            )
        log.info("going on from %d parts in %s", len(list(parts.glob("*.parquet"))), parts)
        return parts
    parts.mkdir(parents=True, exist_ok=True)
    with new_file(file) as beside:
        beside.write_text(json.dumps(plan))
    return parts


# ---- the file


def _count(files: Sequence[Path]) -> tuple[int, int]:
    errors = [row for file in files for row in pq.read_table(file, columns=["error"])["error"].to_pylist()]
    broken = sum(error is not None for error in errors)
    return len(errors) - broken, broken


def _write_parquet(files: Sequence[Path], out: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
    schema = SCHEMA.with_metadata({"vjepa": json.dumps(plan)})
    with new_file(out, overwrite=overwrite) as beside, pq.ParquetWriter(beside, schema) as writer:
        for file in files:
            writer.write_table(pq.read_table(file).cast(schema), row_group_size=ROW_GROUP)


def _write_npy(files: Sequence[Path], out: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
    rows_file = out.with_suffix(".json")
    check_free(rows_file, overwrite=overwrite)
    good, _ = _count(files)
    rows: list[dict[str, Any]] = []
    with new_file(out, overwrite=overwrite) as beside:
        array = np.lib.format.open_memmap(beside, "w+", np.float32, (good, *plan["shape"]))
        at = 0
        for file in files:
            features, some = _read_part(file, plan)
            array[at : at + len(features)] = features
            at, rows = at + len(features), rows + some
        array.flush()
        with new_file(rows_file, overwrite=overwrite) as text:
            text.write_text(json.dumps({**plan, "rows": rows}, indent=1))


def _write_safetensors(files: Sequence[Path], out: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
    parts = [_read_part(file, plan) for file in files]
    rows = [row for _, some in parts for row in some]
    features = torch.from_numpy(np.concatenate([part for part, _ in parts]))
    with new_file(out, overwrite=overwrite) as beside:
        save_file({"features": features}, beside, {"format": "pt", "vjepa": json.dumps({**plan, "rows": rows})})


def _read_part(file: Path, plan: Mapping[str, Any]) -> tuple[Float[np.ndarray, "n ..."], list[dict[str, Any]]]:
    """Features of the good rows, and all rows, each good one with its place among the features of its part."""
    table = pq.read_table(file)
    rows = table.drop_columns("features").to_pylist()
    flat = table["features"].drop_null().combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, *plan["shape"]), [{k: v for k, v in row.items() if v is not None} for row in rows]


WRITERS: dict[str, Callable[[Sequence[Path], Path, Mapping[str, Any], bool], None]] = {
    ".parquet": _write_parquet,
    ".npy": _write_npy,
    ".safetensors": _write_safetensors,
}
