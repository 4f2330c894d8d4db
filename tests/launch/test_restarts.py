"""Real runs on this machine that are disturbed and restarted."""

import random
import socket
from collections.abc import Callable
from typing import Any

import pytest

from vjepa_launch import history, port
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.settings import BadLaunch, Cluster


def machine(*, ranks: int = 2, **restart: Any) -> Cluster:
    return Cluster.model_validate({"executor": "local", "tasks_per_node": ranks, "restart": restart})


Make = Callable[..., DrillRun]


def test_a_run_starts_all_ranks_and_finishes(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "20", "--step-s", "0.01")
    run.launch(machine(ranks=3))
    end = run.wait()
    assert (end["outcome"], end["requeue"], end["checkpoint"]) == ("done", False, 20)
    assert run.wrong_steps(20) == []
    assert "rank 2 done" in (run.folder / "launch" / f"{run.job}_2_log.out").read_text()


def test_usr2_requeues_a_run_without_losing_a_step(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "60", "--step-s", "0.03", "--every", "1000")
    run.launch(machine())
    run.wait_for(lambda: run.step() >= 10)
    run.ask_to_return()
    end = run.wait()
    assert run.outcomes() == ["stopped", "done"], run.log()
    assert end["checkpoint"] == 60
    assert run.wrong_steps(60) == []
    assert run.replayed() == 0


def test_usr2_during_the_start_of_a_rank_is_not_lost(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "80", "--step-s", "0.05", "--every", "1000")
    run.launch(machine())
    run.wait_for(lambda: "ranks [0, 1]" in run.log())
    run.ask_to_return()
    assert run.wait()["outcome"] == "done"
    assert run.outcomes()[0] == "stopped"
    assert run.wrong_steps(80) == []


def test_a_run_with_a_killed_rank_resumes_from_its_checkpoint(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "40", "--step-s", "0.03", "--every", "10")
    run.launch(machine())
    run.wait_for(lambda: run.step() >= 15)
    run.kill(1)
    assert run.wait()["outcome"] == "done"
    first, _ = run.events("end")
    assert (first["outcome"], first["requeue"]) == ("failed", True)
    assert "rank 1" in first["reason"]
    assert "SIGKILL" in first["reason"]
    assert run.events("start")[1]["checkpoint"] == 10
    assert run.wrong_steps(40) == []


def test_three_attempts_without_a_checkpoint_end_the_run(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "40", "--step-s", "0.01", "--every", "10")
    run.inject(rank=1, step=15, restarts=100, do="1")
    run.launch(machine())
    end = run.wait()
    # The first attempt leaves a checkpoint at step 10, so it is not one of the three.
    assert [event["progress"] for event in run.events("end")] == [True, False, False, False]
    assert (end["outcome"], end["requeue"]) == ("failed", False)
    assert "failed 3 times in a row without a new checkpoint" in end["why"]


def test_a_run_that_rejects_its_input_is_not_restarted(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "40", "--step-s", "0.01")
    run.inject(rank=1, step=5, restarts=100, do="2")
    run.launch(machine())
    end = run.wait()
    assert (end["outcome"], end["requeue"]) == ("bad_input", False)
    assert len(run.events("start")) == 1


def test_a_run_with_a_stalled_rank_is_restarted(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "30", "--step-s", "0.03", "--every", "10")
    run.inject(rank=1, step=15, restarts=1, do="sleep")
    run.launch(machine(stall_min=0.2))
    assert run.wait()["outcome"] == "done"
    first = run.events("end")[0]
    assert first["outcome"] == "failed"
    assert "no progress" in first["reason"]
    assert "Current thread" in run.log()  # the stacks
    assert run.wrong_steps(30) == []


def test_a_cancelled_run_saves_and_is_not_restarted(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "1000", "--step-s", "0.03", "--every", "1000")
    run.launch(machine())
    run.wait_for(lambda: run.step() >= 5)
    run.cancel()
    end = run.wait()
    assert (end["outcome"], end["requeue"]) == ("cancelled", False)
    assert history.newest_checkpoint(run.folder) == run.step()


def test_a_run_asked_to_stop_saves_and_is_not_restarted(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "1000", "--step-s", "0.03", "--every", "1000")
    run.launch(machine())
    run.wait_for(lambda: run.step() >= 5)
    history.stop_path(run.folder).touch()
    run.ask_to_return()
    end = run.wait()
    assert (end["outcome"], end["requeue"]) == ("stopped", False)
    assert end["checkpoint"] == run.step()


def test_a_second_launch_resumes_with_the_frozen_code(make_drill_run: Make) -> None:
    """A launch into a folder that is in use, or with other settings, is rejected."""
    run = make_drill_run("--steps", "40", "--step-s", "0.03", "--every", "5")
    first = run.launch(machine())
    run.wait_for(lambda: run.step() >= 12)
    with pytest.raises(BadLaunch, match=f"in use by job {run.job}"):
        run.launch(machine())
    run.cancel()
    run.wait()
    with pytest.raises(BadLaunch, match=r"has different settings \(-name: drill; \+name: large\)"):
        run.launch(machine(), config="name: large\n")
    second = run.launch(machine())
    assert second.resumes is not None
    assert second.resumes >= 10
    assert second.code == first.code
    assert run.wait()["outcome"] == "done"
    assert run.wrong_steps(40) == []


def test_changed_code_is_rejected_at_a_restart(make_drill_run: Make) -> None:
    run = make_drill_run("--steps", "2000", "--step-s", "0.02", "--every", "5")
    run.launch(machine())
    run.wait_for(lambda: run.step() >= 6)
    with (run.folder / "code" / "vjepa_launch" / "drill" / "dummy_trainer.py").open("a") as file:
        file.write("# changed\n")
    run.kill(0)
    end = run.wait()
    assert (end["outcome"], end["requeue"]) == ("bad_input", False)
    assert "was changed after it was frozen" in end["reason"]


def test_ranks_get_a_port_that_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    first = port.free_port()
    with socket.socket() as holder:
        holder.bind(("", first))
        holder.listen()
        drawn = iter([first, first, first + 1, first + 2])
        monkeypatch.setattr(random, "choice", lambda _: next(drawn))
        assert port.free_port() > first
