"""The old place of `vjepa.nn.grid`."""

from vjepa.nn.grid import Grid as Grid
