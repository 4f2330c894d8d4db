"""V-JEPA 2, in the order of the paper: predict the target encoder's features of hidden tokens.

    frames --> target encoder --> layer norm --> h       (no gradient; the encoder's moving average sees all tokens)
    frames --> encoder, visible tokens only  --> c
    c, positions of hidden tokens --> predictor --> z
    loss = mean |z - h| over the hidden tokens of a clip, then over clips and kinds of mask

The last mean is over all clips of the step, in any rank and micro-batch. Every clip counts the same, whatever
number of its tokens is hidden. Where the numbers are equal this is V-JEPA 2's loss.

With `objective.teacher` the target encoder is a pretrained one that does not move, and a linear map follows the
predictor where their widths differ (SALT, arXiv:2509.24317, stage 2). Losses are then comparable along the run and
between students.

V-JEPA 2: Assran et al., arXiv:2506.09985, section 2.1; V-JEPA: Bardes et al., arXiv:2404.08471, section 3.

B clips, T frames, Y X pixels, N tokens of a clip, V visible, K hidden, D width, M kinds of mask.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vjepa.methods.base import Average, Loss, MaskedClips, MaskingMethod, Networks, TokenCounts, sample_tokens
from vjepa.methods.frozen_encoder import EncoderFile, FrozenEncoder, read_model
from vjepa.methods.masking import Mask
from vjepa.methods.vjepa2.settings import MaskedPredictionSettings
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.init import init_weights
from vjepa.nn.predictor import Predictor, PredictorInput
from vjepa.nn.settings import Model as ModelSettings
from vjepa_data.errors import BadInput

Pairs = Sequence[tuple[MaskedClips, Mask]]
"""Every group of clips with each of its masks."""


class VJEPA2(MaskingMethod):
    """Masked prediction in the feature space of a slowly moving teacher."""

    settings: MaskedPredictionSettings

    def build(self, attention: Backend = "sdpa") -> Networks:
        """Return the encoder, the predictor and the target: the encoder's moving average, or a fixed teacher."""
        run = self.run
        encoder = Encoder(run.model, seed=run.seed, attention=attention)
        predictor = Predictor(run.model, len(self.settings.masks), seed=run.seed, attention=attention)
        trained = {"encoder": encoder, "predictor": predictor}
        if self.settings.teacher is not None:
            return with_teacher(trained, run.model, Path(self.settings.teacher), seed=run.seed)
        target = copy.deepcopy(encoder).requires_grad_(False)
        return Networks(
            trained=trained,
            averages={"target": Average(target, of="encoder")},
            exported="target",
        )

    def loss(self, networks: Networks, inputs: Sequence[MaskedClips], *, step: int) -> Loss:
        """Return the mean error of the predicted features of hidden tokens."""
        with torch.no_grad():
            features = self.target(networks)([View(clips.frames) for clips in inputs])
            targets = [F.layer_norm(h.float(), h.shape[-1:]) for h in features]

        pairs = [(clips, mask) for clips in inputs for mask in clips.masks]
        wholes = [mask.select(h) for clips, h in zip(inputs, targets, strict=True) for mask in clips.masks]
        contexts = networks["encoder"]([View(mask.select(clips.frames), mask.visible) for clips, mask in pairs])
        predictions = self.mapped(networks, networks["predictor"](predictor_inputs(contexts, pairs)))

        by_kind = [torch.zeros((), device=targets[0].device) for _ in self.settings.masks]
        baseline = torch.zeros((), device=targets[0].device)
        for z, whole, (_, mask) in zip(predictions, wholes, pairs, strict=True):
            h = whole.take_along_dim(mask.hidden[..., None], dim=1)  # [B K D]
            by_kind[mask.kind] = by_kind[mask.kind] + self.error(z.float() - h)
            with torch.no_grad():
                baseline = baseline + self.error(whole.mean(1, keepdim=True) - h)
        return self.total(by_kind, baseline, pairs, features=self.monitored(targets, contexts))

    def target(self, networks: Networks) -> nn.Module:
        """Return the encoder that gives the targets."""
        if self.settings.teacher is None:
            return networks["target"]
        reference = networks["teacher_file"]
        assert isinstance(reference, EncoderFile)
        reference.check()
        return networks["teacher"]

    def mapped(self, networks: Networks, predictions: Sequence[Tensor]) -> list[Tensor]:
        """Return the predictions in the width of the targets."""
        if "teacher_map" not in networks.trained:
            return list(predictions)
        return networks["teacher_map"](predictions)

    def monitored(self, targets: Sequence[Tensor], contexts: Sequence[Tensor]) -> Tensor:
        """Return features for the collapse monitors: the targets, or under a fixed teacher the encoder's own."""
        return sample_tokens(targets if self.settings.teacher is None else [h.detach().float() for h in contexts])

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


class TeacherMap(nn.Module):
    """A linear map from the student's predictions to the width of the teacher's features."""

    def __init__(self, width: int, of_teacher: int, *, seed: int):
        super().__init__()
        self.proj = nn.Linear(width, of_teacher)
        if not self.proj.weight.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        """Initialize the map so that predictions keep their scale."""
        init_weights(self, seed=seed, name="teacher_map", std="fan_in")

    def forward(self, predictions: Sequence[Float[Tensor, "_B _K D"]]) -> list[Float[Tensor, "_B _K T"]]:
        # Copied, since FSDP2 does not allow views to be returned and the output of a linear layer is a view.
        return [self.proj(each).clone() for each in predictions]


def with_teacher(trained: Mapping[str, nn.Module], model: ModelSettings, folder: Path, *, seed: int) -> Networks:
    """Return the networks of a student, with a fixed teacher in the place of the moving average.

    Args:
        trained: the student's networks.
        model: the student's settings.
        folder: native export of the teacher.
        seed: seed of the linear map.

    Raises:
        BadInput: the teacher is missing, or has other tokens or levels than the student.
    """
    theirs = read_model(folder)
    for name in ("patch_px", "tubelet_frames", "still_tokens"):
        own, other = getattr(model, name), getattr(theirs, name)
        if own != other:
            raise BadInput(
                f"the teacher {folder} has {name} {other}, model.{name} is {own}: their tokens are not the same; set "
                f"model.{name} to {other}, or give another teacher"
            )
    levels = max(1, len(model.levels))
    if levels > 1 and len(theirs.levels) != levels:
        raise BadInput(
            f"the teacher {folder} has {max(1, len(theirs.levels))} levels and the student {levels}; set as many "
            "model.levels as the teacher has"
        )
    width, of_teacher = levels * model.encoder.width, levels * theirs.encoder.width
    if width != of_teacher:
        trained = {**trained, "teacher_map": TeacherMap(width, of_teacher, seed=seed)}
    # Its clips are whole, an ordinary batch, for which every backend is sdpa.
    return Networks(
        trained, frozen={"teacher": FrozenEncoder(theirs, folder)}, constants={"teacher_file": EncoderFile(folder)}
    )


def predictor_inputs(contexts: Sequence[Tensor], pairs: Pairs) -> list[PredictorInput]:
    """Return the question to the predictor for each group of clips and mask."""
    return [
        PredictorInput(context, mask.visible, mask.hidden, clips.grid, mask.kind, still=clips.is_still)
        for context, (clips, mask) in zip(contexts, pairs, strict=True)
    ]
