"""Runs of the stand-in trainer on this machine, through submitit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vjepa_launch.drill.drill_run import DrillRun


@pytest.fixture
def rehearsal(tmp_path: Path) -> Iterator[Callable[..., DrillRun]]:
    """Makes rehearsals, and ends what is left of them."""
    made: list[DrillRun] = []

    def make(*options: str) -> DrillRun:
        made.append(DrillRun(tmp_path / f"run{len(made)}", *options))
        return made[-1]

    yield make
    for run in made:
        if run.job and run.is_alive():
            run.cancel()
            run.wait()
