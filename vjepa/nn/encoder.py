"""Frames to tokens: V-JEPA 2's video transformer, for any number of views in one pass.

Letters: B clips, C channels, T frames, Y X height and width in pixels, N tokens of a clip, V visible ones, D width, LD
width times levels. In a list each view has its own: _B and _V.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.attention import Backend, Segments
from vjepa.nn.blocks import NORM_EPS, Block, PatchEmbed, init_weights, rotations, sine_cosine
from vjepa.nn.grid import Grid
from vjepa.nn.shapes import Float, Int, Model, UInt8

# ImageNet, as in V-JEPA 2.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(frames: UInt8[Tensor, "B T Y X C"]) -> Float[Tensor, "B C T Y X"]:
    """Make bytes what the encoder expects: channels first, ImageNet's mean and deviation. fp32, on their device."""
    mean, std = pixel_statistics(frames.device)
    return (frames.movedim(-1, 1).float() / 255 - mean) / std


@functools.cache
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation on a device; kept, since bringing numbers there makes the host wait."""
    mean, std = (torch.tensor(x, device=device)[:, None, None, None] for x in (MEAN, STD))
    return mean, std


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
            settings: sizes, patch, positions, levels.
            seed: decides the first weights, whatever the device or the sharding.
            attention: who computes attention over packed sequences, see `vjepa.nn.attention.choose`.
        """
        super().__init__()
        size = settings.encoder
        self.settings = settings
        self.attention: Backend = attention
        self.patch_embed = self._tokenizer(settings.tubelet_frames)
        if settings.still_tokens:
            self.patch_embed_img = self._tokenizer(1)
            self.img_mod_embed, self.video_mod_embed = (nn.Parameter(torch.zeros(1, 1, size.width)) for _ in range(2))
        if settings.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        if settings.levels:
            self.norms_block = nn.ModuleList(nn.LayerNorm(size.width, eps=NORM_EPS) for _ in settings.levels)
        else:
            self.norm = nn.LayerNorm(size.width, eps=NORM_EPS)
        if not self.patch_embed.proj.weight.is_meta:
            self.init_weights(seed)

    def _tokenizer(self, frames: int) -> PatchEmbed:
        settings = self.settings
        return PatchEmbed(channels=3, tubelet_frames=frames, patch_px=settings.patch_px, width=settings.encoder.width)

    def init_weights(self, seed: int = 0) -> None:
        """Draw the first weights; call it after `to_empty` if the model was built on the meta device."""
        init_weights(self, seed=seed, name="encoder", std=self.settings.init_std)

    def forward(
        self, views: Sequence[View], *, levels: bool = False, class_token: bool = False
    ) -> list[Float[Tensor, "_B _V LD"]]:
        """Encode all views in one packed pass; each sequence sees only itself.

        Args:
            views: any mixture of clip lengths, picture sizes and masks.
            levels: give the features of all `settings.levels` side by side, the last block's last; else L = 1.
            class_token: give the class token's feature too, as the first.

        Returns:
            For each view the features of its visible tokens, after the norm of their level.

        Raises:
            BadInput: frames are not a whole number of tokens.
        """
        grids = [Grid.of(t, y, x, self.settings) for t, y, x in (view.frames.shape[2:] for view in views)]
        tokens = self._embed(views)
        ids = [
            _all_ids(view.frames, grid) if view.index is None else view.index
            for view, grid in zip(views, grids, strict=True)
        ]
        if self.settings.rope == "sincos":
            places = [
                sine_cosine(grid, each, self.settings.encoder.width) for grid, each in zip(grids, ids, strict=True)
            ]
            tokens = [each + place.to(each.dtype) for each, place in zip(tokens, places, strict=True)]
        times = [each // grid.cells for each, grid in zip(ids, grids, strict=True)]
        if self.settings.class_token:  # first, at place 0, where nothing turns, and after the end: nothing sees it
            tokens = [torch.cat((self.cls_token.to(each.dtype).expand(len(each), -1, -1), each), 1) for each in tokens]
            ids = [F.pad(each, (1, 0)) for each in ids]
            times = [F.pad(each, (1, 0), value=grid.t) for each, grid in zip(times, grids, strict=True)]
        x = torch.cat([each.flatten(0, 1) for each in tokens])  # [S D]
        runs = [(len(each), each.shape[1]) for each in tokens]
        segments = Segments.of(
            runs,
            backend=self.attention,
            device=x.device,
            times=torch.cat([each.flatten() for each in times]) if self.settings.causal else None,
        )
        rotation = rotations(
            list(zip(grids, ids, strict=True)),
            head_width=self.settings.encoder.width // self.settings.encoder.heads,
            form=self.settings.rope,
            cells=self.settings.rope_cells,
        )
        wanted = self._wanted(levels=levels)
        first = int(self.settings.class_token and not class_token)
        found = []
        for number, block in enumerate(self.blocks):
            x = block(x, rotation, segments)
            if number in wanted:
                parts = x.split([count * length for count, length in runs])
                # The norm comes last, since FSDP2 wants no views of a tensor returned.
                found.append(
                    [wanted[number](part.unflatten(0, run)[:, first:]) for part, run in zip(parts, runs, strict=True)]
                )
        if len(found) == 1:
            return found[0]
        return [torch.cat(of_view, dim=-1) for of_view in zip(*found, strict=True)]

    def _embed(self, views: Sequence[View]) -> list[Float[Tensor, "_B _V D"]]:
        """Tokens of all views, with the mark of their kind if there is one."""
        if not self.settings.still_tokens:
            return [self.patch_embed(view.frames, view.index) for view in views]
        tokens = []
        for view in views:
            still = view.frames.shape[2] == 1
            embed, mark = (
                (self.patch_embed_img, self.img_mod_embed) if still else (self.patch_embed, self.video_mod_embed)
            )
            each = embed(view.frames, view.index)
            tokens.append(each + mark.to(each.dtype))
        # All are used, whatever these clips are: FSDP2 returns wrong gradients where ranks use different parameters.
        idle = (
            *self.patch_embed.parameters(),
            *self.patch_embed_img.parameters(),
            self.img_mod_embed,
            self.video_mod_embed,
        )
        tokens[0] = tokens[0] + 0.0 * torch.stack([p.flatten()[0] for p in idle]).sum().to(tokens[0].dtype)
        return tokens

    def _wanted(self, *, levels: bool) -> dict[int, nn.Module]:
        """Which blocks' features to give, and the norm of each."""
        if not self.settings.levels:
            return {len(self.blocks) - 1: self.norm}
        all_levels = dict(zip(self.settings.levels, self.norms_block, strict=True))
        return all_levels if levels else {len(self.blocks) - 1: all_levels[len(self.blocks) - 1]}


def _all_ids(frames: Tensor, grid: Grid) -> Tensor:
    return torch.arange(grid.tokens, device=frames.device).expand(len(frames), -1)
