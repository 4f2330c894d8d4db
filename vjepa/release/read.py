"""The old place of `vjepa.weights.load`."""

from vjepa.weights.load import load_encoder as load_encoder
from vjepa.weights.load import read_weights as read_weights
