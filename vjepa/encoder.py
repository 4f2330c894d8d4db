"""Frames to tokens: V-JEPA 2's video transformer, for any number of views in one pass.

Letters: B clips, C channels, T frames, Y X height and width in pixels, N tokens of a clip, V visible ones, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vjepa.attention import Backend, Segments
from vjepa.config import Model
from vjepa.grid import Grid
from vjepa.layers import NORM_EPS, Block, PatchEmbed, init_weights, rotations

# ImageNet, as in V-JEPA 2.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(frames: UInt8[Tensor, "B T Y X C"]) -> Float[Tensor, "B C T Y X"]:
    """Make bytes what the encoder expects: channels first, ImageNet's mean and deviation. fp32, on their device."""
    mean, std = (torch.tensor(x, device=frames.device)[:, None, None, None] for x in (MEAN, STD))
    return (frames.movedim(-1, 1).float() / 255 - mean) / std


@dataclass(frozen=True)
class View:
    """Clips of one shape, and which of their tokens may be seen."""

    frames: Float[Tensor, "B C T Y X"]
    """Normalised pixels. Several views may share them."""

    index: Int[Tensor, "B V"] | None = None
    """Ids of visible tokens, sorted; None: all."""


class Encoder(nn.Module):
    """Pixels of visible tokens to features."""

    def __init__(self, settings: Model, *, seed: int = 0, attention: Backend = "sdpa"):
        """Build the encoder and initialise it, unless on the meta device.

        Args:
            settings: sizes, patch, positions.
            seed: decides the first weights, whatever the device or the sharding.
            attention: who computes attention over packed sequences, see `vjepa.attention.choose`.
        """
        super().__init__()
        size = settings.encoder
        self.settings = settings
        self.attention: Backend = attention
        self.patch_embed = PatchEmbed(
            channels=3, tubelet_frames=settings.tubelet_frames, patch_px=settings.patch_px, width=size.width
        )
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        if not self.norm.weight.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        """Draw the first weights; call it after `to_empty` if the model was built on the meta device."""
        init_weights(self, seed=seed, name="encoder")

    def forward(self, views: Sequence[View]) -> list[Float[Tensor, "B V D"]]:
        """Encode all views in one packed pass; each sequence sees only itself.

        Args:
            views: any mixture of clip lengths, picture sizes and masks.

        Returns:
            For each view the features of its visible tokens, after the last norm.

        Raises:
            BadInput: frames are not a whole number of tokens.
        """
        grids = [Grid.of(t, y, x, self.settings) for t, y, x in (view.frames.shape[2:] for view in views)]
        tokens = [self.patch_embed(view.frames, view.index) for view in views]
        x = torch.cat([each.flatten(0, 1) for each in tokens])  # [S D]
        runs = [(len(each), each.shape[1]) for each in tokens]
        segments = Segments.of(runs, backend=self.attention, device=x.device)
        ids = [
            _all_ids(view.frames, grid) if view.index is None else view.index
            for view, grid in zip(views, grids, strict=True)
        ]
        head_width = self.settings.encoder.width // self.settings.encoder.heads
        rotation = rotations(list(zip(grids, ids, strict=True)), head_width=head_width, form=self.settings.rope)
        for block in self.blocks:
            x = block(x, rotation, segments)
        parts = x.split([count * length for count, length in runs])
        return [
            self.norm(part.unflatten(0, run)) for part, run in zip(parts, runs, strict=True)
        ]  # FSDP2 wants no views


def _all_ids(frames: Tensor, grid: Grid) -> Tensor:
    return torch.arange(grid.tokens, device=frames.device).expand(len(frames), -1)
