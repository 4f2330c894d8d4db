"""The encoder, frames to tokens: V-JEPA 2's video transformer, for any number of views in a single pass.

Letters: B clips, C channels, T frames, Y X height and width in pixels, V visible tokens of a clip, S tokens of all
packed sequences, D width, LD width times levels. In a list each view has its own: _B and _V.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.attention import Backend, Run, Segments
from vjepa.nn.blocks import NORM_EPS, Block, PatchEmbed
from vjepa.nn.grid import Grid
from vjepa.nn.init import init_weights
from vjepa.nn.positions import Rotation, rotations, sine_cosine
from vjepa.nn.shapes import Float, Int, Model, UInt8

# ImageNet, as in V-JEPA 2.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(frames: UInt8[Tensor, "B T Y X C"]) -> Float[Tensor, "B C T Y X"]:
    """Convert uint8 frames to the encoder's input: channels first, ImageNet's mean and standard deviation, fp32."""
    # A fake tensor, as tracers and memory estimates use them, needs statistics of its own.
    mean, std = (pixel_statistics if type(frames) is Tensor else _pixel_statistics)(frames.device)
    return (frames.movedim(-1, 1).float() / 255 - mean) / std


def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation on a device. Cached, since each copy to a device makes the host wait.

    A tracer (torch.export, ONNX, torch.compile) gets new tensors, since its fake tensors must not outlive the trace.
    """
    if torch.compiler.is_compiling():
        return _pixel_statistics(device)
    if device not in _statistics:
        with torch.inference_mode(False):
            made = _pixel_statistics(device)
        if type(made[0]) is not Tensor:
            return made
        _statistics[device] = made
    return _statistics[device]


_statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, device=device)[:, None, None, None] for x in (MEAN, STD))
    return mean, std


@dataclass(frozen=True)
class View:
    """Clips of equal shape, and the tokens that the encoder reads of each."""

    frames: Float[Tensor, "B C T Y X"]
    """Normalised pixels. Several views may share them."""

    index: Int[Tensor, "B V"] | None = None
    """Sorted ids of the visible tokens, or None for all tokens."""


