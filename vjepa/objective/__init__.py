"""What is learned, and from what: one file for each objective, all on the same clips and masks."""

from vjepa.objective.parts import Loss, Models, Puzzle, draw_masks, update_target
from vjepa.objective.vjepa2 import jepa_loss

__all__ = ["Loss", "Models", "Puzzle", "draw_masks", "jepa_loss", "update_target"]
