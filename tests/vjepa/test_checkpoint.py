"""Complete and torn checkpoints are told apart, checked and read, without models."""

import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import facts, flip_a_bit, load_weights, saved
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

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
    with pytest.raises(BadInput, match=r"format 0, this version reads format 1; it was written with vjepa 0\.0\.9:"):
        read_metadata(step_dir(tmp_path / "checkpoints", 1))


class Trap:
    """A harmful pickle in a checkpoint: unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("trap", [Trap, lambda _: BytesStorageMetadata()])
def test_a_checkpoint_of_strangers_runs_nothing(world: World, tmp_path: Path, trap: Callable[[Path], Any]) -> None:
    saved(tmp_path, world, range(1, 2))
    path = step_dir(tmp_path / "checkpoints", 1)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = trap(tmp_path / "fallen into")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    state = json.loads((path / "state.json").read_text())  # digests are no signature: a stranger writes them too
    state["files"][".metadata"] = {"bytes": (path / ".metadata").stat().st_size, "xxh3": digest(path / ".metadata")}
    (path / "state.json").write_text(json.dumps(state))
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
        with pytest.raises(BadInput, match=f"holds another model than the settings describe .*{reason}"):
            load_into(tensors, path, world)
