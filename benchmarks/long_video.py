"""Cost of a clip from the middle of a long video: from a virtual part, from a shard of cut clips, from the whole video.

    python benchmarks/long_video.py VIDEO --work DIR [--at 3000] [--part 10]

The video is stored whole, with `cut.part_s`, and a clip of the same length is cut from it. Then the same 16 frames at
4 fps are read and decoded from both corpora, and from the whole stored video. The kernel counts the bytes. Times are
CPU time of this process, medians.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vjepa_data.builder import shard
from vjepa_data.corpus.index import Index
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.spec import Cut, Encode, Spec

FRAMES, FPS = 16, 4.0


def build(source: Path, out: Path, cut: Cut) -> Index:
    """Store a video or the parts that a table lists, unless they are stored."""
    if not (out / "manifest.json").exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shard([str(source)], out, spec=Spec(cut=cut, encode=Encode(preset="ultrafast")), workers=1)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{out.name}: {after.ru_utime - before.ru_utime:.0f} CPU s, {after.ru_maxrss / 1e6:.2f} GB in a child")
    return Index(out)


def measure(index: Index, sample: int, first: int, backend: str, rounds: int) -> tuple[dict[str, float], np.ndarray]:
    """Read and decode the clip that begins at frame `first` of a sample."""
    expect = Expect(*(int(column[sample]) for column in (index.frames, index.width, index.height)))
    numbers = [first + round(k * float(index.fps[sample]) / FPS) for k in range(FRAMES)]

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    nothing = -count() + count()
    before = count()
    video = index.read(sample).video
    read = count() - before - nothing
    frames = decode(video, numbers, backend=backend, expect=expect)
    reads, decodes = [], []
    for _ in range(rounds):
        reads.append(_cpu_ms(lambda: index.read(sample)))
        decodes.append(_cpu_ms(lambda: decode(video, numbers, backend=backend, expect=expect)))
    return {"kB read": read / 1e3, "read ms": statistics.median(reads), "decode ms": statistics.median(decodes)}, frames


def _cpu_ms(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--at", type=float, default=3000.0, help="start of the clip, in seconds")
    parser.add_argument("--part", type=float, default=10.0, help="length of a part, in seconds")
    words = parser.parse_args()
    whole = build(words.video, words.work / "whole", Cut(part_s=words.part))
    table = words.work / "clip.csv"
    table.write_text(f"path,start_s,end_s\n{words.video.resolve()},{words.at},{words.at + words.part}\n")
    clips = build(table, words.work / "clips", Cut())
    part = max(i for i in range(len(whole)) if whole.start_s(i) <= words.at)
    fps = float(whole.fps[part])
    entire = Index(words.work / "whole", part_s=1e9)
    places = {
        "virtual part": (whole, part, round(words.at * fps) - whole.first_frame(part), 50),
        "shard of cut clips": (clips, 0, 0, 50),
        "the whole stored video": (entire, 0, round(words.at * fps), 3),
    }
    for backend in ("decord", "pyav"):
        shown = {
            name: measure(index, sample, first, backend, rounds)
            for name, (index, sample, first, rounds) in places.items()
        }
        for name, (numbers, frames) in shown.items():
            difference = np.abs(frames.astype(int) - shown["the whole stored video"][1]).mean()
            texts = [f"{key} {value:.1f}" for key, value in numbers.items()]
            print(f"{backend}, {name}: {', '.join(texts)}; differs from the whole by {difference:.2f}")


if __name__ == "__main__":
    main()
