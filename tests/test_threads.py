"""The number of threads: CPU affinity, the cgroup's quota, and the user's own choice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa.threads import SLEEP_WHILE_WAITING, available_cores, configure_threads, cpu_quota


@pytest.fixture
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", *SLEEP_WHILE_WAITING):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/box", {"box/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/box", {"box/cpu.max": "max 100000\n"}, None),
        ("0::/", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("4:cpu,cpuacct:/box", {"cpu/box/cpu.cfs_quota_us": "300000", "cpu/box/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/elsewhere", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1.0),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("7:memory:/box", {"memory/box/cpu.max": "100000 100000"}, None),
    ],
)
def test_the_quota_of_a_cgroup_is_read(cgroup: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    """Versions 1 and 2, limits of a parent, and containers in which the own path does not exist."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    own = tmp_path / "own"
    own.write_text(f"1:name=systemd:/\n{cgroup}\n")
    assert cpu_quota(tmp_path, own) == quota


def test_a_machine_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (1.5, 2), (0.2, 1), (64.0, 4)])
def test_cores_are_limited_by_affinity_and_quota(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("vjepa.threads._siblings", lambda cpu: str(cpu % 4))  # two hyperthreads a core
    monkeypatch.setattr("vjepa.threads.cpu_quota", lambda: quota)
    assert available_cores() == cores


@pytest.mark.usefixtures("no_choice")
def test_a_choice_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    configure_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert not set(SLEEP_WHILE_WAITING) & set(os.environ)


@pytest.mark.usefixtures("no_choice")
def test_torch_takes_the_number_of_threads() -> None:
    code = """
import os, vjepa.threads
vjepa.threads.available_cores = lambda: 1
vjepa.threads.configure_threads()
import torch
assert torch.get_num_threads() == 1, torch.get_num_threads()
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
