"""V-JEPA 2 with two additions: visible tokens are guessed too, and so are features of several depths.

    frames --> target encoder --> layer norm of each level --> h     (no gradient)
    frames --> encoder, visible tokens only --> c                    (the same levels, side by side)
    c, where the hidden tokens are --> predictor --> z of hidden tokens, y of visible tokens
    loss = mean |z - h|  +  weight(step) * mean |y - h| / sqrt(distance to the nearest hidden token)

What a token says of its own place comes from the second term, and it alone would cost features of motion; several
depths repair that. V-JEPA 2.1: arXiv:2603.14482.

B clips, N tokens of a clip, V visible, K hidden, L levels, D width, LD one times the other, M kinds of mask.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vjepa.config import VJEPA21, Run
from vjepa.methods.base import Loss, MaskedClips, Models, some_tokens
from vjepa.nn.encoder import View
from vjepa.nn.grid import Grid
from vjepa.nn.predictor import PredictorInput


def dense_loss(models: Models, puzzles: Sequence[MaskedClips], run: Run, *, step: int) -> Loss:
    """How wrong the predictor is about the features of hidden and of visible tokens.

    Args:
        models: the three networks.
        puzzles: this rank's clips, or some of them.
        run: for the number of clips in the whole step, the kinds of mask and the objective.
        step: updates made before this one, for the weight of visible tokens.
    """
    assert isinstance(run.objective, VJEPA21)
    levels, weight = max(1, len(run.model.levels)), context_weight(step, run.objective)
    with torch.no_grad():
        seen_whole = models.target([View(puzzle.frames) for puzzle in puzzles], levels=True)
        targets = [_norm_each_level(h.float(), levels) for h in seen_whole]  # [B N L*D]

    pairs = [(number, mask) for number, puzzle in enumerate(puzzles) for mask in puzzle.masks]
    contexts = models.encoder([View(mask.select(puzzles[n].frames), mask.visible) for n, mask in pairs], levels=True)
    answers = models.predictor(
        [
            PredictorInput(context, mask.visible, mask.hidden, puzzles[n].grid, mask.kind, still=puzzles[n].is_still)
            for context, (n, mask) in zip(contexts, pairs, strict=True)
        ]
    )
    of_hidden, of_visible = answers[: len(pairs)], answers[len(pairs) :]

    by_kind = [torch.zeros((), device=targets[0].device) for _ in run.masks]
    baseline = torch.zeros((), device=targets[0].device)
    for z, y, (n, mask) in zip(of_hidden, of_visible, pairs, strict=True):
        h = mask.select(targets[n])
        near = torch.ones(mask.visible.shape, device=h.device)  # [B V]
        if run.objective.by_distance:
            near = distance_weights(mask.visible, mask.hidden, puzzles[n].grid)
        mean = h.mean(1, keepdim=True)
        for ids, guess, share in (
            (mask.hidden, z, torch.ones((), device=h.device)),
            (mask.visible, y, weight * near[..., None]),
        ):
            wanted = h.take_along_dim(ids[..., None], dim=1)
            by_kind[mask.kind] = by_kind[mask.kind] + _error(guess.float() - wanted, share, run.objective)
            baseline = baseline + _error(mean - wanted, share, run.objective)
    kinds = torch.stack(by_kind) / run.batch_size
    value = kinds.mean()
    baseline = baseline / (run.batch_size * len(run.masks))
    return Loss(
        value=value,
        numbers=torch.cat((torch.stack((value, baseline)), kinds)).detach(),
        features=some_tokens([h[..., -run.model.encoder.width :] for h in targets]),
        tokens=sum(len(mask.rows) * puzzles[n].grid.tokens for n, mask in pairs),
        visible=sum(mask.visible.numel() for _, mask in pairs),
        hidden=sum(mask.hidden.numel() for _, mask in pairs),
    )


def context_weight(step: int, objective: VJEPA21) -> float:
    """Weight of the error on visible tokens in the update that is made in `step`, counted from 0."""
    start, end = objective.context_ramp
    if step < start:
        return 0.0
    return objective.context_weight * (min(1.0, (step - start) / (end - start)) if end > start else 1.0)


def distance_weights(visible: Int[Tensor, "B V"], hidden: Int[Tensor, "B K"], grid: Grid) -> Float[Tensor, "B V"]:
    """1 / sqrt(distance) of visible tokens to the nearest hidden one, in tokens of a grid of 16 rows.

    The distance is Euclidean, over time, rows and columns. It is found axis by axis, with the nearest hidden token
    along time, then of those along rows, then along columns: exact, and without a table of all pairs.
    """
    near = torch.full((len(hidden), grid.tokens), torch.inf, device=hidden.device)
    near = near.scatter(1, hidden, 0.0).unflatten(1, (grid.t, grid.h, grid.w))  # squared distance so far
    for axis, length in ((1, grid.t), (2, grid.h), (3, grid.w)):
        place = torch.arange(length, device=hidden.device)
        apart = (place[:, None] - place).square().float()  # [to from]
        near = (near.movedim(axis, -1)[..., None, :] + apart).amin(-1).movedim(-1, axis)
    unit = max(1, min(grid.h, grid.w) // 16)
    distance = near.flatten(1).gather(1, visible).sqrt() / unit
    return distance.rsqrt()


def _norm_each_level(h: Float[Tensor, "B N LD"], levels: int) -> Float[Tensor, "B N LD"]:
    parts = h.unflatten(-1, (levels, -1))
    return F.layer_norm(parts, parts.shape[-1:]).flatten(-2)


def _error(difference: Tensor, weight: Tensor, objective: VJEPA21) -> Float[Tensor, ""]:
    """Mean over the tokens and channels of a clip, each token by its weight; summed over clips."""
    p = objective.loss_exponent
    error = difference.abs()
    if p != 1:
        error = error**p / p
    return (error * weight).mean((1, 2)).sum()
