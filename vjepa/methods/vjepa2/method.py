"""The method, in the order of the paper: guess the features of what is hidden, in the target encoder's words.

    frames --> target encoder --> layer norm --> h       (no gradient: the encoder's moving average sees everything)
    frames --> encoder, visible tokens only  --> c
    c, where the hidden tokens are --> predictor --> z
    loss = mean |z - h| over the hidden tokens of a clip, then over clips and kinds of mask

The last mean is over all clips of the step, whichever ranks and micro-batches they are in, and every clip counts the
same however many of its tokens are hidden. Where counts are equal this is V-JEPA 2's loss.

V-JEPA 2: Assran et al., arXiv:2506.09985, section 2.1; V-JEPA: Bardes et al., arXiv:2404.08471, section 3.

B clips, T frames, Y X pixels, N tokens of a clip, V visible, K hidden, D width, M kinds of mask.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vjepa.config import VJEPA2, Run
from vjepa.methods.base import Loss, MaskedClips, Models, some_tokens
from vjepa.nn.encoder import View
from vjepa.nn.predictor import PredictorInput


def jepa_loss(models: Models, puzzles: Sequence[MaskedClips], run: Run) -> Loss:
    """How wrong the predictor is about the features of hidden tokens.

    Args:
        models: the three networks.
        puzzles: this rank's clips, or some of them.
        run: for the number of clips in the whole step, the kinds of mask and the objective.
    """
    with torch.no_grad():
        seen_whole = models.target([View(puzzle.frames) for puzzle in puzzles])
        targets = [F.layer_norm(h.float(), h.shape[-1:]) for h in seen_whole]

    pairs = [(number, mask) for number, puzzle in enumerate(puzzles) for mask in puzzle.masks]
    contexts = models.encoder([View(mask.select(puzzles[n].frames), mask.visible) for n, mask in pairs])
    guesses = models.predictor(
        [
            PredictorInput(context, mask.visible, mask.hidden, puzzles[n].grid, mask.kind, still=puzzles[n].is_still)
            for context, (n, mask) in zip(contexts, pairs, strict=True)
        ]
    )

    by_kind = [torch.zeros((), device=targets[0].device) for _ in run.masks]
    baseline = torch.zeros((), device=targets[0].device)
    for guess, (n, mask) in zip(guesses, pairs, strict=True):
        wanted = mask.select(targets[n]).take_along_dim(mask.hidden[..., None], dim=1)  # [B K D]
        by_kind[mask.kind] = by_kind[mask.kind] + _error(guess.float() - wanted, run)
        with torch.no_grad():
            baseline = baseline + _error(mask.select(targets[n]).mean(1, keepdim=True) - wanted, run)
    kinds = torch.stack(by_kind) / run.batch_size
    value = kinds.mean()
    baseline = baseline / (run.batch_size * len(run.masks))
    return Loss(
        value=value,
        numbers=torch.cat((torch.stack((value, baseline)), kinds)).detach(),
        features=some_tokens(targets),
        tokens=sum(len(mask.rows) * puzzles[n].grid.tokens for n, mask in pairs),
        visible=sum(mask.visible.numel() for _, mask in pairs),
        hidden=sum(mask.hidden.numel() for _, mask in pairs),
    )


def _error(difference: Float[Tensor, "B K D"], run: Run) -> Float[Tensor, ""]:
    """Mean over the tokens and channels of a clip, summed over clips."""
    assert isinstance(run.objective, VJEPA2)
    p = run.objective.loss_exponent
    error = difference.abs()
    if p != 1:
        error = error**p / p
    return error.mean((1, 2)).sum()
