"""Compare the loader's CPU time with signals and texts and without, on corpora of the same videos.

    python benchmarks/loader_signals.py --work DIR [--steps 100] [--px 256]

Generated videos of 4 s are sharded twice: alone, and with a state and an action of 7 columns at the frame rate and a
caption. Both loaders take the batches of each step in turn, in random order, so that other work on the machine slows
both alike. CPU time counts this process and both decode workers. 16 frames at 4 fps, crops of `--px`, batches of 8.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_data.builder.shard import shard
from vjepa_data.reader.bench import descendants
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Clip, Crop, Data, Loader, Source
from vjepa_data.signal_spec import SignalSpec
from vjepa_data.spec import Encode, Spec
from vjepa_data.synthetic.physics import write_corpus

COLUMNS = tuple("abcdefg")
STATE = SignalSpec(columns=COLUMNS, units=("1",) * 7, kind="state", flip=(1,) * 7)
ACTION = SignalSpec(columns=COLUMNS, units=("1",) * 7, kind="action", combine="sum", flip=(1,) * 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--px", type=int, default=256)
    args = parser.parse_args()
    prepare(args.work, args.px)
    wanted: dict[str, dict[str, Any]] = {"without": {}, "with": {"signals": ("state", "action"), "texts": ("caption",)}}
    spent: dict[str, list[float]] = {name: [] for name in wanted}
    loaders: dict[str, ClipLoader] = {}
    for name, more in wanted.items():
        source = Source(shards=str(args.work / name))
        data = Data(sources=(source,), clip=Clip(frames=16, fps=4), crop=Crop(px=args.px), **more)
        loaders[name] = ClipLoader(data, Loader(workers=0), seed=0, batch_size=8)
        next(loaders[name])  # starts the decode worker
    pids = descendants(os.getpid()) | {os.getpid()}
    for _ in range(args.steps):
        for name in random.sample([*loaders], len(loaders)):
            before = cpu_ms(pids)
            next(loaders[name])
            spent[name].append((cpu_ms(pids) - before) / 8)
    for name, values in spent.items():
        loaders[name].close()
        print(f"{name:8} {statistics.median(values):6.2f} CPU-ms per clip, mean {statistics.fmean(values):6.2f}")
    ratio = statistics.median(spent["without"]) / statistics.median(spent["with"])
    print(f"clips per CPU second with signals: {ratio:.3f} times the number without (medians)")


def cpu_ms(pids: set[int]) -> float:
    """Return the CPU time of processes by their own clocks. `/proc/PID/stat` counts in steps of 10 ms, too coarse."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids) * 1000  # CPUCLOCK_SCHED, see clock_getcpuclockid(3)


def prepare(work: Path, px: int) -> None:
    """Write the videos and both corpora, unless they are there."""
    if (work / "with" / "manifest.json").exists():
        return
    write_corpus(work / "videos", videos=24, seed=0, px=px, seconds=4)
    (work / "videos" / "labels.csv").unlink(missing_ok=True)
    spec = Spec(encode=Encode(short_side_px=px))
    shard([str(work / "videos")], work / "without", spec=spec, workers=2)
    for video in (work / "videos").glob("**/*.mp4"):
        rows = np.random.default_rng(0).standard_normal((48, 7), dtype=np.float32)
        np.save(video.with_suffix(".state.npy"), rows)
        np.save(video.with_suffix(".action.npy"), rows[:-1])
        video.with_suffix(".caption.txt").write_text(f"a video named {video.stem}")
    spec = spec.model_copy(update={"signals": {"state": STATE, "action": ACTION}, "texts": ("caption",)})
    shard([str(work / "videos")], work / "with", spec=spec, workers=2)


if __name__ == "__main__":
    main()
