"""Building blocks of encoder and predictor: patch embedding, attention, MLP, transformer block.

Letters: B clips, C channels of a pixel, T frames, Y X pixels, V tokens of a clip, S tokens of all packed sequences,
D width, H heads, d channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjepa.nn.attention import Segments, attention
from vjepa.nn.grid import Grid
from vjepa.nn.positions import Rotation, rotate
from vjepa.nn.shapes import Float, Int, Transformer

NORM_EPS = 1e-6  # V-JEPA 2; torch's own default is 1e-5


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a packed tensor."""

    def __init__(self, settings: Transformer):
        super().__init__()
        self.heads = settings.heads
        self.qkv = nn.Linear(settings.width, 3 * settings.width)
        self.proj = nn.Linear(settings.width, settings.width)

    def forward(self, x: Float[Tensor, "S D"], rotation: Rotation, segments: Segments) -> Float[Tensor, "S D"]:
        q, k, v = self.project(x, rotation)
        return self.proj(attention(q, k, v, segments).flatten(1))

    def project(self, x: Float[Tensor, "S D"], rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [S H d], the first two rotated."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(qkv[:, :2], rotation).unbind(1)
        return q, k, qkv[:, 2]


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, settings: Transformer):
        super().__init__()
        hidden = int(settings.width * settings.mlp_ratio)
        self.fc1 = nn.Linear(settings.width, hidden)
        self.fc2 = nn.Linear(hidden, settings.width)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, settings: Transformer):
        super().__init__()
        self.norm1 = nn.LayerNorm(settings.width, eps=NORM_EPS)
        self.attn = Attention(settings)
        self.norm2 = nn.LayerNorm(settings.width, eps=NORM_EPS)
        self.mlp = MLP(settings)

    def forward(self, x: Float[Tensor, "S D"], rotation: Rotation, segments: Segments) -> Float[Tensor, "S D"]:
        x = x + self.attn(self.norm1(x), rotation, segments)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Embed each tubelet patch as a token: a linear layer, stored as a convolution for its parameter names."""

    def __init__(self, *, channels: int, tubelet_frames: int, patch_px: int, width: int):
        super().__init__()
        self.size = (tubelet_frames, patch_px, patch_px)
        self.proj = nn.Conv3d(channels, width, self.size, self.size)

    def forward(
        self, frames: Float[Tensor, "B C T Y X"], index: Int[Tensor, "B V"] | None = None
    ) -> Float[Tensor, "B V D"]:
        """Embed the tokens of `index`, by default all. Pixels of other tokens are not read.

        On the CPU, without an index, this calls the convolution, so that features equal the reference's bit for bit.
        Elsewhere it is a matrix product, since torch's 3-D convolutions in bf16 were slow, used too much memory or gave
        wrong results in several releases (pytorch #166643, #166122, #163539).
        """
        weight = self.proj.weight
        frames = frames.to(weight.dtype)
        if index is None and frames.device.type == "cpu":
            return self.proj(frames).flatten(2).transpose(1, 2)
        (tubelet, patch, _), (_, _, t, y, x) = self.size, frames.shape
        grid = Grid(t // tubelet, y // patch, x // patch)
        cut = frames.unflatten(2, (grid.t, tubelet)).unflatten(4, (grid.h, patch)).unflatten(6, (grid.w, patch))
        cut = cut.permute(0, 2, 4, 6, 1, 3, 5, 7)  # [B t h w C tubelet patch patch], a view
        if index is None:
            pixels = cut.flatten(1, 3)
        else:
            clip = torch.arange(len(index), device=index.device)[:, None]
            cell = index % grid.cells
            pixels = cut[clip, index // grid.cells, cell // grid.w, cell % grid.w]
        return F.linear(pixels.flatten(2), weight.flatten(1), self.proj.bias)
