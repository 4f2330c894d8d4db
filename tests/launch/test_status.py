"""The status of runs, their logs, and the commands that cancel and requeue them."""

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

from vjepa_launch import history, slurm, status, submit
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.request import Request
from vjepa_launch.settings import BadLaunch, Cluster

MACHINE = Cluster(executor="local", tasks_per_node=2)
CONFIG = "name: tiny\nsteps: 4000\n"


def read(run: Path) -> status.RunStatus:
    (found,), warning = status.read_all([run])
    assert warning == ""
    return found


def table_text(runs: list[Path]) -> str:
    text = io.StringIO()
    Console(width=200, file=text).print(status.table(status.read_all(runs)[0]))
    return text.getvalue()


def test_the_status_follows_a_run_until_it_is_cancelled(make_drill_run: Callable[..., DrillRun]) -> None:
    run = make_drill_run("--steps", "4000", "--step-s", "0.03", "--every", "10")
    run.launch(MACHINE, config=CONFIG)
    run.wait_for(lambda: run.step() >= 12)
    now = read(run.folder)
    assert (now.state, now.steps, now.attempts, now.job) == ("running", 4000, 1, run.job)
    assert now.step is not None
    assert now.step >= 12
    assert now.checkpoint is not None
    assert now.age_s is not None
    assert now.age_s < 5
    assert now.eta_s is not None
    assert 60 < now.eta_s < 2000  # 4000 steps of 0.03 s and a bit
    assert "running" in table_text([run.folder])
    assert status.cancel(run.folder) == f"job {run.job} is cancelled"
    run.wait()
    assert read(run.folder).state == "cancelled"
    assert f"2 ranks on {run.events('start')[0]['nodes'][0]}" in status.describe(run.folder)
    with pytest.raises(BadLaunch, match="nothing to cancel"):
        status.cancel(run.folder)


def test_requeue_saves_and_resumes(make_drill_run: Callable[..., DrillRun]) -> None:
    run = make_drill_run("--steps", "100", "--step-s", "0.03", "--every", "1000")
    run.launch(MACHINE, config=CONFIG)
    run.wait_for(lambda: run.step() >= 5)
    assert status.requeue(run.folder) == f"job {run.job} will save and be requeued"
    run.wait()
    assert run.outcomes() == ["stopped", "done"]
    assert run.wrong_steps(100) == []
    assert read(run.folder).attempts == 2
    assert status.requeue(run.folder) is None


def test_cancel_after_checkpoint_saves_the_last_step(make_drill_run: Callable[..., DrillRun]) -> None:
    run = make_drill_run("--steps", "4000", "--step-s", "0.03", "--every", "1000")
    run.launch(MACHINE, config=CONFIG)
    run.wait_for(lambda: run.step() >= 5)
    assert "will save and end" in status.cancel(run.folder, after_checkpoint=True)
    run.wait()
    assert read(run.folder).state == "stopped"
    assert history.newest_checkpoint(run.folder) == run.step()


def test_the_log_of_every_rank_can_be_followed(make_drill_run: Callable[..., DrillRun]) -> None:
    run = make_drill_run("--steps", "30", "--step-s", "0.03")
    run.launch(MACHINE, config=CONFIG)
    followed = "".join(status.read_log(run.folder, rank=1, follow=True))
    assert "rank 1 done" in followed
    assert "rank 0 done" in "".join(status.read_log(run.folder))
    with pytest.raises(BadLaunch, match=r"rank 7 .* 2 ranks have output"):
        list(status.read_log(run.folder, rank=7))


def test_a_job_that_ended_without_a_record_is_lost(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5)
    history.append_event(tmp_path, {"event": "launch"})
    assert read(tmp_path).state == "lost"
    history.append_event(
        tmp_path,
        {"event": "end", "outcome": "failed", "requeue": False, "reason": "rank 1 on n2: exit code 1", "why": "x"},
    )
    assert (read(tmp_path).state, read(tmp_path).detail) == ("failed", "rank 1 on n2: exit code 1; x")


def test_a_trainer_started_by_hand_is_detected_by_its_lock(tmp_path: Path) -> None:
    make_run(tmp_path, steps=5)
    (tmp_path / "launch" / "job.json").unlink()
    assert read(tmp_path).state == "idle"
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
        assert read(tmp_path).state == "running"
        with (tmp_path / ".lock").open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the query did not take the lock
        with pytest.raises(BadLaunch, match="is in use by a trainer"):
            submit.launch(Request(tmp_path, MACHINE, ["python"], config=CONFIG, name="tiny"))
        holder.kill()
    assert read(tmp_path).state == "idle"


