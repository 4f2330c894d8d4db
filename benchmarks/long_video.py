"""Cost of a clip from the middle of a long video: from a virtual part, from a shard of cut clips, from the whole video.

    python benchmarks/long_video.py VIDEO --work DIR [--hours 1] [--part 10]

The first 9.6 s of a video are stored in the canonical form and repeated, without encoding, until they last for the
wanted time. This long video is written with virtual parts, and the part in question once more as a clip of its own.
Then the same 16 frames at 4 fps, near five sixths of the time, are read and decoded from both corpora and from the
whole long video. The kernel counts the bytes. Times are CPU time of this process, medians.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vjepa_data.corpus.format import SampleRecord, ShardWriter, write_manifest
from vjepa_data.corpus.index import Index
from vjepa_data.corpus.parts import MEMBER
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.media.canonical import read_canonical
from vjepa_data.media.gop_table import gop_table
from vjepa_data.media.transcode import transcode
from vjepa_data.spec import Cut, Encode, Filter, Spec

FRAMES, FPS = 16, 4.0
PIECE_S = 9.6


def repeat(video: Path, out: Path, seconds: float) -> bytes:
    """Store the start of a video and repeat it without encoding, in the canonical form."""
    piece = transcode(video, start_s=0.0, end_s=PIECE_S, encode=Encode(), accept=Filter())
    (out / "piece.mp4").write_bytes(piece.data)
    words = ["-stream_loop", str(round(seconds / PIECE_S) - 1), "-i", out / "piece.mp4", "-c", "copy"]
    form = ["-use_editlist", "0", "-movflags", "+faststart+negative_cts_offsets", out / "long.mp4"]
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, [*words, *form])], check=True)
    return (out / "long.mp4").read_bytes()


def write_corpus(video: bytes, out: Path, part_s: float | None) -> Index:
    """Write a corpus of one video, in the form of `vjepa shard`."""
    spec = Spec(cut=Cut(part_s=part_s))
    stored = read_canonical(video, gop=spec.encode.gop)
    form = {"frames": stored.frames, "fps": stored.fps, "width": stored.width, "height": stored.height}
    facts = {"stored": {**form, "duration_s": stored.frames / stored.fps}, "group": "long", "labels": {}}
    (out / "shards").mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out, number=0, file="shards/long-train-000000.tar", split="train")
    members = {MEMBER: gop_table(video, gop=spec.encode.gop)} if part_s else {}
    writer.write(SampleRecord("long", video, "mp4", facts, members))
    writer.commit(plan="")
    record = json.loads((out / "shards" / "000000.json").read_bytes())
    write_manifest(out, [record], [], name="long", spec=spec.model_dump(mode="json"), tools={})
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
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--part", type=float, default=10.0, help="length of a part, in seconds")
    words = parser.parse_args()
    words.work.mkdir(parents=True, exist_ok=True)
    video = repeat(words.video, words.work, 3600 * words.hours)
    whole = write_corpus(video, words.work / "whole", words.part)
    at = 3000 * words.hours
    part = max(i for i in range(len(whole)) if whole.start_s(i) <= at)
    inside = round(2 * float(whole.fps[part]))  # the clip begins 2 s after its part
    first = whole.first_frame(part) + inside
    clip = write_corpus(whole.read(part).video, words.work / "clip", None)
    places = {
        "virtual part": (whole, part, inside, 30),
        "shard of cut clips": (clip, 0, inside, 30),
        "the whole video": (Index(words.work / "whole", part_s=1e9), 0, first, 3),
    }
    print(f"{len(video) / 1e6:.1f} MB, {len(whole)} parts, table of {len(gop_table(video, gop=12)) / 1e3:.0f} kB")
    for backend in ("decord", "pyav"):
        shown = {
            name: measure(index, sample, start, backend, rounds)
            for name, (index, sample, start, rounds) in places.items()
        }
        for name, (numbers, frames) in shown.items():
            is_equal = np.array_equal(frames, shown["the whole video"][1])
            texts = [f"{key} {value:.1f}" for key, value in numbers.items()]
            print(f"{backend}, {name}: {', '.join(texts)}; {'the same' if is_equal else 'other'} pixels as the whole")


if __name__ == "__main__":
    main()
