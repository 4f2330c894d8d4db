"""Run the loader for long and on large corpora, for which tests have no time.

    python benchmarks/stream.py soak --work DIR [--clips 20000]        # 1 % poison: memory, threads, lost clips
    python benchmarks/stream.py first --work DIR [--samples 1000000]  # the first batch, at steps 0 and 100,000

The corpora are generated: tiny videos, so that the loader and not the decoder is at work.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from vjepa_data.corpus.format import SampleRecord, ShardWriter, read_record, write_manifest
from vjepa_data.reader.bench import descendants
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Clip, Crop, Data, Loader, Rejects, Source

FRAMES, FPS, WIDTH, HEIGHT, BATCH = 24, 8, 64, 48, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["soak", "first", "one"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--step", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"soak": soak, "first": first, "one": one}[args.what](args)


def soak(args: argparse.Namespace) -> None:
    """Draw many clips from a corpus of which a hundredth cannot be decoded, and report memory and lost clips."""
    poison = write_poisoned(args.work / "soak", samples=2_000)
    data = settings(args.work / "soak", rejects=Rejects(max_share=0.05))
    loader = Loader(workers=2, decode_timeout_s=2)
    memory: list[tuple[int, float]] = []
    lost, replaced, threads, zombies = 0, 0, 0, 0
    with (
        tempfile.TemporaryDirectory() as run,
        ClipLoader(data, loader, seed=0, batch_size=BATCH, folder=Path(run)) as b,
    ):
        for step in range(args.clips // BATCH):
            batch = next(b)
            given = dict(zip(batch.groups[0].slots, batch.groups[0].keys, strict=True))
            for slot, got in given.items():
                draw = b.plan.draw(step, slot)
                planned = b.plan.sources[draw.source].index.key(draw.sample)  # pyright: ignore[reportAttributeAccessIssue]
                lost += planned not in poison and got != planned
                replaced += planned in poison and got not in poison
                assert got not in poison, got
            if step % 25 == 24:
                family = descendants(os.getpid())
                memory.append((step * BATCH, sum(map(pss_mb, family | {os.getpid()}))))
                threads = max(threads, *(len(os.listdir(f"/proc/{p}/task")) for p in family if is_ours(p)))
                zombies += sum(state(p) == "Z" for p in family)
        rows = [json.loads(line) for line in (Path(run) / "rejected.jsonl").read_text().splitlines()]
    named = {row["key"] for row in rows}
    reasons = {kind: sum(row["reason"] == kind for row in rows) for kind in sorted({row["reason"] for row in rows})}
    early, late = (statistics.mean(m for _, m in part) for part in quarters(memory))
    print(f"{args.clips} clips; {replaced} slots whose sample was poison were given another; {lost} good clips lost")
    print(
        f"{len(named)} samples named in rejected.jsonl, {len(named - poison)} of them good; lines by reason: {reasons}"
    )
    print(
        f"memory of all processes: {early:.0f} MB in the second quarter, {late:.0f} MB in the last "
        f"({late / early - 1:+.1%})"
    )
    print(f"at most {threads} threads in a worker or decode worker, {zombies} zombies seen")
    if lost or zombies or threads > 3 or named - poison or abs(late / early - 1) > 0.05:
        raise SystemExit("the soak failed")


def quarters(samples: list) -> tuple[list, list]:
    n = len(samples) // 4
    return samples[n : 2 * n], samples[3 * n :]


def pss_mb(pid: int) -> float:
    """Return the memory of a process. Shared pages count in parts."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(text.split("Pss:")[1].split()[0]) / 1000


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_ours(pid: int) -> bool:
    """Return whether a process is a living worker or decode worker, rather than a helper of Python or a zombie."""
    return state(pid) not in "ZX" and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def write_poisoned(folder: Path, *, samples: int) -> set[str]:
    """Write a corpus of which every hundredth sample cannot be decoded, and return the keys of these samples."""
    videos = [encode(look) for look in range(8)]
    bad = {
        "half": videos[0][: len(videos[0]) // 2],
        "no index": videos[1].replace(b"moov", b"xxxx", 1),
        "a page": b"<html>503 Slow Down</html>" * 40,
        "noise": np.random.default_rng(0).bytes(9000),
        "empty": b"",
        "another length": encode(0, frames=FRAMES - 5),
        "hangs decord": hang(),
    }
    kinds = list(bad)
    place = random.Random(0).sample(range(samples), samples // 100)
    poison = {f"soak-{number:05d}": kinds[i % len(kinds)] for i, number in enumerate(place)}
    samples_of = [(f"soak-{number:05d}", videos[number % 8], {}) for number in range(samples)]
    for number in place:
        key = samples_of[number][0]
        samples_of[number] = (key, bad[poison[key]], HANGS if poison[key] == "hangs decord" else {})
    write_shards(folder, samples_of, per_shard=250)
    return set(poison)


# The index says that it has so many frames a second that a clip reaches from its first to its last.
HANGS = {"frames": 240, "fps": 316.0, "duration_s": 240 / 316}


def hang() -> bytes:
    """Make a file on whose last frames decord hangs or crashes: cut without decoding, most of a group is hidden."""
    quiet = ["ffmpeg", "-nostdin", "-v", "error", "-y"]
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = f"{folder}/whole.mp4", f"{folder}/cut.mp4"
        source = f"testsrc2=s={WIDTH}x{HEIGHT}:r={FPS}:d=30"
        how = ["-c:v", "libx264", "-g", "250", "-pix_fmt", "yuv420p"]
        subprocess.run([*quiet, "-f", "lavfi", "-i", source, *how, whole], check=True)
        subprocess.run([*quiet, "-ss", "20", "-i", whole, "-c", "copy", cut], check=True)
        return Path(cut).read_bytes()


def write_shards(folder: Path, samples: list[tuple[str, bytes, dict]], *, per_shard: int) -> list[dict]:
    """Write samples (key, video, changed facts) as the builder would, and return the commit records of the shards."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    usual = {"frames": FRAMES, "fps": float(FPS), "width": WIDTH, "height": HEIGHT, "duration_s": FRAMES / FPS}
    records = []
    for number in range(-(-len(samples) // per_shard)):
        writer = ShardWriter(folder, number=number, file=f"shards/x-train-{number:06d}.tar", split="train")
        for key, video, stored in samples[number * per_shard : (number + 1) * per_shard]:
            writer.write(SampleRecord(key, video, "mp4", {"stored": usual | stored, "group": key, "labels": {}}))
        writer.commit(plan="benchmark")
        records.append(read_record(folder, number, plan="benchmark"))
    write_manifest(folder, records, [], name="x", spec={}, tools={})
    return records


def encode(look: int, *, frames: int = FRAMES) -> bytes:
    sink = io.BytesIO()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(sink, "w", format="mp4") as container:
        options = {"crf": "20", "g": "12", "preset": "ultrafast", "threads": "1", "x264-params": "open-gop=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for n in range(frames):
            picture = np.stack([(x * 3 + n * 5 + look * 30) % 256, (y * 4 + n) % 256, (x + y + look) % 256], axis=-1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return sink.getvalue()


def settings(folder: Path, **more) -> Data:
    return Data(sources=(Source(shards=str(folder)),), clip=Clip(frames=4, fps=4), crop=Crop(px=32), **more)


def first(args: argparse.Namespace) -> None:
    """Time the first batch in fresh processes: the corpus is 1,000 samples in a shard, linked under many names."""
    folder = args.work / "first"
    if not (folder / "manifest.json").exists():
        (record,) = write_shards(folder, [(f"k{n:04d}", encode(n % 8), {}) for n in range(1000)], per_shard=1000)
        records = []
        for number in range(args.samples // 1000):
            rows = [{**row, "key": f"k{number:06d}-{row['key']}"} for row in record["samples"]]
            again = {**record, "file": f"shards/x-train-{number:06d}.tar", "samples": rows}
            if number:
                os.link(folder / record["file"], folder / again["file"])
            records.append(again)
        write_manifest(folder, records, [], name="x", spec={}, tools={})
    for step in (0, 0, 0, 100_000, 100_000, 100_000):
        command = [sys.executable, __file__, "one", "--work", args.work, "--step", str(step)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        print(f"step {step:6}: {said}")


def one(args: argparse.Namespace) -> None:
    """Open the loader at a step and take a batch, without a worker, then with one, which must start first."""
    for workers in (0, 1):
        began = time.perf_counter()
        with ClipLoader(
            settings(args.work / "first"), Loader(workers=workers), seed=0, batch_size=64, step=args.step
        ) as b:
            opened = time.perf_counter()
            batch = next(b)
            took = time.perf_counter() - began
            assert batch.step == args.step
            print(
                f"{workers} workers: first batch of {len(batch)} after {took:.2f} s ({opened - began:.2f} s to open);",
                end=" ",
            )


if __name__ == "__main__":
    main()
