"""A real SLURM for these tests, or a reason why not."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

NODES, CPUS = 2, 16


def load_mini_slurm() -> ModuleType:
    """The module beside this file; tests are no package."""
    spec = importlib.util.spec_from_file_location("mini_slurm", Path(__file__).with_name("mini_slurm.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Slurm:
    """The cluster, and what tests do to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mini = load_mini_slurm()

    def up(self, *, preempt_signal: bool = True) -> None:
        self.mini.up(self.folder, nodes=NODES, cpus=CPUS, preempt_signal=preempt_signal)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    reason = cluster.mini.missing()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.folder / "slurm.conf")
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.mini.down(cluster.folder)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
