"""V-JEPA 2 with two additions: predictions of visible tokens too, and targets from several depths.

    frames --> target encoder --> layer norm of each level --> h     (no gradient)
    frames --> encoder, visible tokens only --> c                    (the same levels, concatenated)
    c, positions of hidden tokens --> predictor --> z of hidden tokens, y of visible tokens
    loss = mean |z - h|  +  weight(step) * mean |y - h| / sqrt(distance to the nearest hidden token)

The second term makes tokens describe their own position. Alone it would weaken features of motion, which several depths
repair. V-JEPA 2.1: arXiv:2603.14482.

B clips, N tokens of a clip, V visible, K hidden, L levels, D width, LD their product, M kinds of mask.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vjepa.methods.base import Loss, MaskedClips, Networks
from vjepa.methods.vjepa2.method import VJEPA2, predictor_inputs
from vjepa.methods.vjepa2_1.settings import VJEPA21Settings
from vjepa.nn.encoder import View
from vjepa.nn.grid import Grid


class VJEPA21(VJEPA2):
    """V-JEPA 2 with a dense loss over several levels."""

    def loss(self, networks: Networks, inputs: Sequence[MaskedClips], *, step: int) -> Loss:
        """Return the error of the predicted features of hidden tokens, plus that of visible tokens by its weight."""
        settings, model = self.settings, self.run.model
        assert isinstance(settings, VJEPA21Settings)
        levels, weight = max(1, len(model.levels)), context_weight(step, settings)
        with torch.no_grad():
            features = self.target(networks)([View(clips.frames) for clips in inputs], levels=True)
            targets = [_norm_each_level(h.float(), levels) for h in features]  # [B N L*D]

        pairs = [(clips, mask) for clips in inputs for mask in clips.masks]
        wholes = [mask.select(h) for clips, h in zip(inputs, targets, strict=True) for mask in clips.masks]
        views = [View(mask.select(clips.frames), mask.visible) for clips, mask in pairs]
        contexts = networks["encoder"](views, levels=True)
        predictions = self.mapped(networks, networks["predictor"](predictor_inputs(contexts, pairs)))
        of_hidden, of_visible = predictions[: len(pairs)], predictions[len(pairs) :]

        by_kind = [torch.zeros((), device=targets[0].device) for _ in settings.masks]
        baseline = torch.zeros((), device=targets[0].device)
        for z, y, whole, (clips, mask) in zip(of_hidden, of_visible, wholes, pairs, strict=True):
            mean = whole.mean(1, keepdim=True)
            one = torch.ones((), device=whole.device)
            near = torch.ones(mask.visible.shape, device=whole.device)  # [B V]
            if settings.by_distance:
                near = distance_weights(mask.visible, mask.hidden, clips.grid)
            for ids, prediction, share in ((mask.hidden, z, one), (mask.visible, y, weight * near[..., None])):
                h = whole.take_along_dim(ids[..., None], dim=1)
                by_kind[mask.kind] = by_kind[mask.kind] + self.weighted_error(prediction.float() - h, share)
                baseline = baseline + self.weighted_error(mean - h, share)
        width = targets[0].shape[-1] // levels
        own = [h[..., -model.encoder.width :] for h in contexts]
        features = self.monitored([h[..., -width:] for h in targets], own)
        return self.total(by_kind, baseline, pairs, features=features)

    def weighted_error(self, difference: Float[Tensor, "B n LD"], weight: Tensor) -> Float[Tensor, ""]:
        """Return the weighted |difference|^p / p, averaged over tokens and channels and summed over clips."""
        return (self.power(difference) * weight).mean((1, 2)).sum()


def context_weight(step: int, settings: VJEPA21Settings) -> float:
    """Return the weight of the error on visible tokens in the update made in `step`, counted from 0."""
    start, end = settings.context_ramp
    if step < start:
        return 0.0
    return settings.context_weight * (min(1.0, (step - start) / (end - start)) if end > start else 1.0)


def distance_weights(visible: Int[Tensor, "B V"], hidden: Int[Tensor, "B K"], grid: Grid) -> Float[Tensor, "B V"]:
    """Return 1 / sqrt(distance) from each visible token to the nearest hidden token, in tokens of a grid of 16 rows.

    The distance is Euclidean, over time, rows and columns. It is computed axis by axis: the nearest hidden token along
    time, then among these results along rows, then along columns. The result is exact and needs no table of all pairs.
    """
    near = torch.full((len(hidden), grid.tokens), torch.inf, device=hidden.device)
    near = near.scatter(1, hidden, 0.0).unflatten(1, (grid.t, grid.h, grid.w))  # squared distance so far
    for axis, length in ((1, grid.t), (2, grid.h), (3, grid.w)):
        index = torch.arange(length, device=hidden.device)
        apart = (index[:, None] - index).square().float()  # [to from]
        near = (near.movedim(axis, -1)[..., None, :] + apart).amin(-1).movedim(-1, axis)
    unit = max(1, min(grid.h, grid.w) // 16)
    distance = near.flatten(1).gather(1, visible).sqrt() / unit
    return distance.rsqrt()


def _norm_each_level(h: Float[Tensor, "B N LD"], levels: int) -> Float[Tensor, "B N LD"]:
    parts = h.unflatten(-1, (levels, -1))
    return F.layer_norm(parts, parts.shape[-1:]).flatten(-2)
