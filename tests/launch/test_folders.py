"""Run folders with unusual names, of several users, moved, copied, purged, or without their checkpoints."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from vjepa_launch import history, snapshot, status, submit
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.plain_path import is_plain, plain_path
from vjepa_launch.request import Request, train_command
from vjepa_launch.settings import BadLaunch, Cluster

MACHINE = Cluster(executor="local", tasks_per_node=1)
ODD = '12:30 50% %j $HOME it\'s "ü" \\ [*]\nx' + os.fsdecode(b"\xe9")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DrillRun:
    """Return a run in a folder with an odd name that has finished on this machine."""
    run = DrillRun(tmp_path_factory.mktemp("runs") / ODD, "--steps", "12", "--step-s", "0.01", "--every", "5")
    run.launch(MACHINE)
    assert run.wait()["outcome"] == "done", run.log()
    return run


def test_a_run_folder_may_have_any_name(finished: DrillRun) -> None:
    assert finished.wrong_steps(12) == []
    assert "rank 0 done" in "".join(status.read_log(finished.folder))
    assert [run.name for run in status.find_runs(finished.folder.parent)] == [ODD]


@pytest.mark.parametrize("name", ["12:30", "50%", "%j", "back\\slash", "line\nbreak", os.fsdecode(b"caf\xe9")])
def test_a_link_replaces_a_path_that_tools_cannot_take(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "run"
    folder.mkdir(parents=True)
    plain = plain_path(folder, create=True)
    assert is_plain(plain)
    assert plain.resolve() == folder
    assert plain_path(folder, create=True) == plain


def test_other_names_need_no_link(tmp_path: Path) -> None:
    folder = tmp_path / "it's $HOME ü `id` [*]"
    assert plain_path(folder, create=True) == folder


@pytest.fixture
def moved(finished: DrillRun, tmp_path: Path) -> Path:
    """Return a copy of the finished run whose original seems to be gone, as after a move."""
    run = tmp_path / "renamed"
    shutil.copytree(finished.folder, run, symlinks=True)
    owner = (run / "launch" / "job.json").read_text()
    (run / "launch" / "job.json").write_text(owner.replace(str(finished.folder.parent).strip("/"), "gone"))
    return run


def test_a_moved_run_shows_its_log_and_resumes(moved: Path) -> None:
    assert status.read_all([moved])[0][0].state == "done"
    assert "rank 0 done" in "".join(status.read_log(moved))
    shutil.rmtree(moved / "checkpoints" / "step_00000012")
    assert submit.launch_again(moved).resumes == 10
    run = DrillRun.of(moved)
    assert run.wait()["checkpoint"] == 12
    assert run.wrong_steps(12) == []


def test_a_copy_does_not_claim_the_job_of_the_original(finished: DrillRun, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy, symlinks=True)
    owner = history.read_owner(copy)
    assert owner is not None
    assert owner["is_copy"]
    assert owner["command"][3] == str(copy)


def test_a_purged_copy_of_the_code_is_named(moved: Path) -> None:
    shutil.rmtree(moved / "code")
    code = moved / "launch" / "code.json"
    code.write_text(code.read_text().replace('"digest": "', '"digest": "0'))
    _, note = submit.freeze_once(moved, False)
    assert note == "the frozen code was missing; the run continues with the current code"


def test_a_rejected_submission_leaves_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run = tmp_path / "12:30"
    with pytest.raises(BadLaunch, match="the job was not submitted"):
        submit.launch(Request(run, Cluster(executor="slurm"), ["python"], config="steps: 1\n", name="tiny"))
    assert list(tmp_path.iterdir()) == []


def request(run: Path, config: str = "name: tiny\nsteps: 20\n") -> Request:
    return Request(run, MACHINE, train_command(run), config=config, name="tiny")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("checkpoints/latest", "step_00000020\n"),
        ("environment.json", '{"attempts": [{"step": 0}, {"step": 10}]}'),
        ("log.txt", "10:00 INFO vjepa.checkpoints.manager: step 20: saved run/checkpoints/step_00000020\n"),
        ("launch/attempts.jsonl", '{"event": "end", "checkpoint": 20}\n'),
    ],
)
def test_a_run_whose_checkpoints_are_lost_does_not_start_over(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(BadLaunch, match=f"has no checkpoint, but .*{Path(file).name} records a checkpoint of step"):
        submit.launch(request(tmp_path))
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    history.check_checkpoints_exist(tmp_path)


def test_a_run_without_a_first_checkpoint_starts_over(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"attempts": [{"step": 0}]}')
    (tmp_path / "log.txt").write_text("INFO step 5/20\n")
    history.check_checkpoints_exist(tmp_path)


def test_a_run_that_went_back_to_step_0_starts_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "unhealthy_step_00000020").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000020\n")
    history.check_checkpoints_exist(tmp_path)


def test_a_run_with_all_its_steps_is_done(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000020").mkdir(parents=True)
    assert submit.done_at(request(tmp_path)) == 20
    assert submit.done_at(request(tmp_path, "name: tiny\nsteps: 40\n")) is None


def test_relative_paths_of_earlier_settings_are_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {sources: [{shards: corpora/mine}]}\n")
    absolute = f"data: {{sources: [{{shards: {Path.cwd()}/corpora/mine}}]}}\n"
    submit.write_config(request(tmp_path, absolute))
    with pytest.raises(BadLaunch, match="has different settings"):
        submit.write_config(request(tmp_path, absolute.replace("mine", "other")))


@pytest.mark.parametrize("mask", [0o002, 0o027])
def test_frozen_code_honours_umask_and_setgid(tmp_path: Path, mask: int) -> None:
    tmp_path.chmod(0o2775)
    before = os.umask(mask)
    try:
        snapshot.freeze(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "code").stat().st_mode) == 0o2777 & ~mask
    assert stat.S_IMODE((tmp_path / "code" / "vjepa" / "config.py").stat().st_mode) == 0o666 & ~mask
