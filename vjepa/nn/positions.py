"""Positions of tokens in time, height and width: rotary, and the sines and cosines of the first V-JEPA.

Letters: B clips, V tokens of a clip, S tokens of all packed sequences, D width, n tensors rotated together, H heads,
d channels of a head. In a list each entry has its own: _B and _V.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.nn.grid import Grid
from vjepa.nn.shapes import Float, Int


class Rotation(NamedTuple):
    """Cosines and sines that rotate the channels of a head by its token's position.

    They are 1 and 0 for unrotated channels. Where no channel rotates, d = 0.
    """

    cos: Float[Tensor, "S 1 1 d"]
    sin: Float[Tensor, "S 1 1 d"]


def axis_channels(head_width: int) -> int:
    """Return how many channels of a head rotate with each axis: an even number, the same for all three axes.

    The remaining channels are not rotated. 64 channels: 20 + 20 + 20, and 4 that are not rotated.
    """
    return 2 * (head_width // 3 // 2)


def axis_speeds(head_width: int, device: torch.device) -> Float[Tensor, " pairs"]:
    """Return the angle by which each pair of an axis' channels rotates from a position to the next, in radians."""
    pairs = axis_channels(head_width) // 2
    return 1.0 / 10000 ** (torch.arange(pairs, dtype=torch.float32, device=device) / pairs)


def rotations(
    positions: Sequence[tuple[Grid, Int[Tensor, "_B _V"]]],
    *,
    head_width: int,
    form: Literal["tiled", "interleaved", "sincos"],
    cells: int | None = None,
) -> Rotation:
    """Compute the rotation of every token of a packed tensor, once for all blocks.

    Pair i of an axis with n channels rotates by position / 10000^(2i / n). All in fp32, whatever the activations are:
    an angle in bf16 is off by up to 0.03 rad at position 32, and by 0.07 at 64.

    Example with 4 channels for an axis, pairs (x0 x1) (x2 x3), angles a b:
        interleaved   cos a  cos a  cos b  cos b      a rotation: q.k depends on the distance only
        tiled         cos a  cos b  cos a  cos b      trained by V-JEPA 2 and run by Hugging Face; not a rotation

    Args:
        positions: grid and token ids of each run of sequences, in the order of the packed tensor.
        head_width: channels of a head.
        form: which channels share an angle. With `sincos` no channel rotates, and the tables are empty.
        cells: stretch rows and columns, each to 0 .. cells - 1. By default they are counted.

    Returns:
        Tables for S tokens.

    Source: V-JEPA 2 (arXiv:2506.09985), 3-D RoPE, and `interleaved` as in V-JEPA 2.1 (arXiv:2603.14482).
    """
    device = positions[0][1].device
    if form == "sincos":
        empty = torch.empty(sum(ids.numel() for _, ids in positions), 1, 1, 0, device=device)
        return Rotation(empty, empty)
    channels = axis_channels(head_width)
    speeds = axis_speeds(head_width, device)
    axes = []
    for grid, ids in positions:
        ids = ids.flatten()
        cell = ids % grid.cells
        axis = [ids // grid.cells, cell // grid.w, cell % grid.w]
        if cells is not None:
            axis[1:] = (x * ((cells - 1) / max(1, n - 1)) for x, n in zip(axis[1:], (grid.h, grid.w), strict=True))
        axes.append(torch.stack([x.float() for x in axis], dim=-1))
    angles = torch.cat(axes)[..., None] * speeds  # [S 3 channels/2]
    angles = angles.repeat_interleave(2, dim=-1) if form == "interleaved" else angles.repeat(1, 1, 2)
    angles = F.pad(angles.flatten(1), (0, head_width - 3 * channels))  # angle 0 for the remaining channels
    angles = angles[:, None, None, :]
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Float[Tensor, "*B S n H d"], rotation: Rotation) -> Float[Tensor, "*B S n H d"]:
    """Rotate neighbouring pairs of channels: (a, b) to (a cos - b sin, b cos + a sin), in fp32, rounded once."""
    if not rotation.cos.shape[-1]:
        return x
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return (x * rotation.cos + turned * rotation.sin).to(x.dtype)


def sine_cosine(grid: Grid, ids: Int[Tensor, "B V"], width: int) -> Float[Tensor, "B V D"]:
    """Compute positions that are added to tokens: a third of the channels each for time, rows and columns.

    The channels of an axis are sines, then cosines, of position / 10000^(2i / n), n an even number of channels.
    Channels beyond the width are cut off.

    Args:
        grid: grid of the clip.
        ids: token ids.
        width: channels D.

    Source: V-JEPA (arXiv:2404.08471), fixed 3-D sine-cosine positions with equal parts for all axes.
    """
    channels = 2 * math.ceil(width / 6)
    exponents = torch.arange(channels // 2, dtype=torch.float64, device=ids.device) / (channels / 2)
    speeds = 1.0 / 10000**exponents
    token = torch.arange(grid.tokens, device=ids.device)  # once for all clips
    cell = token % grid.cells
    angles = [axis[:, None] * speeds for axis in (token // grid.cells, cell // grid.w, cell % grid.w)]
    parts = [part for angle in angles for part in (angle.sin(), angle.cos())]
    return torch.cat(parts, dim=-1)[:, :width].float()[ids]
