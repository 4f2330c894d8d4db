"""Temporary files of those who are gone."""

import os
from pathlib import Path

import pytest

from vjepa_data.atomic import remove_leftovers, temporary_name


@pytest.mark.parametrize("host", ["node7", "node7.cluster.local"])
def test_what_the_dead_of_this_machine_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    ours = temporary_name(tmp_path / "a-000001.tar")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # above the largest that Linux gives
        dead = temporary_name(tmp_path / "a-000000.tar")
    elsewhere = tmp_path / f".a-000002.tar.other-{host}.{2**22 + 1}.tmp"
    strange = [tmp_path / ".x.tmp", tmp_path / ".tmp", tmp_path / ".swap.1.tmp"]
    for path in (ours, dead, elsewhere, *strange):
        path.touch()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {ours, elsewhere, *strange}
