"""Checkpoints in an object store, through its protocol: committed by the last object, whatever goes wrong."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_weights
from object_store import ObjectStore, Trouble

from vjepa.checkpoints import checkpoint, storage
from vjepa.checkpoints.checkpoint import CheckpointMetadata, step_of
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.cli import main
from vjepa.config import Checkpoint, Run
from vjepa.distributed.world import World, join
from vjepa.engine.trainer import train
from vjepa.methods.vjepa2.method import VJEPA2
from vjepa.weights.load import read_weights
from vjepa_data.corpus import remote
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]
HOME = "s3://bucket/runs/x"


@pytest.fixture
def store(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty store behind `s3://`. Ranks write to a local folder before they upload."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return s3


@pytest.fixture
def world(tiny_run: MakeRun) -> Iterator[World]:
    with join(tiny_run().parallel) as world:
        yield world


def facts(step: int) -> CheckpointMetadata:
    return CheckpointMetadata(step, 1, {"name": "x"}, "hash", ["corpus"], "id", {"vjepa": "0"}, ((2, 3),))


def save(saver: CheckpointManager, step: int) -> None:
    saver.save({"target.weight": torch.full((300,), float(step))}, facts(step))
    saver.wait()


def names(store: ObjectStore) -> set[str]:
    return {name.removeprefix("bucket/runs/x/").partition("/")[0] for name in store.objects}


@pytest.mark.parametrize("background", [False, True])
def test_loaded_tensors_equal_saved_tensors_and_old_checkpoints_go(
    store: ObjectStore, world: World, tmp_path: Path, background: bool
) -> None:
    settings = Checkpoint(folder=HOME, background=background, milestones=(2,))
    saver = CheckpointManager(tmp_path, settings, world)
    for step in range(1, 6):
        save(saver, step)
    assert names(store) == {"step_00000002", "step_00000004", "step_00000005", "latest"}
    assert store.objects["bucket/runs/x/latest"] == b"step_00000005\n"
    home = checkpoint.checkpoint_dir(tmp_path, settings)
    newest = checkpoint.find_newest(home, world)
    assert newest is not None
    assert str(newest) == f"{HOME}/step_00000005"
    assert checkpoint.read_metadata(newest) == facts(5)
    tensor = torch.zeros(300)
    checkpoint.load_into({"target.weight": tensor}, newest, world)
    assert tensor.eq(5).all()
    assert load_weights(newest)["weight"].eq(5).all()
    assert not list(tmp_path.glob("vjepa-checkpoint-*"))


def test_files_larger_than_one_request_arrive_whole(store: ObjectStore, tmp_path: Path) -> None:
    data = torch.randint(256, (110_000_000,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", storage.to_path(f"{HOME}/large"))
    assert store.objects["bucket/runs/x/large"] == data
    assert store.count(method="POST") == 2  # its parts were announced, and put together


def test_a_checkpoint_without_its_last_object_is_removed(
    store: ObjectStore, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Checkpoint(folder=HOME)
    saver = CheckpointManager(tmp_path, settings, world)
    save(saver, 1)
    store.trouble = lambda asked: (
        Trouble(status=403) if asked.method == "PUT" and asked.key.endswith("state.json") else None
    )
    with pytest.raises(OSError, match=r"could not be written: rank 0: .*"):
        save(saver, 2)
    assert "bucket/runs/x/step_00000002/__0_0.distcp" in store.objects
    store.trouble = lambda asked: None
    home = checkpoint.checkpoint_dir(tmp_path, settings)
    assert checkpoint.find_newest(home, world) == home / "step_00000001"
    CheckpointManager(tmp_path, settings, world)
    assert names(store) == {"step_00000001", "latest"}


def test_a_busy_store_is_retried_and_a_refusal_is_an_error(
    store: ObjectStore, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = CheckpointManager(tmp_path, Checkpoint(folder=HOME), world)
    # s3fs tries a few times by itself, before we do.
    store.trouble = lambda asked: (
        Trouble(status=503) if asked.method == "PUT" and "retrying" not in caplog.text else None
    )
    with caplog.at_level(logging.DEBUG, remote.__name__):
        save(saver, 1)
    assert "retrying" in caplog.text
    assert checkpoint.latest(checkpoint.checkpoint_dir(tmp_path, saver.settings)) is not None

    store.trouble = lambda asked: Trouble(status=503)
    monkeypatch.setattr(remote, "OUTAGE_LIMIT_S", 0.5)
    with pytest.raises(BadInput, match=r"was unreachable for .* then resume"):
        checkpoint.list_checkpoints(saver.home)
    store.trouble = lambda asked: Trouble(status=403)
    with pytest.raises(BadInput, match=r"cannot be read .*credentials"):
        checkpoint.list_checkpoints(saver.home)


def test_a_damaged_checkpoint_is_set_aside_but_not_in_an_outage(
    store: ObjectStore, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointManager(tmp_path, Checkpoint(folder=HOME), world)
    for step in (1, 2):
        save(saver, step)
    monkeypatch.setattr(remote, "OUTAGE_LIMIT_S", 0.5)
    store.trouble = lambda asked: Trouble(status=503) if asked.key.endswith(".distcp") else None
    with pytest.raises(BadInput, match="was unreachable"):
        checkpoint.find_newest(saver.home, world)
    store.trouble = lambda asked: None
    store.flip("bucket/runs/x/step_00000002/__0_0.distcp", -1)
    assert checkpoint.find_newest(saver.home, world) == saver.home / "step_00000001"
    assert "bucket/runs/x/step_00000002/damaged_state.json" in store.objects
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(saver.home)] == [1]
    save(CheckpointManager(tmp_path, saver.settings, world), 2)
    assert checkpoint.find_newest(saver.home, world) == saver.home / "step_00000002"


def test_a_run_goes_on_from_a_store_and_is_verified_there(
    store: ObjectStore, tiny_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_run(), tmp_path / "disk") == 0
    assert train(tiny_run(steps=3, checkpoint={"folder": HOME}), tmp_path / "store") == 0
    assert train(tiny_run(checkpoint={"folder": HOME, "background": True}), tmp_path / "store") == 0
    ours, theirs = (load_weights(tmp_path / name) for name in ("store", "disk"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (note,) = (tmp_path / "store" / "checkpoints").iterdir()
    assert (note.name, note.read_text()) == ("step_00000006", f"{HOME}/step_00000006\n")
    assert main(["verify", str(tmp_path / "store")]) == 0
    assert "2 checkpoints: 0 problems" in capsys.readouterr().out
    exported = (read_weights(tmp_path / name) for name in ("store", "disk"))
    assert all(torch.equal(*tensors) for tensors in zip(*(w.encoder().parameters() for w in exported), strict=True))
    elsewhere = tiny_run(checkpoint={"folder": "s3://bucket/runs/y"})
    with pytest.raises(BadInput, match=r"runs/y holds no checkpoint of this run, but .*step_00000006 says"):
        train(elsewhere, tmp_path / "store")
    store.flip("bucket/runs/x/step_00000003/__0_0.distcp", -1)
    assert main(["verify", str(tmp_path / "store")]) == 1
    assert "has changed since it was written" in capsys.readouterr().out


def test_a_roll_back_in_a_store_equals_a_roll_back_on_a_disk(
    store: ObjectStore, tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = VJEPA2.loss

    def of_bad_data(method: Any, networks: Any, inputs: Any, *, step: int) -> Any:
        loss = loss_of(method, networks, inputs, step=step)
        return replace(loss, value=loss.value * float("nan")) if inputs[0].step in (4, 5) else loss

    monkeypatch.setattr(VJEPA2, "loss", of_bad_data)
    health = {"max_skipped_in_a_row": 2, "after_roll_back": "pass_over"}
    often = {"every_steps": 1, "keep_last": 9}
    for name, checkpoints in (("disk", often), ("store", {**often, "folder": HOME})):
        run = tiny_run(steps=7, health=health, track={"every_steps": 1}, checkpoint=checkpoints)
        assert train(run, tmp_path / name) == 0
    assert (tmp_path / "store" / "passed_over.json").read_text() == "[[4, 2]]\n"
    # The checkpoint of step 5 was of a skipped step. When the step was repeated, it was written again.
    assert [step_of(path) for path in checkpoint.list_checkpoints(storage.to_path(HOME))] == [1, 2, 3, 4, 5, 6, 7]
    assert "bucket/runs/x/step_00000005/unhealthy_state.json" in store.objects
    ours, theirs = (load_weights(tmp_path / name) for name in ("store", "disk"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (note,) = (tmp_path / "store" / "checkpoints").iterdir()
    assert note.name == "step_00000007"
