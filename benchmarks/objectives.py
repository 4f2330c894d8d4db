"""Compare methods on the same encoder, videos and FLOPs: pretrain, probe, print a table.

    python benchmarks/objectives.py --out runs/objectives --seeds 3 [--only vjepa2 ...] [--cost 0.4] [key=value ...]

The corpus is written once, as `vjepa demo` writes it. Each objective takes as many steps as the budget of model FLOPs
pays for (`vjepa.estimate`, so reading, decoding and averaging cost nothing). `--only "vjepa2, causal" --cost 1` is
the demo itself. Settings after the options change every recipe, for ablations. Finished parts are not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from vjepa.config import Run, load
from vjepa.demo import CORPUS
from vjepa.estimate.step_counts import count_step

TASKS = ("token centre", "objects", "token shape", "clip velocity", "token direction", "token velocity")

# Sizes are the demo's; a share of the steps where a recipe counts steps. Weights were set once, none was tuned.
VIEWS = "name: levjepa, local_views: 4, local_px: 24, local_scale: [0.1, 0.5], projector: [256, 64], slices: 256"
LEVJEPA = (
    "data.clip.fps=12",
    "objective.masks=[{mode: random, visible_share: 0.5}]",
    "batch_size=32",
    "optim.ema=0.99",
    "optim.final_ema=0.99",
)
# All but the demo's own hide rectangles, through all of time.
RECTANGLE = "{mode: balanced, blocks: 3, block_share: 0.2, visible_share: 0.35}"
RECTANGLES = ("data.clip.fps=12", f"objective.masks=[{RECTANGLE}, {RECTANGLE}]")
RECIPES: dict[str, tuple[str, ...]] = {
    "vjepa2": RECTANGLES,
    "vjepa2, causal": (),
    "vjepa2_1": (
        *RECTANGLES,
        "model.levels=[0, 1, 2, 3]",
        "model.predict_context=true",
        "model.rope=interleaved",
        "objective.name=vjepa2_1",
    ),
    "levjepa, sigreg": (f"objective={{{VIEWS}, regularizer: sigreg, weight: 0.2}}", *LEVJEPA),
    "levjepa, vicreg": (f"objective={{{VIEWS}, regularizer: vicreg, weight: 1.0}}", *LEVJEPA),
    "levjepa, barlow": (f"objective={{{VIEWS}, regularizer: barlow, weight: 0.05}}", *LEVJEPA),
    # As the I-JEPA run file: single frames, four rectangles.
    "stills": (
        "data.clip.fps=12",
        "objective.masks=[{mode: balanced, blocks: 4, block_share: 0.175}]",
        "batch_size=32",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--videos", default="800")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument(
        "--cost", type=float, default=0.4, help="FLOPs, as a multiple of the demo (default: %(default)s)"
    )
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    shards = args.out / "shards"
    if not shards.exists():
        vjepa("synthesize", "--out", args.out / "videos", "--videos", args.videos)
        vjepa("shard", args.out / "videos", "--out", shards, *CORPUS)
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    for seed in range(args.seeds):
        for name in args.only:
            settings = recipe(name, shards, seed, args.cost, args.settings)
            done[name].append(one_run(args.out / f"{name.replace(', ', '_')}_{seed}", settings, shards))
            print(table(done), flush=True)


def recipe(name: str, shards: Path, seed: int, cost: float, settings: list[str]) -> list[str]:
    """Overrides of the demo's run file, with the steps that the budget pays for."""
    demo = load("demo").settings
    source = f"{{shards: {json.dumps(str(shards))}{', frames: 1' if name == 'stills' else ''}}}"
    changes = [f"data.sources=[{source}]", f"seed={seed}", "track.wandb='off'", *RECIPES[name], *settings]
    steps = round(cost * demo.steps * flops(demo) / flops(load("demo", changes).settings))
    changes += [f"steps={steps}", f"optim.warmup_steps={steps // 20}"]
    if name == "vjepa2_1":  # as 15,000 to 30,000 of 135,000
        changes += [f"objective.context_ramp=[{steps // 9}, {2 * steps // 9}]"]
    return changes


def flops(run: Run) -> float:
    """Model FLOPs of a step."""
    return run.batch_size * count_step(run).flops_per_clip


def one_run(run: Path, settings: list[str], shards: Path) -> dict[str, Any]:
    """Train and probe, unless that was done. Return the scores and the cost."""
    found = run / "probe.json"
    if not found.exists():
        seconds = vjepa("train", "demo", "--out", run, *settings)
        (run / "cpu_seconds").write_text(f"{seconds:.0f}")
        vjepa("eval", "probe", run, shards, "--out", found)
    rows = {(row["task"], row["features"]): row for row in json.loads(found.read_text())["rows"]}
    steps = load(run / "config.yaml").settings.steps
    return {"rows": rows, "steps": steps, "cpu_s": float((run / "cpu_seconds").read_text())}


def vjepa(*words: str | Path) -> float:
    """Run a verb in a single thread and return its CPU seconds, including its children."""
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "vjepa", *map(str, words)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def table(done: dict[str, list[dict[str, Any]]]) -> str:
    """Return mean, least and most over seeds: trained and untrained encoders, pixels and the prior."""
    lines = [["objective", "steps", "CPU s", *TASKS], ["---"] * (3 + len(TASKS))]
    some = {name: runs for name, runs in done.items() if runs}
    for name, runs in some.items():
        cost = statistics.mean(run["cpu_s"] for run in runs)
        scores = [spread([run["rows"][task, "pretrained"]["value"] for run in runs]) for task in TASKS]
        lines.append([f"`{name}`", str(runs[0]["steps"]), f"{cost:.0f}", *scores])
    untrained: dict[tuple[str, ...], str] = {}  # most objectives start with the same encoders
    for name, runs in some.items():
        scores = tuple(spread(runs[0]["rows"][task, "random init"]["seeds"]) for task in TASKS)
        untrained[scores] = f"{untrained[scores]}; {name}" if scores in untrained else name
    lines += [[f"untrained ({names})", "0", "", *scores] for scores, names in untrained.items()]
    for name in ("pixels", "prior"):
        first = next(iter(some.values()))[0]["rows"]
        lines.append([name, "", "", *(f"{first[task, name]['value']:.3f}" for task in TASKS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float]) -> str:
    """Mean (least to most)."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
