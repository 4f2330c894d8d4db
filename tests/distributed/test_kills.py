"""kill -9, at every point of a save and at random moments: the run goes on and ends with the bits it would have had."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_weights

from vjepa.config import Run

HERE = Path(__file__).parent
MakeRun = Callable[..., Run]

# Where a save can be cut: before it, its files there but no digests, digests but no list, the list but no rename, the
# rename but no `latest`, and in the middle of pruning.
POINTS = (
    ("_fresh", 2),
    ("digest", 3),
    ("_write_synced", 3),
    ("sync_folder", 3),
    ("sync_folder", 4),
    ("os.replace", 2),
    ("shutil.rmtree", 4),
)


def run_jobs(jobs: list[dict[str, Any]], file: Path) -> None:
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "ranks.py", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout, done.stderr[-2000:])


def kill_and_compare(run: Run, out: Path, *, world: int, at_random: int, seed: int, limit_s: float = 60) -> int:
    """Train once in peace and once through kills, `limit_s` at most each; compare every step's loss and the weights.

    Returns:
        Number of attempts that the killed run took.
    """
    draws = random.Random(seed)
    settings = run.model_dump(mode="json")
    peace = {
        "scenario": "trained",
        "world": world,
        "out": str(out / "peace"),
        "settings": settings,
        "limit_s": limit_s,
    }
    base = {**peace, "out": str(out / "kills")}
    kills: list[dict[str, Any]] = [
        {**base, "scenario": "dies_at", "function": function, "call": call} for function, call in POINTS
    ]
    kills += [{**base, "kill_after_s": draws.uniform(0.0, 0.5 * world)} for _ in range(at_random)]
    draws.shuffle(kills)
    run_jobs([peace, *kills, base], out / "jobs.json")
    for name in ("peace", "kills"):
        for rank in range(world):
            answer = json.loads((out / name / f"rank_{rank}.json").read_text())
            assert answer.get("result") == 0, answer
    straight, killed = ((out / name / "run" / "metrics.jsonl").read_text().splitlines() for name in ("peace", "kills"))
    fields = ("step", "loss/prediction", "loss/explained", "optim/grad_norm", "optim/lr")
    pairs = [(json.loads(one), json.loads(other)) for one, other in zip(straight, killed, strict=True)]
    different = [(one, other) for one, other in pairs if any(one[field] != other[field] for field in fields)]
    # A sample that was replaced in one of the two would explain it.
    rejected = [file.read_text() for file in out.glob("*/run/rejected.jsonl")]
    assert not different, f"{len(different)} of {len(pairs)} steps differ, the first: {different[0]}; {rejected}"
    theirs, ours = (load_weights(out / name / "run", "target") for name in ("peace", "kills"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    attempts = json.loads((out / "kills" / "run" / "environment.json").read_text())["attempts"]
    starts = [attempt["step"] for attempt in attempts]
    assert starts == sorted(starts)  # a kill never costs what an earlier attempt had saved
    return len(attempts)


def test_twenty_kills_change_nothing(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(steps=50, checkpoint={"every_steps": 2}, parallel={"accumulate": 2})
    assert kill_and_compare(run, tmp_path, world=1, at_random=20 - len(POINTS), seed=0) > len(POINTS)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("background", [False, True])
def test_hundreds_of_kills_on_two_ranks_change_nothing(tiny_run: MakeRun, tmp_path: Path, background: bool) -> None:
    run = tiny_run(
        steps=400,
        checkpoint={"every_steps": 3, "background": background},
        loader={"workers": 2},
        parallel={"timeout_s": 20},
    )
    attempts = kill_and_compare(run, tmp_path, world=2, at_random=100 - len(POINTS), seed=1, limit_s=600)
    assert attempts > len(POINTS)
