"""V-JEPA 2, in the order of the paper: predict the target encoder's features of hidden tokens.

    frames --> target encoder --> layer norm --> h       (no gradient; the encoder's moving average sees all tokens)
    frames --> encoder, visible tokens only  --> c
    c, positions of hidden tokens --> predictor --> z
    loss = mean |z - h| over the hidden tokens of a clip, then over clips and kinds of mask

The last mean is over all clips of the step, in any rank and micro-batch. Every clip counts the same, whatever
number of its tokens is hidden. Where the numbers are equal this is V-JEPA 2's loss.

V-JEPA 2: Assran et al., arXiv:2506.09985, section 2.1; V-JEPA: Bardes et al., arXiv:2404.08471, section 3.

B clips, T frames, Y X pixels, N tokens of a clip, V visible, K hidden, D width, M kinds of mask.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vjepa.methods.base import Average, Loss, MaskedClips, MaskingMethod, Networks, TokenCounts, sample_tokens
from vjepa.methods.masking import Mask
from vjepa.methods.vjepa2.settings import MaskedPredictionSettings
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.predictor import Predictor, PredictorInput

Pairs = Sequence[tuple[MaskedClips, Mask]]
"""Every group of clips with each of its masks."""


class VJEPA2(MaskingMethod):
    """Masked prediction in the feature space of a slowly moving teacher."""

    settings: MaskedPredictionSettings

    def build(self, attention: Backend = "sdpa") -> Networks:
        """Return the encoder, the predictor and the target, which is the encoder's moving average."""
        run = self.run
        encoder = Encoder(run.model, seed=run.seed, attention=attention)
        predictor = Predictor(run.model, len(self.settings.masks), seed=run.seed, attention=attention)
        target = copy.deepcopy(encoder).requires_grad_(False)
        return Networks(
            trained={"encoder": encoder, "predictor": predictor},
            averages={"target": Average(target, of="encoder")},
            exported="target",
        )

    def loss(self, networks: Networks, inputs: Sequence[MaskedClips], *, step: int) -> Loss:
        """Return the mean error of the predicted features of hidden tokens."""
        with torch.no_grad():
            features = networks["target"]([View(clips.frames) for clips in inputs])
            targets = [F.layer_norm(h.float(), h.shape[-1:]) for h in features]

        pairs = [(clips, mask) for clips in inputs for mask in clips.masks]
        wholes = [mask.select(h) for clips, h in zip(inputs, targets, strict=True) for mask in clips.masks]
        contexts = networks["encoder"]([View(mask.select(clips.frames), mask.visible) for clips, mask in pairs])
        predictions = networks["predictor"](predictor_inputs(contexts, pairs))

        by_kind = [torch.zeros((), device=targets[0].device) for _ in self.settings.masks]
        baseline = torch.zeros((), device=targets[0].device)
        for z, whole, (_, mask) in zip(predictions, wholes, pairs, strict=True):
            h = whole.take_along_dim(mask.hidden[..., None], dim=1)  # [B K D]
            by_kind[mask.kind] = by_kind[mask.kind] + self.error(z.float() - h)
            with torch.no_grad():
                baseline = baseline + self.error(whole.mean(1, keepdim=True) - h)
        return self.total(by_kind, baseline, pairs, features=sample_tokens(targets))

    def error(self, difference: Float[Tensor, "B K D"]) -> Float[Tensor, ""]:
        """Return |difference|^p / p, averaged over the tokens and channels of a clip and summed over clips."""
        return self.power(difference).mean((1, 2)).sum()

    def power(self, difference: Tensor) -> Tensor:
        """Return |difference|^p / p for every number."""
        p, error = self.settings.loss_exponent, difference.abs()
        return error if p == 1 else error**p / p

    def total(self, by_kind: Sequence[Tensor], baseline: Tensor, pairs: Pairs, *, features: Tensor) -> Loss:
        """Return the mean over kinds of mask, with its metrics.

        Args:
            by_kind: error summed over clips, for each kind of mask.
            baseline: the same for a constant prediction, summed over kinds.
            pairs: clips and masks, to count tokens.
            features: features for the collapse monitors.
        """
        kinds = torch.stack(list(by_kind)) / self.run.batch_size
        value = kinds.mean()
        return Loss(
            value=value,
            metrics={
                "prediction": value.detach(),
                "baseline": (baseline / (self.run.batch_size * len(by_kind))).detach(),
                **{f"mask_{kind}": error.detach() for kind, error in enumerate(kinds)},
            },
            features=features,
            tokens=TokenCounts(
                total=sum(len(mask.rows) * clips.grid.tokens for clips, mask in pairs),
                visible=sum(mask.visible.numel() for _, mask in pairs),
                hidden=sum(mask.hidden.numel() for _, mask in pairs),
            ),
        )


def predictor_inputs(contexts: Sequence[Tensor], pairs: Pairs) -> list[PredictorInput]:
    """Return the question to the predictor for each group of clips and mask."""
    return [
        PredictorInput(context, mask.visible, mask.hidden, clips.grid, mask.kind, still=clips.is_still)
        for context, (clips, mask) in zip(contexts, pairs, strict=True)
    ]
