"""What encoder and predictor are made of: tokens from pixels, rotary positions in three axes, the block.

Letters: B clips, C channels of a pixel, N tokens of a clip, V those kept, S tokens of all packed sequences, D width,
H heads, d channels of a head. In a list each entry has its own: _B and _V.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vjepa.nn.attention import Segments, attention
from vjepa.nn.grid import Grid
from vjepa.nn.shapes import Float, Int, Transformer

NORM_EPS = 1e-6  # V-JEPA 2; torch's own default is 1e-5


class Rotation(NamedTuple):
    """Cosines and sines that turn the channels of a head by the place of its token; 1 and 0 where none turns."""

    cos: Float[Tensor, "S 1 1 d"]
    sin: Float[Tensor, "S 1 1 d"]


def axis_channels(head_width: int) -> int:
    """Channels of a head that turn with one axis; time, height and width have as many each, the rest do not turn.

    64 channels: 20 + 20 + 20, and 4 at rest.
    """
    return 2 * (head_width // 3 // 2)


def rotations(
    places: Sequence[tuple[Grid, Int[Tensor, "_B _V"]]],
    *,
    head_width: int,
    form: Literal["tiled", "interleaved", "sincos"],
    cells: int | None = None,
) -> Rotation:
    """Work out how to turn every token of a packed tensor, once for all blocks.

    Pair i of an axis with n channels turns by position / 10000^(2i / n). All in fp32, whatever the activations are:
    an angle in bf16 is off by up to 0.03 rad at position 32, and by 0.07 at 64.

    A head of an axis with 4 channels, pairs (x0 x1) (x2 x3), angles a b:
        interleaved   cos a  cos a  cos b  cos b      a rotation: q.k depends on the distance only
        tiled         cos a  cos b  cos a  cos b      what V-JEPA 2 trained with and Hugging Face runs; not a rotation

    Args:
        places: for each run of sequences its grid and token ids, in the order of the packed tensor.
        head_width: channels of a head.
        form: which channels share an angle; nothing turns with `sincos`.
        cells: stretch rows and columns, each to 0 .. cells - 1; by default they are counted.

    Returns:
        Tables for S tokens.

    Source: V-JEPA 2 (arXiv:2506.09985), 3-D RoPE; `interleaved` as in V-JEPA 2.1 (arXiv:2603.14482).
    """
    channels = axis_channels(head_width)
    device = places[0][1].device
    exponents = torch.arange(channels // 2, dtype=torch.float32, device=device) / (channels / 2)
    speeds = 1.0 / 10000**exponents
    axes = []
    for grid, ids in places:
        ids = ids.flatten()
        cell = ids % grid.cells
        place = [ids // grid.cells, cell // grid.w, cell % grid.w]
        if cells is not None:
            place[1:] = (
                each * ((cells - 1) / max(1, n - 1)) for each, n in zip(place[1:], (grid.h, grid.w), strict=True)
            )
        axes.append(torch.stack([each.float() for each in place], dim=-1))
    if form == "sincos":
        speeds = torch.zeros_like(speeds)
    angles = torch.cat(axes)[..., None] * speeds  # [S 3 channels/2]
    angles = angles.repeat_interleave(2, dim=-1) if form == "interleaved" else angles.repeat(1, 1, 2)
    angles = F.pad(angles.flatten(1), (0, head_width - 3 * channels))  # at rest: angle 0
    angles = angles[:, None, None, :]
    return Rotation(angles.cos(), angles.sin())


def sine_cosine(grid: Grid, ids: Int[Tensor, "B V"], width: int) -> Float[Tensor, "B V D"]:
    """Work out positions that are added to tokens: time, rows, columns, a third of the channels each.

    Channels of an axis are sines, then cosines, of position / 10000^(2i / n), n an even number of channels; what is
    beyond the width is cut off.

    Args:
        grid: of the clip.
        ids: tokens.
        width: channels D.

    Source: V-JEPA (arXiv:2404.08471), fixed 3-D sine-cosine positions with equal parts for all axes.
    """
    channels = 2 * math.ceil(width / 6)
    exponents = torch.arange(channels // 2, dtype=torch.float64, device=ids.device) / (channels / 2)
    speeds = 1.0 / 10000**exponents
    cell = ids % grid.cells
    angles = [place[..., None] * speeds for place in (ids // grid.cells, cell // grid.w, cell % grid.w)]
    parts = [part for angle in angles for part in (angle.sin(), angle.cos())]
    return torch.cat(parts, dim=-1)[..., :width].float()


def rotate(x: Float[Tensor, "S n H d"], rotation: Rotation) -> Float[Tensor, "S n H d"]:
    """Turn neighbouring pairs of channels: (a, b) to (a cos - b sin, b cos + a sin), in fp32, rounded once."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return (x * rotation.cos + turned * rotation.sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence of a packed tensor."""

    def __init__(self, settings: Transformer):
        super().__init__()
        self.heads = settings.heads
        self.qkv = nn.Linear(settings.width, 3 * settings.width)
        self.proj = nn.Linear(settings.width, settings.width)

    def forward(self, x: Float[Tensor, "S D"], rotation: Rotation, segments: Segments) -> Float[Tensor, "S D"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(qkv[:, :2], rotation).unbind(1)  # [S H d] each
        return self.proj(attention(q, k, qkv[:, 2], segments).flatten(1))


class MLP(nn.Module):
    """Two linear maps with a GELU between."""

    def __init__(self, settings: Transformer):
        super().__init__()
        hidden = int(settings.width * settings.mlp_ratio)
        self.fc1 = nn.Linear(settings.width, hidden)
        self.fc2 = nn.Linear(hidden, settings.width)

    def forward(self, x: Float[Tensor, "S D"]) -> Float[Tensor, "S D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One layer of a transformer, norms first."""

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
    """Pixels to tokens: one linear map of each tubelet, kept as a convolution's weight for its name and shape."""

    def __init__(self, *, channels: int, tubelet_frames: int, patch_px: int, width: int):
        super().__init__()
        self.size = (tubelet_frames, patch_px, patch_px)
        self.proj = nn.Conv3d(channels, width, self.size, self.size)

    def forward(
        self, frames: Float[Tensor, "B C T Y X"], index: Int[Tensor, "B V"] | None = None
    ) -> Float[Tensor, "B V D"]:
        """Embed the tokens of `index`, or all.

        Only the pixels of visible tokens are read. On the CPU, without an index, the convolution is called as such, so
        that features equal the reference's bit by bit; elsewhere it is written as a matrix product, since torch's 3-D
        convolutions in bf16 were slow, hungry or wrong in several releases (pytorch #166643, #166122, #163539).
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


def init_weights(module: nn.Module, *, seed: int, name: str, std: float = 0.02) -> None:
    """Fill every parameter with its first value: a function of the seed, the parameter's name and nothing else.

    Matrices are normal with deviation `std`, those that write into the residual stream (`attn.proj`, `mlp.fc2`) divided
    by sqrt(2 * layer), layer = 1, 2, ...; norms are one, biases and mask tokens zero, marks of pictures and clips next
    to zero. The values depend neither on the device nor on how parameters are sharded: each rank draws a whole
    parameter on the CPU and keeps its part. (V-JEPA 2 truncates at 2, a hundred deviations, that is nowhere.)

    Args:
        module: encoder or predictor; its parameters may be sharded, or fresh from `to_empty`.
        seed: seed of the run.
        name: keeps modules apart that have parameters of the same name.
        std: deviation of matrices; `model.init_std`.
    """
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            owner, _, last = path.rpartition(".")
            if last in ("bias", "mask_tokens"):
                parameter.zero_()
            elif "norm" in owner:
                parameter.fill_(1.0)
            else:
                digest = hashlib.blake2b(f"{seed}/{name}/{path}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
                deviation = 1e-6 if last.endswith("mod_embed") else std
                values = torch.empty(parameter.shape, dtype=torch.float32).normal_(std=deviation, generator=generator)
                if path.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                    layer = int(path.split(".")[1]) + 1
                    values /= (2 * layer) ** 0.5
                _keep(parameter, values)


def _keep(parameter: Tensor, values: Tensor) -> None:
    """Write whole values into a parameter that may be sharded; no communication."""
    if isinstance(parameter, DTensor):
        whole = values.to(parameter.device)
        shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(values)
