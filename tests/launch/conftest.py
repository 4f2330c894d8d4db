"""Runs of the dummy trainer on this machine, through submitit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vjepa_launch.drill.drill_run import DrillRun


@pytest.fixture
def make_drill_run(tmp_path: Path) -> Iterator[Callable[..., DrillRun]]:
    """Create runs of the dummy trainer, and cancel the runs that are still alive at the end."""
    created: list[DrillRun] = []

    def make(*options: str) -> DrillRun:
        created.append(DrillRun(tmp_path / f"run{len(created)}", *options))
        return created[-1]

    yield make
    for run in created:
        if run.job and run.is_alive():
            run.cancel()
            run.wait()
