"""What is learned, and from what: one file for each objective, all on the same clips and masks."""

import copy
from collections.abc import Sequence

from vjepa.config import VJEPA2, VJEPA21, LeVJEPA, Run
from vjepa.methods.base import Loss, MaskedClips, Models, prepare_batch, update_target
from vjepa.methods.levjepa.method import Projector, views_loss
from vjepa.methods.vjepa2.method import jepa_loss as vjepa2_loss
from vjepa.methods.vjepa2_1.method import dense_loss
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor

__all__ = ["Loss", "MaskedClips", "Models", "build", "jepa_loss", "prepare_batch", "update_target"]


def build(run: Run, *, attention: Backend = "sdpa") -> Models:
    """The networks of the run's objective, with the first weights of its seed unless on the meta device."""
    encoder = Encoder(run.model, seed=run.seed, attention=attention)
    target = copy.deepcopy(encoder).requires_grad_(False)
    if isinstance(run.objective, LeVJEPA):
        hidden, embedding = run.objective.projector
        predictor = Projector(run.model.encoder.width, hidden, embedding, seed=run.seed)
    else:
        predictor = Predictor(run.model, mask_tokens=len(run.masks), seed=run.seed, attention=attention)
    return Models(encoder=encoder, predictor=predictor, target=target)


def jepa_loss(models: Models, puzzles: Sequence[MaskedClips], run: Run, *, step: int) -> Loss:
    """The loss of the run's objective, on this rank's clips or some of them.

    Args:
        models: the three networks.
        puzzles: the clips.
        run: the run.
        step: updates made before this one; where batches are passed over, not the number of theirs.
    """
    match run.objective:
        case VJEPA2():
            return vjepa2_loss(models, puzzles, run)
        case VJEPA21():
            return dense_loss(models, puzzles, run, step=step)
        case LeVJEPA():
            return views_loss(models, puzzles, run)
