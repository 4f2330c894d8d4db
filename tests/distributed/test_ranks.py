"""Two and four real ranks on gloo: whatever the world, the same run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_weights

from vjepa.checkpoints import checkpoint
from vjepa.config import Run

HERE = Path(__file__).parent
MakeRun = Callable[..., Run]
pytestmark = pytest.mark.timeout(900)  # the fixture runs all scenarios: minutes on two busy cores

STEPS = 20


def jobs_of(make: MakeRun, out: Path) -> dict[str, dict[str, Any]]:
    """Every scenario of this file."""
    shards = make().data.sources[0].shards
    mixed = {
        # Two lengths of clip and masks of unequal size: in one step ranks differ in shapes and in numbers of tokens.
        "data": {"sources": [{"shards": shards}, {"shards": shards, "frames": 2}], "lanes": 4},
        "masks": [
            {"mode": "reference", "blocks": 2, "spatial_scale": [0.2, 0.4], "batch": 2},
            {"mode": "random", "visible_share": 0.3},
        ],
        "parallel": {"accumulate": 1},
    }
    long = {"steps": STEPS, "checkpoint": {"every_steps": 10}}
    jobs: dict[str, dict[str, Any]] = {}

    def add(name: str, scenario: str, world: int, *, more: dict[str, Any] | None = None, **changes: Any) -> None:
        settings = make(**changes).model_dump(mode="json")
        jobs[name] = {
            "scenario": scenario,
            "world": world,
            "out": str(out / name),
            "settings": settings,
            **(more or {}),
        }

    add("one", "trained", 1, **long)
    add("two", "trained", 2, **long)
    add("two in halves", "trained", 2, parallel={"accumulate": 2, "recompute": "selective"})
    add("two again", "trained", 2, **{**long, "checkpoint": {"every_steps": 10, "background": True}})
    add("four", "trained", 4, **long)
    add("hybrid", "trained", 4, **long, parallel={"replicate": 2})
    add("mixed one", "trained", 1, **mixed)
    add("mixed two", "trained", 2, **mixed)
    add("mixed in halves", "trained", 1, **{**mixed, "parallel": {"accumulate": 2}})
    add("stopped", "stopped_by_one", 2)
    add("poisoned", "poisoned_on_one", 2, checkpoint={"every_steps": 1, "keep_last": 9})
    add("odd settings", "odd_settings", 2)
    add("odd code", "odd_code", 2)
    add("odd pixels", "odd_pixels", 2)
    add("asleep", "sleeps_on_one", 2, health={"stall_s": 1, "hang_s": 10})
    add("failed", "fails_on_one", 2, checkpoint={"every_steps": 3, "background": True}, parallel={"timeout_s": 50})
    add("offloaded", "trained", 2, parallel={"offload": True})
    probe = {"shards": shards, "label": "look", "split": "train", "videos": 9, "every_steps": 3}
    add("probed", "trained", 2, track={"probe": probe, "pictures_every_steps": 3})
    add("probed alone", "trained", 1, track={"probe": probe})
    add("inspected", "inspected", 2)
    add("background", "background_save", 2)
    add("background alone", "background_save", 1)
    add("full disk", "full_disk_on_the_first", 2)
    add("three lanes", "trained", 3)
    add("replicas", "trained", 2, parallel={"replicate": 3})
    add("two of three", "trained", 3, batch_size=3, parallel={"timeout_s": 2}, more={"ranks": [0, 1]})
    # Goes on, with two ranks, where four stopped: the folder is that of the scenario before.
    add("moved", "trained", 4, steps=10, checkpoint={"every_steps": 10})
    add("moved on", "trained", 2, **long, more={"folder": str(out / "moved" / "run")})
    return jobs


@pytest.fixture(scope="module")
def runs(tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios, run once."""
    out = tmp_path_factory.mktemp("ranks")
    file = out / "jobs.json"
    file.write_text(json.dumps(list(jobs_of(tiny_run, out).values())))
    # Several ranks with several threads each, on few cores, wait for one another: measured 50 times slower.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "ranks.py", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return out


def answers(runs: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((runs / name).glob("rank_*.json"))]


def results(runs: Path, name: str) -> list[Any]:
    found = answers(runs, name)
    assert all("result" in answer for answer in found), found
    return [answer["result"] for answer in found]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss/prediction"] for record in records(folder)]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_weights(checkpoint.step_dir(folder / "checkpoints", step), "target")


@pytest.mark.parametrize("name", ["two", "four", "hybrid"])
def test_any_world_trains_the_same_run(runs: Path, name: str) -> None:
    assert set(results(runs, name)) == {0}
    one = losses(runs / "one" / "run")
    assert len(one) == STEPS
    assert losses(runs / name / "run") == pytest.approx(one, abs=1e-6)
    assert one[-1] != one[0]
    ours, theirs = weights(runs / name / "run", STEPS), weights(runs / "one" / "run", STEPS)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-4


def test_gradients_of_micro_batches_add_up_before_reduction(runs: Path) -> None:
    assert results(runs, "two in halves") == [0, 0]
    for field in ("loss/prediction", "optim/grad_norm"):
        halves, whole = ([one[field] for one in records(runs / name / "run")] for name in ("two in halves", "two"))
        assert halves == pytest.approx(whole[:6], abs=2e-6), field


def test_background_saves_do_not_change_a_bit(runs: Path) -> None:
    assert losses(runs / "two" / "run") == losses(runs / "two again" / "run")
    ours, theirs = weights(runs / "two again" / "run", STEPS), weights(runs / "two" / "run", STEPS)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_mixed_clips_on_ranks_give_the_gradients_of_one_process(runs: Path) -> None:
    one = records(runs / "mixed one" / "run")
    for name in ("mixed two", "mixed in halves"):
        assert set(results(runs, name)) == {0}
        other = records(runs / name / "run")
        for field in ("loss/prediction", "loss/explained", "loss/mask_0", "loss/mask_1", "optim/grad_norm"):
            assert [r[field] for r in other] == pytest.approx([r[field] for r in one], abs=2e-6), (name, field)


