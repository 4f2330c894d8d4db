"""Files written through `vjepa_data.atomic` are complete or absent."""

import os
from pathlib import Path

import pytest

from vjepa_data.atomic import atomic_file, atomic_write, remove_leftovers, temporary_name


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced(tmp_path: Path, durable: bool) -> None:
    (tmp_path / "a").write_bytes(b"old")
    atomic_write(tmp_path / "a", b"new", durable=durable)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def write_half(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert (path.read_bytes(), temporary_name(path).read_bytes()) == (b"old", b"ne")
        raise RuntimeError("no more data")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="no more data"):
        write_half(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("host", ["node7", "node7.cluster.local"])
def test_only_leftovers_of_ended_local_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    ours = temporary_name(tmp_path / "a-000001.tar")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # above the largest process id of Linux
        leftover = temporary_name(tmp_path / "a-000000.tar")
    elsewhere = tmp_path / f".a-000002.tar.other-{host}.{2**22 + 1}.tmp"
    unrelated = [tmp_path / ".x.tmp", tmp_path / ".tmp", tmp_path / ".swap.1.tmp"]
    for path in (ours, leftover, elsewhere, *unrelated):
        path.touch()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {ours, elsewhere, *unrelated}
