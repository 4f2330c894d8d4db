"""The commit protocol, without models: what is complete, what is torn, what is kept."""

import errno
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from vjepa.config import Checkpoint, Run
from vjepa.parallel import World, join
from vjepa.release.sharded import Sharded
from vjepa.run import checkpoint
from vjepa.run.checkpoint import (
    Facts,
    Saver,
    damage,
    digest,
    find_newest,
    latest,
    list_checkpoints,
    load_into,
    read_facts,
)
from vjepa.run.resume import check_changes
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def world(tiny_run: MakeRun) -> Iterator[World]:
    with join(tiny_run().parallel) as world:
        yield world


def facts(step: int) -> Facts:
    return Facts(step, 1, {"name": "x"}, "hash", ["corpus"], "id", {"vjepa": "0"})


def saved(folder: Path, world: World, steps: range, **settings: Any) -> Saver:
    saver = Saver(folder, Checkpoint.model_validate(settings), world)
    for step in steps:
        saver.save(
            {"target.weight": torch.full((300,), float(step)), "optimizer.step.x": torch.tensor(1.0)}, facts(step)
        )
    return saver


def test_what_is_saved_is_what_is_loaded_with_or_without_ranks(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 4))
    newest = find_newest(tmp_path / "checkpoints", world)
    assert newest is not None
    assert newest == tmp_path / "checkpoints" / "step_00000003"
    assert read_facts(newest) == facts(3)
    tensor = torch.zeros(300)
    load_into({"target.weight": tensor}, newest, world)
    assert tensor.eq(3).all()
    assert checkpoint.load_weights(tmp_path)["weight"].eq(3).all()
    assert latest(tmp_path / "checkpoints") == newest


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda path: flip_a_bit(path), "has changed since it was written"),
        (lambda path: cut_short(path), "bytes, not"),
        (lambda path: next(path.glob("*.distcp")).unlink(), "is missing"),
        (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
        (lambda path: (path / "state.json").write_text("{"), "state.json cannot be read"),
        (lambda path: (path / "state.json").unlink(), "state.json cannot be read"),
    ],
)
def test_a_torn_checkpoint_is_skipped_with_a_warning_and_set_aside(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, break_it: Callable[[Path], object], says: str
) -> None:
    saved(tmp_path, world, range(1, 3))
    newest = checkpoint.folder_of(tmp_path / "checkpoints", 2)
    break_it(newest)
    assert says in str(damage(newest))
    with caplog.at_level(logging.WARNING):
        assert find_newest(tmp_path / "checkpoints", world) == checkpoint.folder_of(tmp_path / "checkpoints", 1)
    assert says in caplog.text
    assert not newest.exists()
    assert newest.with_name("damaged_step_00000002").exists()
    saved(tmp_path, world, range(2, 3))  # its steps are made again, and saved under the good name
    assert find_newest(tmp_path / "checkpoints", world) == newest


def flip_a_bit(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut_short(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_quietly_start_anew(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 3))
    for path in list_checkpoints(tmp_path / "checkpoints"):
        flip_a_bit(path)
    with pytest.raises(BadInput, match="none of the 2 checkpoints"):
        find_newest(tmp_path / "checkpoints", world)
    with pytest.raises(BadInput, match="no complete checkpoint"):
        checkpoint.load_weights(tmp_path)
    with pytest.raises(BadInput, match="is damaged"):
        checkpoint.load_weights(checkpoint.folder_of(tmp_path / "checkpoints", 2))


def test_a_save_that_was_cut_short_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 2))
    part = tmp_path / "checkpoints" / ".step_00000002.part"
    shutil.copytree(checkpoint.folder_of(tmp_path / "checkpoints", 1), part)
    assert find_newest(tmp_path / "checkpoints", world) == checkpoint.folder_of(tmp_path / "checkpoints", 1)
    saved(tmp_path, world, range(2, 3))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_the_last_few_and_every_nth_are_kept(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 8), keep_last=2, keep_every_steps=3)
    assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [3, 6, 7]
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        Checkpoint(keep_last=1)


def test_milestones_are_saved_and_kept_and_nothing_goes_while_fewer_than_two_are_intact(
    world: World, tmp_path: Path
) -> None:
    home = tmp_path / "checkpoints"
    saver = Saver(tmp_path, Checkpoint(every_steps=2, milestones=(1, 5)), world)
    assert [step for step in range(1, 8) if saver.is_due(step)] == [1, 2, 4, 5, 6]
    saved(tmp_path, world, range(1, 4), milestones=(1,))
    assert [checkpoint.step_of(path) for path in list_checkpoints(home)] == [1, 2, 3]
    flip_a_bit(checkpoint.folder_of(home, 1))
    flip_a_bit(checkpoint.folder_of(home, 3))
    saved(tmp_path, world, range(4, 5), milestones=(1,))  # another attempt: it has not seen the third written
    assert [checkpoint.step_of(path) for path in list_checkpoints(home)] == [1, 2, 3, 4]
    saved(tmp_path, world, range(5, 6), milestones=(1,))
    assert [checkpoint.step_of(path) for path in list_checkpoints(home)] == [1, 4, 5]