def test_one_rank_that_is_asked_to_stop_stops_all_at_the_same_step(runs: Path) -> None:
    assert results(runs, "stopped") == [75, 75]
    newest = checkpoint.latest(runs / "stopped" / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step_00000004"  # asked before step 4, read one step later


def test_a_bad_number_on_one_rank_skips_the_step_on_all(runs: Path) -> None:
    assert results(runs, "poisoned") == [0, 0]
    folder = runs / "poisoned" / "run"
    assert [record["optim/applied"] for record in records(folder)] == [1, 1, 0, 1, 1, 1]
    second, third, fourth = (weights(folder, step) for step in (2, 3, 4))
    assert all(torch.equal(second[key], third[key]) for key in second)
    assert not all(torch.equal(third[key], fourth[key]) for key in second)


def test_the_next_forward_pass_uses_the_updated_average(runs: Path) -> None:
    for result in results(runs, "inspected"):
        assert result["average"] < 1e-6
        assert result["forward"] < 1e-6
        assert result["gathered"] == []


def test_messages_per_step_stay_as_few_as_they_are(runs: Path) -> None:
    # Units of sharding: the blocks of a network and its root; a large network has several units of blocks. Gathered:
    # all three networks forward (6), and nothing backward, where a small network and the root of a large one stay.
    # Scattered: one per unit that learns. Summed: the numbers of the loss, and the norm of the gradient.
    for result in results(runs, "inspected"):
        assert result["messages"][-1] == {"gather": 6, "scatter": 4, "sum": 2}


def test_a_background_save_keeps_the_weights_of_its_start(runs: Path) -> None:
    assert results(runs, "background") == [True, True]
    assert results(runs, "background alone") == [True]


def test_a_run_goes_on_with_half_the_ranks(runs: Path) -> None:
    assert results(runs, "moved on") == [0, 0]
    assert losses(runs / "moved" / "run") == pytest.approx(losses(runs / "one" / "run"), abs=1e-6)


@pytest.mark.parametrize(("name", "what"), [("settings", "settings"), ("code", "code"), ("pixels", "the first batch")])
def test_a_rank_that_differs_is_named_before_the_first_step(runs: Path, name: str, what: str) -> None:
    found = answers(runs, f"odd {name}")
    assert len(found) == 2
    for answer in found:
        assert answer["kind"] == "BadInput"
        assert f"rank 1 differs from the other ranks in {what} (" in answer["error"]


def test_a_sleeping_rank_is_named_with_its_collective_and_all_end(runs: Path) -> None:
    # Ended by their watchdogs, so that a launcher may start them again; the slower rank sees the other exit.
    assert all("Connection closed" in answer["error"] for answer in answers(runs, "asleep"))
    log = (runs / "asleep" / "run" / "log.txt").read_text()
    assert "rank 1 has not joined gloo:" in log
    assert "in which rank 0 waits" in log
    assert "rank 0: no step for" in log
    assert "doze" in (runs / "asleep" / "run" / "stacks" / "rank_00001.txt").read_text()


def test_an_exception_on_one_rank_ends_all_without_waiting(runs: Path) -> None:
    out = runs / "failed"
    assert json.loads((out / "exit_codes.json").read_text()) == [1, 1]  # -9: rank 1 waited for its peer
    assert not list(out.glob("destroyed_*"))
    peer, own = (json.loads((out / f"error_{rank}.json").read_text())["message"] for rank in (0, 1))
    assert own["message"] == "ValueError: the fifth step failed"
    assert [one["extraInfo"]["is_consequence"] for one in (peer, own)] == [True, False]


def test_an_error_of_rank_0_is_raised_on_all_ranks(runs: Path) -> None:
    found = answers(runs, "full disk")
    assert [answer["error"] for answer in found] == ["[Errno 28] No space left on device"] * 2


def test_offloading_changes_nothing_but_where_the_update_is_made(runs: Path) -> None:
    assert results(runs, "offloaded") == [0, 0]
    assert losses(runs / "offloaded" / "run") == pytest.approx(losses(runs / "two" / "run")[:6], abs=1e-7)


def test_a_probe_scores_the_same_whatever_the_world(runs: Path) -> None:
    assert results(runs, "probed") == [0, 0]
    together, alone = (records(runs / name / "run") for name in ("probed", "probed alone"))
    assert [one["step"] for one in together if "probe/score" in one] == [3, 6]
    assert together[-1]["probe/score"] == pytest.approx(alone[-1]["probe/score"], abs=0.26)  # one of few videos may tip
    assert together[-1]["probe/prior"] == alone[-1]["probe/prior"]
    assert losses(runs / "probed" / "run") == losses(runs / "two" / "run")[:6]
    assert len(list((runs / "probed" / "run" / "pictures").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("three lanes", "the number of ranks (3) must divide"),
        ("replicas", "parallel.replicate (3) must divide the number of ranks (2)"),
    ],
)
def test_worlds_that_do_not_fit_are_refused_on_every_rank(runs: Path, name: str, text: str) -> None:
    for answer in answers(runs, name):
        assert answer["kind"] == "BadInput"
        assert text in answer["error"]


def test_ranks_without_a_missing_rank_all_fail_and_never_train(runs: Path) -> None:
    found = answers(runs, "two of three")
    assert len(found) == 2
    for answer in found:
        assert answer["kind"].startswith("Dist")
    assert not (runs / "two of three" / "run").exists()
