"""The old place of `vjepa.nn.positions`."""

from vjepa.nn.positions import sine_cosine as sine_cosine