class Encoder(nn.Module):
    """Video transformer from the pixels of visible tokens to their features."""

    def __init__(self, settings: Model, *, seed: int = 0, attention: Backend = "sdpa"):
        """Build the encoder and initialize it, unless on the meta device.

        Args:
            settings: sizes, patch, positions, levels.
            seed: determines the initial weights, independently of device and sharding.
            attention: backend for packed sequences, see `vjepa.nn.attention.choose`.
        """
        super().__init__()
        size = settings.encoder
        self.settings = settings
        self.attention: Backend = attention
        self.patch_embed = self._patch_embed(settings.tubelet_frames)
        if settings.still_tokens:
            self.patch_embed_img = self._patch_embed(1)
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

    def _patch_embed(self, frames: int) -> PatchEmbed:
        settings = self.settings
        return PatchEmbed(channels=3, tubelet_frames=frames, patch_px=settings.patch_px, width=settings.encoder.width)

    def init_weights(self, seed: int = 0) -> None:
        """Initialize all parameters. Call it after `to_empty` if the encoder was built on the meta device."""
        init_weights(self, seed=seed, name="encoder", std=self.settings.init_std)

    def forward(
        self, views: Sequence[View], *, levels: bool = False, class_token: bool = False
    ) -> list[Float[Tensor, "_B _V LD"]]:
        """Encode all views in a packed pass. Attention stays within each clip of each view.

        Args:
            views: any mixture of clip lengths, picture sizes and masks.
            levels: return the features of all `settings.levels` side by side, the last block's last. Otherwise L = 1.
            class_token: return the class token's feature too, as the first.

        Returns:
            For each view the features of its visible tokens, after the norm of their level.

        Raises:
            BadInput: frames are not a whole number of tokens.
        """
        grids = [Grid.of(t, y, x, self.settings) for t, y, x in (view.frames.shape[2:] for view in views)]
        ids = [
            view.index if view.index is not None else _all_ids(view, g) for view, g in zip(views, grids, strict=True)
        ]
        tokens = self._embed(views, grids, ids)
        runs = [(each.shape[0], each.shape[1]) for each in tokens]  # `len` would fix the batch of `torch.export`
        x = torch.cat([each.flatten(0, 1) for each in tokens])  # [S D]
        rotation = self._rotation(grids, ids)
        segments = self._segments(grids, ids, runs, x.device)
        norms, first = self._norms(levels=levels), int(self.settings.class_token and not class_token)
        features = []  # of each level, of each view
        for number, block in enumerate(self.blocks):
            x = block(x, rotation, segments)
            if number in norms:
                parts = x.split([count * length for count, length in runs])
                # The norm comes last, since FSDP2 does not allow views of a tensor to be returned.
                features.append(
                    [norms[number](part.unflatten(0, run)[:, first:]) for part, run in zip(parts, runs, strict=True)]
                )
        if len(features) == 1:
            return features[0]
        return [torch.cat(of_view, dim=-1) for of_view in zip(*features, strict=True)]

    def _embed(
        self, views: Sequence[View], grids: Sequence[Grid], ids: Sequence[Tensor]
    ) -> list[Float[Tensor, "_B _V D"]]:
        """Embed the visible tokens of all views. A class token comes first."""
        if self.settings.still_tokens:
            tokens = self._embed_stills_and_clips(views)
        else:
            tokens = [self.patch_embed(view.frames, view.index) for view in views]
        if self.settings.rope == "sincos":
            positions = [sine_cosine(g, i, self.settings.encoder.width) for g, i in zip(grids, ids, strict=True)]
            tokens = [each + place.to(each.dtype) for each, place in zip(tokens, positions, strict=True)]
        if self.settings.class_token:
            tokens = [
                torch.cat((self.cls_token.to(each.dtype).expand(each.shape[0], -1, -1), each), 1) for each in tokens
            ]
        return tokens

    def _embed_stills_and_clips(self, views: Sequence[View]) -> list[Tensor]:
        """Embed still pictures and clips with patch embeddings of their own, and add the mark of their kind."""
        tokens = []
        for view in views:
            still = view.frames.shape[2] == 1
            embed, mark = (
                (self.patch_embed_img, self.img_mod_embed) if still else (self.patch_embed, self.video_mod_embed)
            )
            each = embed(view.frames, view.index)
            tokens.append(each + mark.to(each.dtype))
        # All parameters are used in every batch: FSDP2 returns wrong gradients where ranks use different parameters.
        unused = (
            *self.patch_embed.parameters(),
            *self.patch_embed_img.parameters(),
            self.img_mod_embed,
            self.video_mod_embed,
        )
        tokens[0] = tokens[0] + 0.0 * torch.stack([p.flatten()[0] for p in unused]).sum().to(tokens[0].dtype)
        return tokens

    def _rotation(self, grids: Sequence[Grid], ids: Sequence[Tensor]) -> Rotation:
        """Compute the rotary positions of the packed tokens. A class token has id 0, where no channel rotates."""
        if self.settings.class_token:
            ids = [F.pad(each, (1, 0)) for each in ids]
        return rotations(
            list(zip(grids, ids, strict=True)),
            head_width=self.settings.encoder.width // self.settings.encoder.heads,
            form=self.settings.rope,
            cells=self.settings.rope_cells,
        )

    def _segments(
        self, grids: Sequence[Grid], ids: Sequence[Tensor], runs: Sequence[Run], device: torch.device
    ) -> Segments:
        """Describe which packed tokens attend to each other. A causal class token comes after the end of the clip."""
        times = oldest = None
        if self.settings.causal:
            of_view = [each // grid.cells for each, grid in zip(ids, grids, strict=True)]
            window = getattr(self.settings, "window", None)  # older exports that are read without pydantic lack it
            if window is not None:
                reach = [each - (window - 1) for each in of_view]
                if self.settings.class_token:  # the class token sees as many tubelets as the tokens of the last one
                    reach = [F.pad(each, (1, 0), value=g.t - window) for each, g in zip(reach, grids, strict=True)]
                oldest = torch.cat([each.flatten() for each in reach])
            if self.settings.class_token:
                of_view = [F.pad(each, (1, 0), value=grid.t) for each, grid in zip(of_view, grids, strict=True)]
            times = torch.cat([each.flatten() for each in of_view])
        return Segments.of(runs, backend=self.attention, device=device, times=times, oldest=oldest)

    @property
    def last_norm(self) -> nn.Module:
        """Norm of the features of the last block."""
        return next(iter(self._norms(levels=False).values()))

    def _norms(self, *, levels: bool) -> dict[int, nn.Module]:
        """Return the blocks whose features are returned, and the norm of each."""
        last = len(self.blocks) - 1
        if not self.settings.levels:
            return {last: self.norm}
        all_levels = dict(zip(self.settings.levels, self.norms_block, strict=True))
        return all_levels if levels else {last: all_levels[last]}


def _all_ids(view: View, grid: Grid) -> Tensor:
    return torch.arange(grid.tokens, device=view.frames.device).expand(view.frames.shape[0], -1)
