"""Run the complete pipeline on a single machine: raw videos in, an exported encoder and a report out.

Every stage is an ordinary verb, started as a user would start it and printed before it runs. During training the
process is killed with SIGKILL and started again, and the repeated steps are compared bit by bit.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vjepa.config import Run, load
from vjepa_data.errors import BadInput

MARK = "made-by-vjepa-demo"
"""File that marks a folder as the output of a demo, which the next demo may replace."""

# Settings of the two kinds of shards. Videos are stored small, since the demo's model takes small frames.
CORPUS = ("name=physics", "encode.short_side_px=64", "split.val_share=0.25")
OWN_VIDEOS = ("encode.short_side_px=64", "cut.kind=fixed", "cut.length_s=4")


def demo(out: Path, *, videos: Path | None = None, overrides: Sequence[str] = ()) -> int:
    """Shard, pretrain, kill, resume, export, probe, report.

    Args:
        out: folder to work in. The output of an earlier demo is replaced.
        videos: folder of the user's own videos. By default physics scenes are generated, with labels to probe.
        overrides: settings of the run, such as `steps=200`.

    Raises:
        BadInput: `out` holds files that are not from a demo, or a setting is invalid.
    """
    corpus, shards, run_folder, model = out / "videos", out / "shards", out / "run", out / "model"
    settings = [f"data.sources=[{{shards: {json.dumps(str(shards))}}}]", *overrides]
    run = load("demo", settings).settings
    _clear(out)
    started = time.perf_counter()
    stages = 6 if videos is None else 5
    if videos is None:
        _print_stage(1, stages, "Generate physics scenes as mp4 files with labels")
        _run_verb("synthesize", "--out", corpus)
    _print_stage(stages - 4, stages, "Convert raw videos to shards: canonical H.264, decode-checked, indexed")
    _run_verb("shard", videos or corpus, "--out", shards, *(CORPUS if videos is None else OWN_VIDEOS))
    _print_stage(stages - 3, stages, "Pretrain, with a SIGKILL and a restart in the middle")
    _train_through_a_kill(run, run_folder, ["train", "demo", "--out", run_folder, *settings])
    _print_stage(stages - 2, stages, "Export to the Hugging Face format, load with transformers and compare")
    _run_verb("export", run_folder, "--out", model, "--format", "hf")
    if videos is None:
        _print_stage(stages - 1, stages, "Fit linear probes on frozen features, compared with baselines")
        _run_verb("eval", "probe", model, shards, "--out", run_folder / "probe.json")
    else:
        _print_stage(stages - 1, stages, "Skip the probe: your videos have no labels")
    _print_stage(stages, stages, "Write the report")
    _run_verb("report", run_folder, "--out", out / "report.html")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Open {out / 'report.html'}")
    return 0


def demo_world(out: Path, world: str, *, episodes: int = 40, overrides: Sequence[str] = ()) -> int:
    """Simulate films with actions, shard, learn an encoder with its dynamics, plan, report.

    Args:
        out: folder to work in. The output of an earlier demo is replaced.
        world: world to learn. Its run file is `lewm_WORLD`.
        episodes: hard tasks to plan for.
        overrides: settings of the run, such as `steps=200`.

    Raises:
        BadInput: `out` holds files that are not from a demo, the world has no run file, or a setting is invalid.
    """
    films, shards, run_folder, plans = out / "videos", out / "shards", out / "run", out / "plan"
    settings = [f"data.sources=[{{shards: {json.dumps(str(shards))}}}]", "track.wandb=off", *overrides]
    load(f"lewm_{world}", settings)
    _clear(out)
    started = time.perf_counter()
    _print_stage(1, 4, "Simulate episodes: films, and actions between their frames")
    _run_verb("synthesize", world, "--out", films, "--videos", "2000")
    _print_stage(2, 4, "Convert films and actions to shards")
    _run_verb("shard", films, "--spec", films / "spec.yaml", "--out", shards)
    _print_stage(3, 4, "Learn an encoder of frames and a predictor of what actions do, from films and actions alone")
    _run_verb("train", f"lewm_{world}", "--out", run_folder, *settings)
    _print_stage(4, 4, "Plan: reach goals that a straight line does not reach, and compare with other agents")
    against = "random,straight,oracle,cloning,shuffled"
    words = ("--world", world, "--episodes", str(episodes), "--against", against, "--out", plans)
    _run_verb("plan", run_folder, *words)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Open {plans / 'report.html'}")
    return 0


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise BadInput(f"{out} is not empty and not from a demo; give another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _print_stage(number: int, stages: int, text: str) -> None:
    print(f"\n== {number} of {stages}: {text}", flush=True)


def _print_command(words: Sequence[str | Path]) -> list[str]:
    print(f"$ vjepa {shlex.join(str(word) for word in words)}", flush=True)
    return [sys.executable, "-m", "vjepa", *map(str, words)]


def _run_verb(*words: str | Path) -> None:
    code = subprocess.run(_print_command(words)).returncode
    if code:
        raise SystemExit(code)


def _train_through_a_kill(run: Run, folder: Path, words: Sequence[str | Path]) -> None:
    """Train to the end with a SIGKILL between two checkpoints, and print whether repeated steps were identical."""
    saved_step = run.checkpoint.every_steps
    kill_step = saved_step + 2 * run.track.every_steps
    if kill_step > run.steps:
        _run_verb(*words)
        print(f"-- not interrupted: {run.steps} steps are too few for a checkpoint every {saved_step}", flush=True)
        return
    process = subprocess.Popen(_print_command(words), start_new_session=True)
    while process.poll() is None and _last_step(folder) < kill_step:
        time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait() > 0:
        raise SystemExit(process.returncode)
    before = _read_losses(folder)
    print(f"-- killed with SIGKILL after step {max(before)}; the same command resumes from the checkpoint", flush=True)
    _run_verb(*words)
    after = _read_losses(folder)
    repeated = [step for step in before if step > saved_step and step in after]
    worst = max((abs(before[step] - after[step]) for step in repeated), default=float("nan"))
    verdict = "bit-identical" if worst == 0 else f"different by at most {worst:.1e}"
    print(f"-- losses of steps {min(repeated)} to {max(repeated)}, before and after the kill: {verdict}", flush=True)


def _read_losses(folder: Path) -> dict[int, float]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss/total"] for record in records if "loss/prediction" in record}


def _last_step(folder: Path) -> int:
    return max(_read_losses(folder), default=0)
