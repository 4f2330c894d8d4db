"""Checkpoints are written whole or not at all, and pruned, without models."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import facts, flip_a_bit, saved

from vjepa.checkpoints import manager as module
from vjepa.checkpoints.checkpoint import CheckpointMetadata, find_newest, list_checkpoints, step_dir, step_of
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.config import Checkpoint, Run
from vjepa.distributed.world import World

MakeRun = Callable[..., Run]


def test_a_save_that_was_cut_short_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 2))
    part = tmp_path / "checkpoints" / ".step_00000002.part"
    shutil.copytree(step_dir(tmp_path / "checkpoints", 1), part)
    assert find_newest(tmp_path / "checkpoints", world) == step_dir(tmp_path / "checkpoints", 1)
    saved(tmp_path, world, range(2, 3))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_the_last_few_and_every_nth_are_kept(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 8), keep_last=2, keep_every_steps=3)
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [3, 6, 7]
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        Checkpoint(keep_last=1)


def test_milestones_and_the_last_two_intact_checkpoints_stay(world: World, tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    saver = CheckpointManager(tmp_path, Checkpoint(every_steps=2, milestones=(1, 5)), world)
    assert [step for step in range(1, 8) if saver.is_due(step)] == [1, 2, 4, 5, 6]
    saved(tmp_path, world, range(1, 4), milestones=(1,))
    assert [step_of(path) for path in list_checkpoints(home)] == [1, 2, 3]
    flip_a_bit(step_dir(home, 1))
    flip_a_bit(step_dir(home, 3))
    saved(tmp_path, world, range(4, 5), milestones=(1,))  # another attempt: it has not seen the third written
    assert [step_of(path) for path in list_checkpoints(home)] == [1, 2, 3, 4]
    saved(tmp_path, world, range(5, 6), milestones=(1,))
    assert [step_of(path) for path in list_checkpoints(home)] == [1, 4, 5]


def test_the_resumed_checkpoint_is_not_read_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, world, range(1, 3))
    saver = CheckpointManager(tmp_path, Checkpoint(), world, newest=find_newest(tmp_path / "checkpoints", world))
    monkeypatch.setattr(module, "find_corruption", lambda path: pytest.fail(f"{path} was read again"))
    save_and_wait(saver, facts(3))
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [2, 3]


def test_the_old_checkpoint_survives_a_failed_save(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saved(tmp_path, world, range(1, 2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_synced", full)
    for background in (False, True):
        saver.settings = Checkpoint(background=background)
        with pytest.raises(OSError, match="No space left"):
            save_and_wait(saver, facts(2 + background))
    assert find_newest(tmp_path / "checkpoints", world) == step_dir(tmp_path / "checkpoints", 1)


def test_slices_that_cannot_be_written_are_an_error_of_the_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    for background in (False, True):
        saver = CheckpointManager(tmp_path, Checkpoint(background=background), world)
        with pytest.raises(OSError, match=r"could not be written: rank 0: .*No space left"):
            save_and_wait(saver, facts(1))
    assert list_checkpoints(tmp_path / "checkpoints") == []


def save_and_wait(saver: CheckpointManager, of: CheckpointMetadata) -> None:
    saver.save({"target.weight": torch.ones(3)}, of)
    saver.wait()


def test_a_full_disk_is_said_though_the_writer_says_something_else(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match=r"could not be written: rank 0: No space left on device") as caught:
        saved(tmp_path, world, range(1, 2))
    assert caught.value.errno == errno.ENOSPC
