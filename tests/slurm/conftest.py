"""A real SLURM for these tests, or a reason why not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mini_slurm
import pytest

NODES, CPUS = 2, 64


class Slurm:
    """A cluster, and what tests do to it."""

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
    """A cluster that is the one of all commands meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.mini.down(cluster.folder)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Signals reach the tasks alone, as on nearly all clusters, if this machine can do so; else their children too."""
    if mini_slurm.missing():
        pytest.skip(f"no SLURM here: {mini_slurm.missing()}")
    proctrack = "linuxproc" if mini_slurm.missing("cgroup") else "cgroup"
    with running(Slurm(tmp_path_factory.mktemp("slurm"), proctrack)) as cluster:
        yield cluster


@pytest.fixture
def loud_slurm(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Signals reach every process that a task started."""
    if slurm.proctrack == "linuxproc":
        yield slurm
        return
    with running(Slurm(tmp_path_factory.mktemp("slurm"), "linuxproc")) as cluster:
        yield cluster
