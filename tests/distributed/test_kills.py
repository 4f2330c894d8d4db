"""kill -9, at every point of a save and at random moments: the run goes on and ends with the bits it would have had."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_weights

from vjepa.config import Run, load
from vjepa_data.builder.shard import shard
from vjepa_data.spec import Spec
from vjepa_data.worlds.episodes import WORLDS
from vjepa_data.worlds.files import write_episodes

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


def kill_and_compare(
    run: Run,
    out: Path,
    *,
    world: int,
    at_random: int,
    seed: int,
    limit_s: float = 60,
    points: Sequence[tuple[str, int]] = POINTS,
    losses: Sequence[str] = ("prediction", "explained"),
    networks: Sequence[str] = ("target",),
) -> int:
    """Train once in peace and once through kills, `limit_s` at most each. Compare every step's loss and the weights.

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
        {**base, "scenario": "dies_at", "function": function, "call": call} for function, call in points
    ]
    kills += [{**base, "kill_after_s": draws.uniform(0.0, 0.5 * world)} for _ in range(at_random)]
    draws.shuffle(kills)
    run_jobs([peace, *kills, base], out / "jobs.json")
    for name in ("peace", "kills"):
        for rank in range(world):
            answer = json.loads((out / name / f"rank_{rank}.json").read_text())
            assert answer.get("result") == 0, answer
    straight, killed = ((out / name / "run" / "metrics.jsonl").read_text().splitlines() for name in ("peace", "kills"))
    fields = ("step", *(f"loss/{name}" for name in losses), "optim/grad_norm", "optim/lr")
    pairs = [(json.loads(one), json.loads(other)) for one, other in zip(straight, killed, strict=True)]
    different = [(one, other) for one, other in pairs if any(one[field] != other[field] for field in fields)]
    # A sample that was replaced in one of the two would explain it.
    rejected = [file.read_text() for file in out.glob("*/run/rejected.jsonl")]
    assert not different, f"{len(different)} of {len(pairs)} steps differ, the first: {different[0]}; {rejected}"
    for network in networks:
        theirs, ours = (load_weights(out / name / "run", network) for name in ("peace", "kills"))
        assert theirs
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    attempts = json.loads((out / "kills" / "run" / "environment.json").read_text())["attempts"]
    starts = [attempt["step"] for attempt in attempts]
    assert starts == sorted(starts)  # a kill never loses steps that an earlier attempt saved
    return len(attempts)


def test_twenty_kills_change_nothing(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(steps=50, checkpoint={"every_steps": 2}, parallel={"accumulate": 2})
    assert kill_and_compare(run, tmp_path, world=1, at_random=20 - len(POINTS), seed=0) > len(POINTS)


def test_kills_change_nothing_with_actions_and_rollouts(tmp_path: Path) -> None:
    write_episodes(WORLDS["two_room"], tmp_path / "in", episodes=4, seed=0, px=48, frames=12)
    spec = Spec.model_validate(yaml.safe_load((tmp_path / "in" / "spec.yaml").read_text()))
    shard([str(tmp_path / "in")], tmp_path / "corpus", spec=spec, workers=1)
    changes = [
        f"data.sources=[{{shards: {tmp_path / 'corpus'}}}]",
        "data.crop={px: 32, scale: [1, 1], aspect: [1, 1], flip: 0}",
        "loader={workers: 0, decoder: pyav}",
        "checkpoint.every_steps=2",
        "track={wandb: off, every_steps: 1, monitor_every_steps: 4, pictures_every_steps: null}",
    ]
    run = load("lewm_two_room", ["steps=6", "batch_size=4", "optim.warmup_steps=2", *changes]).settings
    attempts = kill_and_compare(
        run,
        tmp_path,
        world=1,
        at_random=0,
        seed=0,
        points=(("digest", 3),),
        losses=("prediction", "rollout", "regularizer", "inverse", "shuffled_actions"),
        networks=("encoder", "dynamics", "inverse"),
    )
    assert attempts == 2


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
