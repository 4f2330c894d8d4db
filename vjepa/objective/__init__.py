"""What is learned, and from what: one file for each objective, all on the same clips and masks."""

import copy
from collections.abc import Sequence

from vjepa.config import VJEPA2, VJEPA21, LeVJEPA, Run
from vjepa.model.attention import Backend
from vjepa.model.encoder import Encoder
from vjepa.model.predictor import Predictor
from vjepa.objective import levjepa, vjepa2, vjepa2_1
from vjepa.objective.parts import Loss, Models, Puzzle, draw_masks, update_target

__all__ = ["Loss", "Models", "Puzzle", "build", "draw_masks", "jepa_loss", "update_target"]


def build(run: Run, *, attention: Backend = "sdpa") -> Models:
    """The networks of the run's objective, with the first weights of its seed unless on the meta device."""
    encoder = Encoder(run.model, seed=run.seed, attention=attention)
    target = copy.deepcopy(encoder).requires_grad_(False)
    if isinstance(run.objective, LeVJEPA):
        hidden, embedding = run.objective.projector
        predictor = levjepa.Projector(run.model.encoder.width, hidden, embedding, seed=run.seed)
    else:
        predictor = Predictor(run.model, mask_tokens=len(run.masks), seed=run.seed, attention=attention)
    return Models(encoder=encoder, predictor=predictor, target=target)


def jepa_loss(models: Models, puzzles: Sequence[Puzzle], run: Run, *, step: int) -> Loss:
    """The loss of the run's objective, on this rank's clips or some of them.

    Args:
        models: the three networks.
        puzzles: the clips.
        run: the run.
        step: updates made before this one; where batches are passed over, not the number of theirs.
    """
    match run.objective:
        case VJEPA2():
            return vjepa2.jepa_loss(models, puzzles, run)
        case VJEPA21():
            return vjepa2_1.dense_loss(models, puzzles, run, step=step)
        case LeVJEPA():
            return levjepa.views_loss(models, puzzles, run)
