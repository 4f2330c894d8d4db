"""How runs are shown, and the orders that people give them."""

import fcntl
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from vjepa_launch import history, status
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.settings import BadInput, Cluster

MACHINE = Cluster(executor="local", tasks_per_node=2)
CONFIG = "name: tiny\nsteps: 4000\n"


def one(run: Path) -> status.RunStatus:
    (found,), warning = status.read_all([run])
    assert warning == ""
    return found


def shown(runs: list[Path]) -> str:
    text = io.StringIO()
    Console(width=200, file=text).print(status.table(status.read_all(runs)[0]))
    return text.getvalue()


def test_a_run_is_shown_from_launch_to_cancellation(rehearsal: Callable[..., DrillRun]) -> None:
    run = rehearsal("--steps", "4000", "--step-s", "0.03", "--every", "10")
    run.launch(MACHINE, config=CONFIG)
    run.wait_for(lambda: run.step() >= 12)
    now = one(run.folder)
    assert (now.state, now.steps, now.attempts, now.job) == ("running", 4000, 1, run.job)
    assert now.step is not None
    assert now.step >= 12
    assert now.checkpoint is not None
    assert now.age_s is not None
    assert now.age_s < 5
    assert now.eta_s is not None
    assert 60 < now.eta_s < 2000  # 4000 steps of 0.03 s and a bit
    assert "running" in shown([run.folder])
    assert status.cancel(run.folder) == f"job {run.job} is cancelled"
    run.wait()
    assert one(run.folder).state == "cancelled"
    assert f"2 ranks on {run.events('start')[0]['nodes'][0]}" in status.describe(run.folder)
    with pytest.raises(BadInput, match="there is nothing to cancel"):
        status.cancel(run.folder)


def test_requeue_saves_and_comes_back(rehearsal: Callable[..., DrillRun]) -> None:
    run = rehearsal("--steps", "100", "--step-s", "0.03", "--every", "1000")
    run.launch(MACHINE, config=CONFIG)
    run.wait_for(lambda: run.step() >= 5)
    told = status.requeue(run.folder)
    assert told is not None
    assert "to come back" in told
    run.wait()
    assert run.outcomes() == ["stopped", "done"]
    assert run.wrong_steps(100) == []
    assert one(run.folder).attempts == 2
    assert status.requeue(run.folder) is None


def test_cancel_after_checkpoint_ends_with_a_checkpoint(rehearsal: Callable[..., DrillRun]) -> None:
    run = rehearsal("--steps", "4000", "--step-s", "0.03", "--every", "1000")
    run.launch(MACHINE, config=CONFIG)
    run.wait_for(lambda: run.step() >= 5)
    assert "save and then to end" in status.cancel(run.folder, after_checkpoint=True)
    run.wait()
    assert one(run.folder).state == "stopped"
    assert history.newest_checkpoint(run.folder) == run.step()


def test_logs_of_every_rank_are_found_and_followed(rehearsal: Callable[..., DrillRun]) -> None:
    run = rehearsal("--steps", "30", "--step-s", "0.03")
    run.launch(MACHINE, config=CONFIG)
    followed = "".join(status.read_log(run.folder, rank=1, follow=True))
    assert "rank 1 done" in followed
    assert "rank 0 done" in "".join(status.read_log(run.folder))
    with pytest.raises(BadInput, match=r"rank 7 .* there are 2 ranks with output"):
        list(status.read_log(run.folder, rank=7))


def test_a_job_that_vanished_is_lost(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5)
    history.append_event(tmp_path, {"event": "launch"})
    assert one(tmp_path).state == "lost"
    history.append_event(
        tmp_path,
        {"event": "end", "outcome": "failed", "requeue": False, "reason": "rank 1 on n2: exit code 1", "why": "x"},
    )
    assert (one(tmp_path).state, one(tmp_path).detail) == ("failed", "rank 1 on n2: exit code 1; x")


def test_a_trainer_started_by_hand_is_seen_by_its_lock(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5)
    (tmp_path / "launch" / "job.json").unlink()
    assert one(tmp_path).state == "idle"
    hold = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert one(tmp_path).state == "running"
        with (tmp_path / ".lock").open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # looking did not take it away
        holder.kill()
    assert one(tmp_path).state == "idle"


def test_a_run_that_was_made_by_hand_is_done_after_its_last_step(tmp_path: Path) -> None:
    make_run(tmp_path, steps=20)
    (tmp_path / "launch" / "job.json").unlink()
    assert one(tmp_path).state == "idle"
    (tmp_path / "config.yaml").write_text("name: tiny\nsteps: 20\n")
    assert one(tmp_path).state == "done"
    (tmp_path / "log.txt").write_text("step 20\n")
    assert list(status.read_log(tmp_path)) == ["step 20\n"]
    with pytest.raises(BadInput, match="its one log is of rank 0; leave out --rank 3"):
        list(status.read_log(tmp_path, rank=3))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a run folder"):
        status.describe(tmp_path)


def test_a_hundred_runs_are_listed_within_a_second_and_without_torch(tmp_path: Path) -> None:
    for number in range(100):
        make_run(tmp_path / f"run{number:03d}", steps=1000)
    program = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from vjepa_launch import status
statuses, warning = status.read_all(status.find_runs(Path({str(tmp_path)!r})))
assert len(statuses) == 100 and all(one.step == 1000 for one in statuses)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of its own time: it waits for nothing, and a busy machine proves nothing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def make_run(folder: Path, *, steps: int) -> None:
    """A run folder as a job leaves it."""
    history.launch_folder(folder).mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG + "# a setting\n" * 100)
    history.write_json(history.launch_folder(folder) / "job.json", {"job": "1", "executor": "local", "logs": "-"})
    rows = [{"step": step + 1, "time": 1e9 + step, "loss/prediction": 0.5, "x": "y" * 200} for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints" / f"step_{steps:08d}").mkdir(parents=True)
