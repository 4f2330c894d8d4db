"""A real SLURM for these tests. They are skipped where it cannot run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mini_slurm
import pytest

NODES, CPUS = 2, 64


class Slurm:
    """A running cluster in a folder."""

    def __init__(self, folder: Path, proctrack: str) -> None:
        self.folder, self.proctrack = folder, proctrack
        self.mini = mini_slurm

    def up(self, *, preempt_signal: bool = True) -> None:
        self.mini.up(self.folder, nodes=NODES, cpus=CPUS, preempt_signal=preempt_signal, proctrack=self.proctrack)

    @property
    def nodes(self) -> list[str]:
        return self.mini.node_names(self.folder, NODES, self.proctrack)


@contextmanager
def running(cluster: Slurm) -> Iterator[Slurm]:
    """Start a cluster and direct all SLURM commands to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.mini.down(cluster.folder)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Signals reach only tasks, as on nearly all clusters, if this machine has control groups, else also children."""
    if mini_slurm.missing():
        pytest.skip(f"SLURM cannot run here: {mini_slurm.missing()}")
    proctrack = "linuxproc" if mini_slurm.missing("cgroup") else "cgroup"
    with running(Slurm(tmp_path_factory.mktemp("slurm"), proctrack)) as cluster:
        yield cluster


@pytest.fixture
def linuxproc_slurm(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Signals reach every process that a task has started."""
    if slurm.proctrack == "linuxproc":
        yield slurm
        return
    with running(Slurm(tmp_path_factory.mktemp("slurm"), "linuxproc")) as cluster:
        yield cluster
