"""Scripts of version 0.1 find the functions that have moved since."""

from pathlib import Path

from vjepa.model.grid import Grid
from vjepa.model.layers import sine_cosine
from vjepa.nn import grid, positions
from vjepa.release.read import read_weights
from vjepa.weights import load


def test_old_modules_hold_the_functions_of_the_new(trained: Path) -> None:
    assert (Grid, sine_cosine, read_weights) == (grid.Grid, positions.sine_cosine, load.read_weights)
    assert read_weights(trained).px == 32
