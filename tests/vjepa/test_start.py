"""Checks before a run starts: ranks, paths, frozen code, open files, the lock of the folder and lost checkpoints."""

import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vjepa.checkpoints.run_folder import _lock
from vjepa.config import Run
from vjepa.engine.open_files import allow_open_files
from vjepa.engine.rank_consistency import check_frozen_code
from vjepa.engine.resume import check_changes, check_checkpoints
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]
HERE = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changes", "ranks", "line"),
    [
        ({}, 3, r"the number of ranks \(3\) must divide batch_size \(4\)"),
        ({"data": {"lanes": 2}}, 4, r"the number of ranks \(4\) must divide the 2 lanes"),
        ({"parallel": {"accumulate": 3}}, 2, r"parallel.accumulate \(3\) must divide the 2 clips of each of 2 ranks"),
        ({"parallel": {"replicate": 4}}, 2, r"parallel.replicate \(4\) must divide the number of ranks \(2\)"),
    ],
)
def test_ranks_that_cannot_share_the_work_are_rejected(
    tiny_run: MakeRun, changes: dict[str, object], ranks: int, line: str
) -> None:
    tiny_run().check_ranks(ranks=4)
    with pytest.raises(BadInput, match=line):
        tiny_run(**changes).check_ranks(ranks)


def test_absolute_paths_mean_the_same_in_every_folder(tiny_run: MakeRun) -> None:
    source = {"shards": "corpora/mine", "without": "bad.txt"}
    probe = {"shards": "s3://bucket/probe", "label": "x"}
    run = tiny_run(data={"sources": [source]}, start="runs/old", track={"probe": probe}, checkpoint={"folder": "c"})
    fixed = run.with_absolute_paths()
    assert fixed.data.sources[0].shards == f"{os.getcwd()}/corpora/mine"
    assert (fixed.start, fixed.checkpoint.folder) == (f"{os.getcwd()}/runs/old", f"{os.getcwd()}/c")
    assert fixed.track.probe is not None
    assert fixed.track.probe.shards == "s3://bucket/probe"
    assert fixed.with_absolute_paths() == fixed
    then = run.model_dump(mode="json")
    assert "data.sources.0.without" in check_changes(then, fixed, step=1, manifests=[], manifests_then=[])


def test_code_outside_of_the_frozen_copy_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_frozen_code()  # not launched
    monkeypatch.setenv("VJEPA_CODE", str(tmp_path))
    with pytest.raises(BadInput, match=f"this rank runs vjepa from {HERE} and not the frozen code in {tmp_path}"):
        check_frozen_code()


def test_too_few_open_files_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (130, before[1]))
        allow_open_files(workers=2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(65536, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(
        BadInput, match=r"2 loader workers needs up to 160 open files, and the limit is 40\. Run `ulimit"
    ):
        allow_open_files(workers=2)


def test_the_lock_of_a_shared_folder_honours_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        handle = _lock(tmp_path / "run")
    finally:
        os.umask(before)
    assert handle is not None
    os.close(handle)
    assert stat.S_IMODE((tmp_path / "run" / ".lock").stat().st_mode) == 0o664


def test_a_run_whose_checkpoints_are_lost_does_not_start_over(tmp_path: Path) -> None:
    check_checkpoints(tmp_path, tmp_path / "checkpoints")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "latest").write_text("step_00000020\n")
    with pytest.raises(BadInput, match=r"has no checkpoint, but .*latest records a checkpoint of step 20\. Bring"):
        check_checkpoints(tmp_path, tmp_path / "elsewhere")
