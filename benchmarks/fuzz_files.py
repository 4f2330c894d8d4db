"""Alter seed files at random, and send them through every task that opens an untrusted file.

    python benchmarks/fuzz_files.py SEEDS --files 5000 [--workers 2] [--seed 0]

Alterations are drawn from a seeded generator: flipped bits in headers or payload, overwritten runs, cut ends, removed
and repeated pieces, and lengths set to extremes. Each file is probed, searched for scenes and bars, hashed, and stored
whole and in part, in a pool of child processes. Exceptions other than a refusal, crashes, and silence for more than
`--timeout` seconds are counted and listed, and their files are kept.
"""

import argparse
import dataclasses
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import Analysis, AnalyzeTask, ExamineTask, StoreTask
from vjepa_data.media.video import Reason, Refused
from vjepa_data.spec import Encode, Filter

ENCODE = Encode(short_side_px=32, preset="ultrafast")
EXTREMES = (b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x00\x01")


def alter(data: bytes, draw: random.Random) -> bytes:
    """Alter a file in one to four ways. Half of the places lie in the first or last 2,000 bytes."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if len(out) < 16:
            break
        edge = min(2000, len(out) - 8)
        at = draw.choice(
            [draw.randrange(edge), len(out) - 8 - draw.randrange(edge), *[draw.randrange(len(out) - 8)] * 2]
        )
        length = draw.choice((1, 4, 16, 188, 1000))
        match draw.randrange(7):
            case 0:
                for _ in range(draw.choice((1, 8, 64))):
                    out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
            case 1:
                out[at] ^= 1 << draw.randrange(8)
            case 2:
                out[at : at + 4] = draw.choice(EXTREMES)
            case 3:
                out[at : at + length] = draw.randbytes(len(out[at : at + length]))
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = out[at : at + length]
            case _:
                del out[draw.randrange(len(out) // 4, len(out)) :]
    return bytes(out)


def tasks(seeds: list[Path], folder: Path, files: int, seed: int) -> Iterator[AnalyzeTask]:
    """Write the altered files in turn, and yield their analysis."""
    for number in range(files):
        draw = random.Random(f"{seed}/{number}")
        origin = draw.choice(seeds)
        path = folder / f"{number:05d}{origin.suffix}"
        path.write_bytes(alter(origin.read_bytes(), draw))
        yield AnalyzeTask(number, FileRef(str(path)), "videos", 10.0, True, True)


def follow_ups(task: AnalyzeTask, seen: Analysis) -> Iterator[StoreTask | ExamineTask]:
    """Yield the tasks of storing an analyzed file, whole and in part, and of examining it as a foreign clip."""
    info, file = seen.probe, task.file
    whole = StoreTask(0, 0, file, info.bytes, "videos", None, None, seen.box, ENCODE, Filter(), True, info)
    yield whole
    start = round(info.duration_s / 2, 3)
    yield dataclasses.replace(whole, start_s=start, end_s=start + min(1.0, info.duration_s / 4), box=None)
    if file.path.endswith(".mp4"):
        yield ExamineTask(task.number, file, "mp4", 12, deep=True)


def fuzz(seeds: list[Path], *, files: int, workers: int, seed: int, timeout_s: float, keep: Path) -> Counter[str]:
    """Run all files, and return the number of outcomes by stage and reason."""
    found: Counter[str] = Counter()
    begin = time.monotonic()

    def record(path: str, stage: str, answer: object) -> None:
        fate = answer.reason.value if isinstance(answer, Refused) else "accepted"
        found[f"{stage}: {fate}"] += 1
        if isinstance(answer, Refused) and answer.reason in (Reason.CRASHED, Reason.TIMED_OUT):
            print(f"{fate}: {Path(path).name} ({stage}): {answer.detail}", flush=True)
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep)

    def analyzed(pool: WorkerPool, folder: str) -> Iterator[StoreTask | ExamineTask]:
        for task, seen in pool.map(tasks(seeds, Path(folder), files, seed)):
            record(task.file.path, "AnalyzeTask", seen)
            if task.number % 250 == 249:
                print(f"{task.number + 1} files in {time.monotonic() - begin:.0f} s", flush=True)
            if isinstance(seen, Analysis):
                yield from follow_ups(task, seen)

    with (
        tempfile.TemporaryDirectory() as folder,
        WorkerPool("vjepa_data.media.tasks", workers=workers, timeout_s=timeout_s) as pool,
        WorkerPool("vjepa_data.media.tasks", workers=workers, timeout_s=timeout_s) as later,
    ):
        for task, answer in later.map(analyzed(pool, folder)):
            record(task.file.path, type(task).__name__, answer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seeds", type=Path, help="folder of small sound files")
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    words = parser.parse_args()
    seeds = sorted(path for path in words.seeds.iterdir() if path.is_file())
    options = {"workers": words.workers, "seed": words.seed, "timeout_s": words.timeout, "keep": words.keep}
    found = fuzz(seeds, files=words.files, **options)
    for outcome, count in sorted(found.items()):
        print(f"{count:6d} {outcome}")


if __name__ == "__main__":
    main()
