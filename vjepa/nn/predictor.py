"""Visible tokens to a guess of the hidden ones: V-JEPA 2's narrow transformer, for any number of guesses in one pass.

Letters: B clips, V visible and K hidden tokens, D width of the encoder, LD times its levels, P width of the predictor,
n tokens of a sequence, V + K. In a list each guess has its own: _B and _K.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vjepa.nn.attention import Backend, Segments
from vjepa.nn.blocks import NORM_EPS, Block, init_weights, rotations, sine_cosine
from vjepa.nn.grid import Grid
from vjepa.nn.shapes import Float, Int, Model


@dataclass(frozen=True)
class PredictorInput:
    """What is known of some clips, and what is asked."""

    context: Float[Tensor, "B V LD"]
    """The encoder's features of visible tokens, of all its levels."""

    visible: Int[Tensor, "B V"]
    """Where they are."""

    hidden: Int[Tensor, "B K"]
    """Where to guess."""

    grid: Grid
    """The clips' tokens."""

    token: int
    """Which mask token stands for the unknown: the index of the mask kind."""

    still: bool = False
    """Whether these are still pictures, where pictures and clips have marks."""


class Predictor(nn.Module):
    """Features of visible tokens to features of hidden ones."""

    def __init__(self, settings: Model, mask_tokens: int, *, seed: int = 0, attention: Backend = "sdpa"):
        """Build the predictor and initialise it, unless on the meta device.

        Args:
            settings: sizes, positions.
            mask_tokens: kinds of mask, each with a token of its own.
            seed: decides the first weights, whatever the device or the sharding.
            attention: who computes attention over packed sequences, see `vjepa.nn.attention.choose`.
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
        # One parameter for all kinds: FSDP2 returns wrong gradients, without an error, if some rank does not use a
        # parameter that another uses. The shape is Hugging Face's.
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
        """Draw the first weights; call it after `to_empty` if the model was built on the meta device."""
        init_weights(self, seed=seed, name="predictor", std=self.settings.init_std)

    def forward(self, guesses: Sequence[PredictorInput]) -> list[Float[Tensor, "_B _K LD"]]:
        """Guess all hidden tokens in one packed pass; each sequence sees only itself.

        Visible and hidden tokens of a clip are laid side by side, not sorted by place as in V-JEPA 2: attention is
        over a set, and places are in the rotation.

        Args:
            guesses: any mixture of clip lengths, picture sizes and masks.

        Returns:
            For each guess the features of its hidden tokens, of all levels side by side; with
            `settings.predict_context` then, for each guess, those of its visible tokens.
        """
        sequences = [self._sequence(guess) for guess in guesses]
        x = torch.cat([each.flatten(0, 1) for each in sequences])  # [S P]
        runs = [(len(each), each.shape[1]) for each in sequences]
        segments = Segments.of(runs, backend=self.attention, device=x.device)
        rotation = rotations(
            [(guess.grid, torch.cat((guess.visible, guess.hidden), dim=1)) for guess in guesses],
            head_width=self.settings.predictor.width // self.settings.predictor.heads,
            form=self.settings.rope,
            cells=self.settings.rope_cells,
        )
        for block in self.predictor_blocks:
            x = block(x, rotation, segments)
        parts = x.split([count * length for count, length in runs])
        clips = [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]
        asked = [
            (self.predictor_proj, each[:, guess.visible.shape[1] :]) for each, guess in zip(clips, guesses, strict=True)
        ]
        if self.settings.predict_context:
            asked += [
                (self.predictor_proj_context, each[:, : guess.visible.shape[1]])
                for each, guess in zip(clips, guesses, strict=True)
            ]
        # Copied, since FSDP2 wants no views returned and a linear map's output is one.
        return [project(self.predictor_norm(each)).clone() for project, each in asked]

    def _sequence(self, guess: PredictorInput) -> Float[Tensor, "B n P"]:
        """Known and unknown tokens of each clip, with the mark of their kind if there is one."""
        known = self.predictor_embed(guess.context)
        unknown = self.mask_tokens[guess.token].to(known.dtype).expand(*guess.hidden.shape, -1)
        sequence = torch.cat((known, unknown), dim=1)
        if self.settings.rope == "sincos":
            ids = torch.cat((guess.visible, guess.hidden), dim=1)
            sequence = sequence + sine_cosine(guess.grid, ids, sequence.shape[-1]).to(sequence.dtype)
        if self.settings.still_tokens:
            ours, other = self.img_mod_embed, self.video_mod_embed
            if not guess.still:
                ours, other = other, ours
            sequence = sequence + (ours + 0.0 * other).to(sequence.dtype)  # both used, on every rank
        return sequence
