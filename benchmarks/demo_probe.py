"""Whether the demo's claim holds over seeds: pretrain with each, probe each, one table.

    python benchmarks/demo_probe.py --out runs/demo_probe --seeds 3 [key=value ...]

The corpus is written once, as `vjepa demo` writes it; settings after the options change the recipe, for ablations.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vjepa.demo import CORPUS

ROWS = ("objects", "token centre", "token shape", "token velocity", "token direction")


def vjepa(*words: str | Path) -> float:
    """Run a verb in one thread and return its CPU seconds, those of its children included."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "vjepa", *map(str, words)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--videos", default="800")
    parser.add_argument("--name", default="demo", help="of the variant, for folders")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    videos, shards = args.out / "videos", args.out / "shards"
    if not shards.exists():
        print(f"synthesize {vjepa('synthesize', '--out', videos, '--videos', args.videos):.0f} CPU seconds")
        print(f"shard {vjepa('shard', videos, '--out', shards, *CORPUS):.0f} CPU seconds")
    results = []
    for seed in range(args.seeds):
        run = args.out / f"{args.name}_{seed}"
        settings = [f"data.sources=[{{shards: {json.dumps(str(shards))}}}]", f"seed={seed}", "track.wandb='off'"]
        started = time.perf_counter()
        train = vjepa("train", "demo", "--out", run, *settings, *args.settings)
        middle = time.perf_counter()
        probe = vjepa("eval", "probe", run, shards, "--out", run / "probe.json", "--overwrite")
        print(
            f"seed {seed}: train {train:.0f} CPU seconds, {middle - started:.0f} s; "
            f"probe {probe:.0f} CPU seconds, {time.perf_counter() - middle:.0f} s",
            flush=True,
        )
        results.append(
            {(row["task"], row["features"]): row for row in json.loads((run / "probe.json").read_text())["rows"]}
        )
    for task in ROWS:
        features = [name for of, name in results[0] if of == task]
        print(f"{task:16}", *(f"{name} {spread([one[task, name] for one in results])}" for name in features), sep="  ")


def spread(rows: list[dict]) -> str:
    """Mean, least and most over seeds of pretraining, or over those of the untrained encoder."""
    values = rows[0].get("seeds") or [row["value"] for row in rows]
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
