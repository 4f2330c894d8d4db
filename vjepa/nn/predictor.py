"""The masked predictor, visible tokens to hidden tokens: V-JEPA 2's narrow transformer, many inputs in a single pass.

Letters: B clips, V visible and K hidden tokens, D width of the encoder, LD times its levels, P width of the predictor,
N tokens of a sequence, V + K. In a list each input has its own: _B and _K.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vjepa.nn.attention import Backend, Segments
from vjepa.nn.blocks import NORM_EPS, Block
from vjepa.nn.grid import Grid
from vjepa.nn.init import init_weights
from vjepa.nn.positions import rotations, sine_cosine
from vjepa.nn.shapes import Float, Int, Model


@dataclass(frozen=True)
class PredictorInput:
    """Features of some clips' visible tokens, and the tokens to predict."""

    context: Float[Tensor, "B V LD"]
    """Features of the visible tokens, all levels of the encoder side by side."""

    visible: Int[Tensor, "B V"]
    """Ids of the visible tokens."""

    hidden: Int[Tensor, "B K"]
    """Ids of the tokens to predict."""

    grid: Grid
    """Grid of the clips."""

    mask_kind: int
    """Index of the kind of mask: which mask token stands for hidden tokens."""

    still: bool = False
    """Whether the clips are still pictures. Only read for a model with `still_tokens`."""


class Predictor(nn.Module):
    """Narrow transformer from features of visible tokens to features of hidden tokens."""

    def __init__(self, settings: Model, mask_tokens: int, *, seed: int = 0, attention: Backend = "sdpa"):
        """Build the predictor and initialize it, unless on the meta device.

        Args:
            settings: sizes, positions.
            mask_tokens: number of kinds of mask. Each has a token of its own.
            seed: determines the initial weights, independently of device and sharding.
            attention: backend for packed sequences, see `vjepa.nn.attention.choose`.
        """
        super().__init__()
        size, width = settings.predictor, settings.encoder.width
        levels = max(1, len(settings.levels))
        self.settings = settings
        self.attention: Backend = attention
        if levels == 1:
            self.predictor_embed = nn.Linear(width, size.width)
        else:
            self.predictor_embed = nn.Sequential(
                nn.Linear(levels * width, width), nn.GELU(), nn.Linear(width, size.width)
            )
        # One parameter for all kinds: FSDP2 returns wrong gradients, without an error, if ranks use different
        # parameters. The shape is Hugging Face's.
        self.mask_tokens = nn.Parameter(torch.zeros(mask_tokens, 1, 1, size.width))
        if settings.still_tokens:
            self.img_mod_embed, self.video_mod_embed = (nn.Parameter(torch.zeros(1, 1, size.width)) for _ in range(2))
        self.predictor_blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.predictor_norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(size.width, levels * width)
        if settings.predict_context:
            self.predictor_proj_context = nn.Linear(size.width, levels * width)
        if not self.mask_tokens.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        """Initialize all parameters. Call it after `to_empty` if the predictor was built on the meta device."""
        init_weights(self, seed=seed, name="predictor", std=self.settings.init_std)

    def forward(self, inputs: Sequence[PredictorInput]) -> list[Float[Tensor, "_B _K LD"]]:
        """Predict the features of all hidden tokens in a packed pass. Attention stays within each clip.

        Visible and hidden tokens of a clip are concatenated, not sorted by position as in V-JEPA 2. The result is the
        same up to rounding: attention does not depend on order, and positions are in the rotation.

        Args:
            inputs: any mixture of clip lengths, picture sizes and masks.

        Returns:
            For each input the features of its hidden tokens, all levels side by side. With `settings.predict_context`
            these are followed, for each input, by the features of its visible tokens.
        """
        sequences = [self._sequence(given) for given in inputs]
        x = torch.cat([each.flatten(0, 1) for each in sequences])  # [S P]
        runs = [(len(each), each.shape[1]) for each in sequences]
        segments = Segments.of(runs, backend=self.attention, device=x.device)
        rotation = rotations(
            [(given.grid, torch.cat((given.visible, given.hidden), dim=1)) for given in inputs],
            head_width=self.settings.predictor.width // self.settings.predictor.heads,
            form=self.settings.rope,
            cells=self.settings.rope_cells,
        )
        for block in self.predictor_blocks:
            x = block(x, rotation, segments)
        parts = x.split([count * length for count, length in runs])
        clips = [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]
        counts = [given.visible.shape[1] for given in inputs]
        outputs = [(self.predictor_proj, each[:, count:]) for each, count in zip(clips, counts, strict=True)]
        if self.settings.predict_context:
            outputs += [
                (self.predictor_proj_context, each[:, :count]) for each, count in zip(clips, counts, strict=True)
            ]
        # Copied, since FSDP2 does not allow views to be returned and the output of a linear layer is a view.
        return [project(self.predictor_norm(each)).clone() for project, each in outputs]

    def _sequence(self, given: PredictorInput) -> Float[Tensor, "B N P"]:
        """Embed the visible tokens of each clip and append mask tokens for the hidden tokens."""
        visible = self.predictor_embed(given.context)
        hidden = self.mask_tokens[given.mask_kind].to(visible.dtype).expand(*given.hidden.shape, -1)
        sequence = torch.cat((visible, hidden), dim=1)
        if self.settings.rope == "sincos":
            ids = torch.cat((given.visible, given.hidden), dim=1)
            sequence = sequence + sine_cosine(given.grid, ids, sequence.shape[-1]).to(sequence.dtype)
        if self.settings.still_tokens:
            mark, other = self.img_mod_embed, self.video_mod_embed
            if not given.still:
                mark, other = other, mark
            sequence = sequence + (mark + 0.0 * other).to(sequence.dtype)  # both parameters are used on every rank
        return sequence
