"""Embed whole videos as streams: a row per tubelet, or at a pace, in flat memory.

    vjepa embed MODEL VIDEOS... --out features.parquet --stream --window 16 --every 1s

The features of a row have all of the video before it in reach, through the window of a causal encoder
(`vjepa.nn.streaming`). Rows are kept in part files next to `out`, each with the state of the stream after its last
row. The same command goes on from there, and the result is the same to the bit.
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from vjepa.atomic import check_free, new_file
from vjepa.distributed.world import World, join
from vjepa.evals.base import PATIENT
from vjepa.evals.embed import SCHEMA, EmbeddedParts, EmbedSummary, check_suffix, open_parts
from vjepa.evals.features import Pooling, fingerprint, reduce_tokens
from vjepa.progress import progress
from vjepa.weights.load import load_encoder
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.weights import Part
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.evaluation.frame_stream import CorpusFrames, FileFrames, check_streams, find_streams
from vjepa_data.evaluation.video_files import TIMEOUT_S, printable
from vjepa_data.media.video import Refused

log = logging.getLogger(__name__)

PART_ROWS = 512
"""Rows of a part, at most: so many are repeated after an interruption."""
PART_BYTES = 64 << 20
"""Bytes of the features of a part, about, where rows are large."""


@runtime_checkable
class StreamReader(Protocol):
    """A source of whole videos: files and pipes, or a corpus."""

    keys: Sequence[str]
    """Name of each video."""

    def frames(self, video: int, skip: int = 0) -> Iterator[UInt8[Tensor, "T px px C"]]:
        """Yield the frames of a video in order, from frame number `skip` on.

        Raises:
            Refused | Unreadable: the video cannot be decoded at this point.
        """
        ...


@dataclass(frozen=True)
class Pace:
    """Selects the tubelets of a stream that have a row."""

    tubelet_s: Fraction
    every_s: Fraction | None = None
    """Seconds of video from row to row. By default every tubelet has a row."""

    def has_row(self, tubelet: int) -> bool:
        """Tell whether a multiple of `every_s` seconds is reached with this tubelet, counted from 0."""
        if self.every_s is None:
            return True
        return (tubelet + 1) * self.tubelet_s // self.every_s > tubelet * self.tubelet_s // self.every_s


def read_pace(text: str | None, encoder: VideoEncoder) -> Pace:
    """Read the distance of rows, such as `1s`, `500ms` or `2min`. A bare number counts seconds.

    Raises:
        BadInput: it is not a time, or shorter than a tubelet.
    """
    tubelet_s = encoder.model.tubelet_frames / Fraction(encoder.fps).limit_denominator(1001)
    if text is None:
        return Pace(tubelet_s)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|min|h|)", text)
    units = {"ms": Fraction(1, 1000), "s": 1, "": 1, "min": 60, "h": 3600}
    every_s = Fraction(found[1]) * units[found[2]] if found else Fraction(0)
    if not every_s:
        raise BadInput(f"--every {text} is not a time above 0; write 1s, 500ms or 2min")
    if every_s < tubelet_s:
        raise BadInput(f"--every {text} is shorter than a tubelet of this model ({float(tubelet_s):g} s)")
    return Pace(tubelet_s, every_s)


def embed_stream(
    model: Path,
    videos: Sequence[Path],
    out: Path,
    *,
    window: int | None = None,
    every: str | None = None,
    what: Pooling = "clip",
    split: str = "train",
    clip_s: float | None = None,
    part: Part = "target",
    device: str | None = None,
    timeout_s: float = TIMEOUT_S,
    overwrite: bool = False,
) -> EmbedSummary:
    """Write the features of whole videos, a row per tubelet. Under torchrun the ranks share the videos.

    Args:
        model: a run, a checkpoint, or an export, with a causal encoder and true rotary positions.
        videos: files, folders of files and pipes (`-` is standard input), or a corpus of shards.
        out: file to write. Its suffix gives the format.
        window: tubelets that a token attends to, its own included. By default as the model was trained.
        every: seconds of video from row to row, such as `1s`. By default every tubelet has a row.
        what: mean over a tubelet's tokens [D], the same with its one time [1 D], or all its tokens [1 h w D].
        split: split of a corpus.
        clip_s: seconds that as many frames span as a clip had in training, which sets the rate of frames.
        part: which encoder of a run or checkpoint.
        device: torch device. The default is a GPU, if any.
        timeout_s: time limit for decoding between two frames, in seconds.
        overwrite: replace `out` and discard its unfinished parts.

    Raises:
        BadInput: the model cannot stream, a video or the suffix is unknown, `out` exists, or there are parts of
            another command.
    """
    check_free(out, overwrite=overwrite)
    check_suffix(out)
    encoder = load_encoder(model, part)
    if clip_s is not None:
        encoder.fps = encoder.frames / clip_s
    pace, trained = read_pace(every, encoder), encoder.stream(window)
    reader = _reader(videos, encoder, split, timeout_s)
    side = encoder.px // encoder.model.patch_px
    shape = {"clip": (), "time": (1,), "token": (1, side, side)}[what]
    facts = {
        "model": printable(model),
        "weights": fingerprint(encoder),
        "what": what,
        "shape": [*shape, encoder.width],
        "fps": encoder.fps,
        "px": encoder.px,
        "window": trained.window,
        "every": every,
        "videos": hashlib.sha256("\n".join(reader.keys).encode()).hexdigest(),
    }
    with join(PATIENT) as world:
        encoder.to(device or world.device)
        folder = world.first(lambda: open_parts(out, facts, overwrite=overwrite))
        files = _write_all(world, Streaming(encoder, reader, trained.window, pace, what, folder))
        parts = EmbeddedParts(folder, files, facts)
        return world.first(lambda: parts.write(out, overwrite=overwrite))


def _reader(videos: Sequence[Path], encoder: VideoEncoder, split: str, timeout_s: float) -> StreamReader:
    corpora = [path for path in videos if (path / "manifest.json").is_file()]
    if corpora and len(videos) > 1:
        raise BadInput(f"{corpora[0]} is a corpus and cannot be mixed with other paths; embed it alone")
    if corpora:
        return CorpusFrames(corpora[0], split=split, px=encoder.px, fps=encoder.fps)
    paths = find_streams(videos)
    check_streams(paths)
    tubelet = encoder.model.tubelet_frames
    return FileFrames(paths, px=encoder.px, fps=encoder.fps, tubelet_frames=tubelet, timeout_s=timeout_s)


def _write_all(world: World, streaming: "Streaming") -> list[Path]:
    """Write the parts of all videos and return them in order."""
    own = range(world.rank, len(streaming.reader.keys), world.size)
    with progress(f"embed {len(streaming.reader.keys)} videos", len(own), show=world.is_first) as bar:
        for video in own:
            streaming.write(video)
            bar.advance(1)
    world.gather(None)
    return sorted(streaming.folder.glob("*.parquet"))


@dataclass(frozen=True)
class Streaming:
    """Streams of several videos into part files: `VIDEO-FIRSTROW.parquet`, the last of a video `...-end.parquet`."""

    encoder: VideoEncoder
    reader: StreamReader
    window: int
    pace: Pace
    what: Pooling
    folder: Path

    def write(self, video: int) -> None:
        """Write the missing parts of a video."""
        done = sorted(self.folder.glob(f"{video:09d}-*.parquet"))
        if done and done[-1].stem.endswith("-end"):
            return
        row = 0
        stream = self.encoder.stream(self.window)
        if done:
            row = int(done[-1].stem.split("-")[1]) + len(pq.read_table(done[-1], columns=["clip"]))
            log.info("%s: going on at row %d", self.reader.keys[video], row)
            stream.load_state_dict(load_file(self._state(video, row)))
        rows = self._rows(video, stream, row)
        size = max(1, min(PART_ROWS, PART_BYTES // (4 * self._numbers_per_row())))
        while True:
            some = list(itertools.islice(rows, size))
            is_end = len(some) < size
            if not is_end:
                with new_file(self._state(video, row + size), overwrite=True) as partial:
                    save_file(stream.state_dict(), partial)
            name = f"{video:09d}-{row:012d}{'-end' if is_end else ''}.parquet"
            with new_file(self.folder / name, overwrite=True) as partial:
                pq.write_table(pa.Table.from_pylist(some, SCHEMA), partial)
            self._state(video, row).unlink(missing_ok=True)
            row += size
            if is_end:
                return

    def _state(self, video: int, row: int) -> Path:
        return self.folder / f"{video:09d}-{row:012d}.safetensors"

    def _numbers_per_row(self) -> int:
        side = self.encoder.px // self.encoder.model.patch_px
        return self.encoder.width * (side**2 if self.what == "token" else 1)

    def _rows(self, video: int, stream: Any, row: int) -> Iterator[Mapping[str, Any]]:
        """Yield the rows of a video from `row` on. A video that breaks ends with a row that gives the reason."""
        key, size = self.reader.keys[video], stream.tubelet_frames
        device, seconds = next(self.encoder.parameters()).device, float(self.pace.tubelet_s)
        time = stream.time
        try:
            for frames in self.reader.frames(video, skip=time * size):
                for first in range(0, len(frames) - size + 1, size):
                    features = stream(frames[None, first : first + size].to(device))
                    time += 1
                    if self.pace.has_row(time - 1):
                        values = reduce_tokens(features, self.what).flatten().float().cpu().numpy()
                        start_s = float((time - 1) * self.pace.tubelet_s)
                        place = {"key": key, "clip": row, "view": 0, "start_s": start_s, "seconds": seconds}
                        yield {**place, "features": values}
                        row += 1
        except (Refused, Unreadable) as broken:
            error = f"{broken.reason}: {broken.detail}"
        else:
            if row:
                return
            error = f"too_short: {time} tubelets of {seconds:g} s give no row"
        log.warning("%s: %s", key, error)
        yield {"key": key, "clip": row, "view": 0, "error": error}