def test_a_run_by_hand_is_done_after_its_last_step(tmp_path: Path) -> None:
    make_run(tmp_path, steps=20)
    (tmp_path / "launch" / "job.json").unlink()
    assert read(tmp_path).state == "idle"
    (tmp_path / "config.yaml").write_text("name: tiny\nsteps: 20\n")
    assert read(tmp_path).state == "done"
    (tmp_path / "log.txt").write_text("step 20\n")
    assert list(status.read_log(tmp_path)) == ["step 20\n"]
    with pytest.raises(BadLaunch, match="a log of rank 0 only; leave out --rank 3"):
        list(status.read_log(tmp_path, rank=3))


def test_a_run_that_ended_before_its_first_step_is_shown(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("pid 1 on n1\n")
    (tmp_path / "run" / "log.txt").write_text("starting\n")
    assert "idle (it ended before its first step; see its log)" in status.describe(tmp_path / "run")
    assert list(status.read_log(tmp_path / "run")) == ["starting\n"]
    assert status.find_runs(tmp_path) == [tmp_path / "run"]


@pytest.mark.parametrize(
    ("events", "job", "state"),
    [
        (["launch"], None, "cancelled"),
        (["launch"], "CANCELLED", "cancelled"),
        (["launch"], "FAILED", "lost"),
        (["launch", "start"], None, "lost"),
        (["launch", "start"], "TIMEOUT", "failed"),
        (["launch"], "PENDING", "queued"),
        (["launch", "start"], "SUSPENDED", "suspended"),
    ],
)
def test_a_job_without_a_record_of_its_end(tmp_path: Path, events: list[str], job: str | None, state: str) -> None:
    make_run(tmp_path, steps=5)
    owner = {"job": "7", "executor": "slurm", "logs": str(tmp_path / "launch")}
    jobs = {"7": slurm.QueuedJob(job, "reason")} if job else {}
    found, _ = status._state(tmp_path, owner, [{"event": event} for event in events], jobs)
    assert found == state
    done = [{"event": "end", "outcome": "done", "requeue": False}]
    assert status._state(tmp_path, owner, done, None)[0] == "done"  # the scheduler does not answer


@pytest.mark.parametrize("job", ["TIMEOUT", None])
def test_a_setup_longer_than_the_time_limit_is_named(tmp_path: Path, job: str | None) -> None:
    """Before a rank starts, only SLURM's own line tells of the time limit. The line is that of SLURM 22.05."""
    make_run(tmp_path, steps=5)
    owner = {"job": "1", "executor": "local", "logs": str(tmp_path / "logs")}
    history.write_owner(tmp_path, owner)
    line = "slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-30T13:55:48 DUE TO TIME LIMIT ***\n"
    log = history.log_path(tmp_path, 0)
    log.parent.mkdir(exist_ok=True)
    log.write_text("Loading modules\n" + (line if job is None else ""))
    jobs = {owner["job"]: slurm.QueuedJob(job, "(TimeLimit)")} if job else {}
    state, detail = status._state(tmp_path, {**owner, "executor": "slurm"}, [{"event": "launch"}], jobs)
    assert state == "failed"
    assert "time limit ended the job before a rank started; shorten `setup`" in detail


def test_a_folder_that_is_not_a_run_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadLaunch, match="is not a run folder"):
        status.describe(tmp_path)


def test_a_hundred_runs_are_listed_in_a_second_without_torch(tmp_path: Path) -> None:
    for number in range(100):
        make_run(tmp_path / f"run{number:03d}", steps=1000)
    program = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from vjepa_launch import status
statuses, warning = status.read_all(status.find_runs(Path({str(tmp_path)!r})))
assert len(statuses) == 100 and all(run.step == 1000 for run in statuses)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time: it never waits, and wall time would depend on the load of the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def make_run(folder: Path, *, steps: int) -> None:
    """Create a run folder as a job leaves it."""
    history.launch_folder(folder).mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG + "# a setting\n" * 100)
    history.write_owner(folder, {"job": "1", "executor": "local", "logs": "-"})
    rows = [{"step": step + 1, "time": 1e9 + step, "loss/prediction": 0.5, "x": "y" * 200} for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints" / f"step_{steps:08d}").mkdir(parents=True)
