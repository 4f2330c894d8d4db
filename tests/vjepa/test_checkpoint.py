"""Complete and torn checkpoints are told apart, checked and read, without models."""

import json
import logging
import os
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import facts, flip_a_bit, load_weights, saved
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata

from vjepa.checkpoints.checkpoint import (
    digest,
    find_corruption,
    find_newest,
    latest,
    list_checkpoints,
    load_into,
    read_metadata,
    resolve,
    step_dir,
)
from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.weights.sharded import Sharded
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]


def test_loaded_tensors_equal_saved_tensors_with_and_without_ranks(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 4))
    newest = find_newest(tmp_path / "checkpoints", world)
    assert newest is not None
    assert newest == tmp_path / "checkpoints" / "step_00000003"
    assert read_metadata(newest) == facts(3)
    tensor = torch.zeros(300)
    load_into({"target.weight": tensor}, newest, world)
    assert tensor.eq(3).all()
    assert load_weights(tmp_path)["weight"].eq(3).all()
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
    newest = step_dir(tmp_path / "checkpoints", 2)
    break_it(newest)
    assert says in str(find_corruption(newest))
    with caplog.at_level(logging.WARNING):
        assert find_newest(tmp_path / "checkpoints", world) == step_dir(tmp_path / "checkpoints", 1)
    assert says in caplog.text
    assert not newest.exists()
    assert newest.with_name("damaged_step_00000002").exists()
    saved(tmp_path, world, range(2, 3))  # its steps are made again, and saved under the good name
    assert find_newest(tmp_path / "checkpoints", world) == newest


def cut_short(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 3))
    for path in list_checkpoints(tmp_path / "checkpoints"):
        flip_a_bit(path)
    with pytest.raises(BadInput, match="none of the 2 checkpoints"):
        find_newest(tmp_path / "checkpoints", world)
    with pytest.raises(BadInput, match="no complete checkpoint"):
        resolve(tmp_path)
    with pytest.raises(BadInput, match="is damaged"):
        Sharded(step_dir(tmp_path / "checkpoints", 2))


def test_another_format_is_refused_by_name(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 2))
    file = step_dir(tmp_path / "checkpoints", 1) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0, "versions": {"vjepa": "0.0.9"}}))
    with pytest.raises(BadInput, match=r"format 0, this version reads format 1\. It was written with vjepa 0\.0\.9:"):
        read_metadata(step_dir(tmp_path / "checkpoints", 1))


class Trap:
    """A harmful pickle in a checkpoint: unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


class ByName:
    """A value that is pickled as `getattr(owner, name)`, as Python 3.11.0 to 3.11.3 pickle the member of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def rewrite_metadata(path: Path, change: Callable[[Any], None]) -> None:
    """Change the metadata of a checkpoint and its digest, as anyone could, since digests are not signatures."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    state = json.loads((path / "state.json").read_text())
    state["files"][".metadata"] = {"bytes": (path / ".metadata").stat().st_size, "xxh3": digest(path / ".metadata")}
    (path / "state.json").write_text(json.dumps(state))


def test_a_checkpoint_of_python_3_11_2_is_read(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as python_3_11_2:
        python_3_11_2.setattr(Enum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
        saved(tmp_path, world, range(1, 2))
    path = step_dir(tmp_path / "checkpoints", 1)
    assert b"getattr" in (path / ".metadata").read_bytes()
    found = {"target.weight": torch.zeros(300)}
    load_into(found, path, world)
    assert torch.equal(found["target.weight"], Sharded(path)["target.weight"])
    assert found["target.weight"].any()


TRAPS = [
    Trap,
    lambda _: BytesStorageMetadata(),
    lambda _: ByName(torch.Size, "mro"),
    lambda _: ByName(_MEM_FORMAT_ENCODING, "__class__"),
]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_checkpoint_of_strangers_runs_nothing(world: World, tmp_path: Path, trap: Callable[[Path], Any]) -> None:
    saved(tmp_path, world, range(1, 2))
    path = step_dir(tmp_path / "checkpoints", 1)
    rewrite_metadata(path, lambda metadata: setattr(metadata, "planner_data", trap(tmp_path / "fallen into")))
    for read in (
        lambda: load_into({"target.weight": torch.zeros(300)}, path, world),
        lambda: Sharded(path),
    ):
        with pytest.raises(BadInput, match="is not read: that might run foreign code"):
            read()
    assert not (tmp_path / "fallen into").exists()


def test_a_checkpoint_of_another_model_is_one_clear_line(world: World, tmp_path: Path) -> None:
    saved(tmp_path, world, range(1, 2))
    path = step_dir(tmp_path / "checkpoints", 1)
    for tensors, reason in (
        ({"target.weight": torch.zeros(7)}, r"Size mismatch .* for target\.weight"),
        ({"target.bias": torch.zeros(7)}, r"Missing key in checkpoint state_dict: target\.bias"),
    ):
        with pytest.raises(BadInput, match=f"does not hold the model of the settings .*{reason}"):
            load_into(tensors, path, world)
