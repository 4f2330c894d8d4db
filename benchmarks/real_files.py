"""Compare the stored form of real files with the frames of the ffmpeg command.

    python benchmarks/real_files.py FOLDER... [--workers 2] [--list]

Every video file below each folder is stored as `vjepa shard` stores it, whole and from 40 to 60 % of its length. Each
stored frame is compared with that of `ffmpeg -vf fps=RATE,scale=W:H` at the same time: number of frames, picture
(orientation and colour included) and repeated pictures. A refused file counts as rightly refused if ffmpeg reports
errors, finds no video, or the page of datasets states the rule that refuses it.
"""

import argparse
import io
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import AnalyzeTask, StoreTask
from vjepa_data.media.transcode import thumbnail
from vjepa_data.media.video import SUFFIXES, Reason, Refused, VideoInfo
from vjepa_data.spec import Encode, Filter

BY_RULE = frozenset({Reason.NO_VIDEO_STREAM, Reason.SIZE_CHANGES, Reason.ODD_ROTATION, Reason.EMPTY, Reason.TOO_LARGE})
"""Reasons that hold for files which ffmpeg can play."""

MAX_DIFFERENCE = 10.0
"""Mean difference of the grey levels of 64 blocks, above which two pictures count as different."""

ENCODE = Encode(short_side_px=64, preset="ultrafast", crf=18)


@dataclass(frozen=True)
class Fate:
    """The result for a file."""

    name: str
    kind: str
    """`stored`, `refused` or `wrong`."""
    detail: str


def compare_folder(folder: Path, *, workers: int) -> Iterator[Fate]:
    """Store every video of a folder, and compare it with ffmpeg's output."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    with WorkerPool("vjepa_data.media.tasks", workers=workers, timeout_s=60.0) as pool:
        tasks = [AnalyzeTask(n, FileRef(str(path)), "videos", None, False, False) for n, path in enumerate(files)]
        for path, (_, seen) in zip(files, pool.map(tasks), strict=True):
            name = str(path.relative_to(folder))
            if isinstance(seen, Refused):
                yield _judge_refusal(name, path, seen)
                continue
            info = seen.probe
            third = (round(0.4 * info.duration_s, 2), round(0.6 * info.duration_s, 2))
            parts = [(None, None), *([third] if info.duration_s >= 1 else [])]
            stores = [
                StoreTask(0, n, FileRef(str(path)), info.bytes, "videos", a, b, None, ENCODE, Filter(), False, info)
                for n, (a, b) in enumerate(parts)
            ]
            for task, answer in pool.map(stores):
                if isinstance(answer, Refused):
                    yield _judge_refusal(name, path, answer)
                    break
                wrong = _compare(path, info, answer.clip.data, task.start_s or 0.0)
                if wrong:
                    yield Fate(name, "wrong", f"{f'part {task.start_s}: ' if task.start_s else ''}{wrong}")
                    break
            else:
                yield Fate(name, "stored", "")


def _judge_refusal(name: str, path: Path, refusal: Refused) -> Fate:
    """Count a refusal as right if ffmpeg fails as well, or a stated rule refuses the file."""
    words = ["-v", "error", "-i", str(path), "-map", "0:v:0", "-f", "framecrc", "-"]
    done = subprocess.run(["ffmpeg", "-nostdin", *words], capture_output=True, text=True, errors="replace", check=False)
    errors = done.stderr.strip().splitlines()
    frames = sum(not line.startswith("#") for line in done.stdout.splitlines())
    detail = f"{refusal.reason}: {refusal.detail}"
    if refusal.reason in BY_RULE or errors or not frames:
        return Fate(name, "refused", f"{detail} | ffmpeg: {frames} frames, {errors[-1][:90] if errors else 'no error'}")
    return Fate(name, "wrong", f"refused, though ffmpeg plays it: {detail}")


def _compare(path: Path, info: VideoInfo, clip: bytes, start_s: float) -> str:
    """Return how a stored clip differs from ffmpeg's output, or an empty string."""
    with av.open(io.BytesIO(clip), "r") as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or Fraction(1)
        size = (stream.width, stream.height)
        ours = np.stack([thumbnail(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)])
    theirs = _with_ffmpeg(path, info, rate, size)
    if not len(theirs):
        return "ffmpeg shows no frame"
    if not start_s and abs(len(ours) - len(theirs)) > max(1, 0.02 * len(theirs)):
        return f"{len(ours)} frames, ffmpeg {len(theirs)}"
    first = round(start_s * rate)
    if info.transfer:  # tone-mapped, which ffmpeg does not do by itself
        return ""
    near = [theirs[np.clip(np.arange(len(ours)) + first + shift, 0, len(theirs) - 1)] for shift in (-1, 0, 1)]
    differences = np.min([np.abs(ours - other).mean(axis=(1, 2)) for other in near], axis=0)
    if np.quantile(differences, 0.95) > MAX_DIFFERENCE:
        return f"pictures differ by {np.quantile(differences, 0.95):.0f}, the worst is frame {differences.argmax()}"
    moves, expected = (np.abs(np.diff(x, axis=0)).mean(axis=(1, 2)) for x in (ours, near[1]))
    stills = int(((moves < 0.05) & (expected > 1)).sum())
    return f"{stills} pictures stand still, though the source moves" if stills > max(1, 0.05 * len(ours)) else ""


def _with_ffmpeg(path: Path, info: VideoInfo, rate: Fraction, size: tuple[int, int]) -> np.ndarray:
    """Return ffmpeg's frames at a rate and size, as thumbnails [T 8 8]."""
    filters = f"fps={rate},scale={size[0]}:{size[1]}:flags=bicubic"
    words = ["-map", f"0:{info.stream}", "-vf", filters, "-fps_mode", "passthrough", "-pix_fmt", "rgb24"]
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-i", str(path), *words, "-f", "rawvideo", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    pixels = np.frombuffer(done.stdout, np.uint8)
    count = len(pixels) // (3 * size[0] * size[1])
    frames = pixels[: count * 3 * size[0] * size[1]].reshape(count, size[1], size[0], 3)
    return np.stack([thumbnail(frame) for frame in frames]) if count else np.zeros((0, 8, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="name every file, not only those that came out wrong")
    words = parser.parse_args()
    rows = []
    for folder in words.folders:
        counts: Counter[str] = Counter()
        for fate in compare_folder(folder, workers=words.workers):
            counts[fate.kind] += 1
            if fate.kind == "wrong" or words.list:
                print(f"{fate.kind}: {folder.name}/{fate.name}: {fate.detail}", flush=True)
        rows.append([folder.name, counts.total(), *(counts[kind] for kind in ("stored", "refused", "wrong"))])
    print("| source | files | stored, as ffmpeg shows them | refused rightly | wrong |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
