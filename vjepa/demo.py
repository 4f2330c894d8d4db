"""The whole path on one machine: raw videos in, an exported encoder and a report out.

Every stage is one of the ordinary verbs, run as a user would run it and printed before it runs. In the middle of
training the process is killed with SIGKILL and started again, and the steps that it repeats are compared bit by bit.
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
from vjepa_data.settings import BadInput

MARK = "made-by-vjepa-demo"

# How the two kinds of videos are sharded: small, since the demo's model sees small pictures.
CORPUS = ("name=physics", "encode.short_side_px=64", "split.val_share=0.25")
OWN_VIDEOS = ("encode.short_side_px=64", "cut.kind=fixed", "cut.length_s=4")


def demo(out: Path, *, videos: Path | None = None, overrides: Sequence[str] = ()) -> int:
    """Shard, pretrain, kill, resume, export, probe, report.

    Args:
        out: folder to work in; what an earlier demo left there is replaced.
        videos: folder of the user's own videos; by default physics scenes are generated, with labels to probe.
        overrides: settings of the run, `steps=200` for example.

    Raises:
        BadInput: `out` holds something that no demo made, or a setting does not fit.
    """
    corpus, shards, folder, model = out / "videos", out / "shards", out / "run", out / "model"
    settings = [f"data.sources=[{{shards: {json.dumps(str(shards))}}}]", *overrides]
    run = load("demo", settings).settings
    _clear(out)
    started = time.perf_counter()
    if videos is None:
        _say("Real mp4 files of generated physics scenes, each with its labels beside it")
        _vjepa("synthesize", "--out", corpus)
    _say("Raw videos to shards: canonical H.264, decode-checked, with an index")
    _vjepa("shard", videos or corpus, "--out", shards, *(CORPUS if videos is None else OWN_VIDEOS))
    _say("Pretraining, killed in the middle and started again")
    _train_through_a_kill(run, folder, ["train", "demo", "--out", folder, *settings])
    _say("Export to Hugging Face format, loaded back by transformers and compared")
    _vjepa("export", folder, "--out", model, "--format", "hf")
    if videos is None:
        _say("A small probe on frozen features, beside its baselines")
        _vjepa("eval", "probe", model, shards, "--out", folder / "probe.json")
    else:
        _say("No labels came with these videos, so there is nothing to probe: the probe is left out")
    _say("Report")
    _vjepa("report", folder, "--out", out / "report.html")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look at {out / 'report.html'}")
    return 0


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise BadInput(f"{out} is not empty and no demo made it; give another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _command(words: Sequence[str | Path]) -> list[str]:
    print(f"$ vjepa {shlex.join(str(word) for word in words)}", flush=True)
    return [sys.executable, "-m", "vjepa", *map(str, words)]


def _vjepa(*words: str | Path) -> None:
    code = subprocess.run(_command(words)).returncode
    if code:
        raise SystemExit(code)


def _train_through_a_kill(run: Run, folder: Path, words: Sequence[str | Path]) -> None:
    """Train to the end, with one SIGKILL between two checkpoints, and say whether the repeated steps were the same."""
    every, enough = run.checkpoint.every_steps, run.checkpoint.every_steps + 2 * run.track.every_steps
    if enough > run.steps:
        _vjepa(*words)
        print(f"-- too short to be interrupted: {run.steps} steps, with a checkpoint every {every}", flush=True)
        return
    first = subprocess.Popen(_command(words), start_new_session=True)
    while first.poll() is None and _last_step(folder) < enough:
        time.sleep(0.1)
    if first.poll() is None:
        os.killpg(first.pid, signal.SIGKILL)
    if first.wait() > 0:
        raise SystemExit(first.returncode)
    before = _losses(folder)
    print(
        f"-- killed with SIGKILL after step {max(before)}; the same command goes on from the last checkpoint",
        flush=True,
    )
    _vjepa(*words)
    after = _losses(folder)
    repeated = [step for step in before if step > every and step in after]
    worst = max((abs(before[step] - after[step]) for step in repeated), default=float("nan"))
    verdict = "bit-identical" if worst == 0 else f"different by at most {worst:.1e}"
    print(
        f"-- steps {min(repeated)} to {max(repeated)} were run twice, before and after the kill: {verdict}", flush=True
    )


def _losses(folder: Path) -> dict[int, float]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {one["step"]: one["loss/prediction"] for one in records if "loss/prediction" in one}


def _last_step(folder: Path) -> int:
    return max(_losses(folder), default=0)