def test_the_checkpoint_that_an_attempt_goes_on_from_is_not_read_again_to_be_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, world, range(1, 3))
    saver = Saver(tmp_path, Checkpoint(), world, newest=find_newest(tmp_path / "checkpoints", world))
    monkeypatch.setattr(checkpoint, "damage", lambda path: pytest.fail(f"{path} was read again"))
    save_and_wait(saver, facts(3))
    assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [2, 3]


def test_a_disk_that_cannot_be_written_to_is_an_error_and_the_old_checkpoint_stays(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = saved(tmp_path, world, range(1, 2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    for background in (False, True):
        saver.settings = Checkpoint(background=background)
        with pytest.raises(OSError, match="No space left"):
            save_and_wait(saver, facts(2 + background))
    assert find_newest(tmp_path / "checkpoints", world) == checkpoint.folder_of(tmp_path / "checkpoints", 1)


def save_and_wait(saver: Saver, of: Facts) -> None:
    saver.save({"target.weight": torch.ones(3)}, of)
    saver.wait()


def test_another_format_is_refused_by_name(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 2))
    file = checkpoint.folder_of(tmp_path / "checkpoints", 1) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0, "versions": {"vjepa": "0.0.9"}}))
    with pytest.raises(BadInput, match=r"format 0, this version reads format 1; it was written with vjepa 0\.0\.9:"):
        read_facts(checkpoint.folder_of(tmp_path / "checkpoints", 1))


class Trap:
    """What a stranger could put into a checkpoint: a folder is made when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("trap", [Trap, lambda _: BytesStorageMetadata()])
def test_a_checkpoint_of_strangers_runs_nothing(world: World, tmp_path: Path, trap: Callable[[Path], Any]) -> None:
    saved(tmp_path, world, range(1, 2))
    path = checkpoint.folder_of(tmp_path / "checkpoints", 1)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = trap(tmp_path / "fallen into")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    state = json.loads((path / "state.json").read_text())  # digests are no signature: a stranger writes them too
    state["files"][".metadata"] = {"bytes": (path / ".metadata").stat().st_size, "xxh3": digest(path / ".metadata")}
    (path / "state.json").write_text(json.dumps(state))
    for read in (
        lambda: load_into({"target.weight": torch.zeros(300)}, path, world),
        lambda: checkpoint.load_weights(path),
        lambda: Sharded(path, {"encoder": "target"}),
    ):
        with pytest.raises(BadInput, match="is not read: that might run foreign code"):
            read()
    assert not (tmp_path / "fallen into").exists()


def test_a_checkpoint_of_another_model_is_one_clear_line(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 2))
    path = checkpoint.folder_of(tmp_path / "checkpoints", 1)
    for tensors, reason in (
        ({"target.weight": torch.zeros(7)}, r"Size mismatch .* for target\.weight"),
        ({"target.bias": torch.zeros(7)}, r"Missing key in checkpoint state_dict: target\.bias"),
    ):
        with pytest.raises(BadInput, match=f"holds another model than the settings describe .*{reason}"):
            load_into(tensors, path, world)


def test_slices_that_cannot_be_written_are_an_error_of_the_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    for background in (False, True):
        saver = Saver(tmp_path, Checkpoint(background=background), world)
        with pytest.raises(OSError, match=r"could not be written: rank 0: .*No space left"):
            save_and_wait(saver, facts(1))
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_full_disk_is_said_though_the_writer_says_something_else(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match=r"could not be written: rank 0: No space left on device") as caught:
        save_and_wait(Saver(tmp_path, Checkpoint(), world), facts(1))
    assert caught.value.errno == errno.ENOSPC


def changes(then: Run, now: Run, *, step: int = 10, manifests: tuple[str, str] = ("a", "a")) -> dict[str, list[object]]:
    return check_changes(
        then.model_dump(mode="json"), now, step=step, manifests=[manifests[1]], manifests_then=[manifests[0]]
    )


def test_changes_that_leave_the_past_alone_are_told_and_others_refused(tiny_run: MakeRun) -> None:
    old = tiny_run(steps=100)
    assert changes(old, old) == {}
    assert changes(old, tiny_run(steps=100, loader={"workers": 4}, parallel={"accumulate": 2})) == {
        "loader.workers": [0, 4],
        "parallel.accumulate": [1, 2],
    }
    moved = tiny_run(steps=100, data={"sources": [{"shards": "/elsewhere"}]})
    assert list(changes(old, moved)) == ["data.sources.0.shards"]
    with pytest.raises(BadInput, match="the corpora changed since step 10"):
        changes(old, moved, manifests=("a", "b"))
    assert changes(old, tiny_run(steps=200)) == {"steps": [100, 200]}
    warm = tiny_run(steps=100, optim={"warmup_steps": 5})
    assert changes(warm, tiny_run(steps=100, optim={"warmup_steps": 5, "start_lr": 0.0, "final_lr": 0.1}))
    for name, change in (
        ("seed", {"seed": 1}),
        ("precision", {"precision": "bf16"}),
        ("optim.lr", {"optim": {"lr": 1.0}}),
        ("optim.decay", {"optim": {"decay": "cosine"}}),
        ("data.crop.px", {"data": {"crop": {"px": 16}}}),
        ("masks.0.blocks", {"masks": [{"mode": "balanced", "blocks": 5, "block_share": 0.15}, old.masks[1]]}),
    ):
        with pytest.raises(BadInput, match=rf"^{name} was .* when step 10 was saved"):
            changes(old, tiny_run(**{"steps": 100, **change}))
