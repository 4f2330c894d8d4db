"""Random resized crop and flip of uint8 frames, as functions of (seed, step, slot)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from vjepa_data.rng import generator
from vjepa_data.settings import Crop


@dataclass(frozen=True)
class CropBox:
    """A rectangle of the picture, in pixels, and whether it is flipped horizontally."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def inside(self, other: "CropBox") -> "CropBox":
        """Return the same rectangle in the coordinates of `other`, which contains it."""
        return replace(self, top=self.top - other.top, left=self.left - other.left)


def around(boxes: Sequence[CropBox]) -> CropBox:
    """Return the smallest rectangle that contains all boxes."""
    top, left = min(b.top for b in boxes), min(b.left for b in boxes)
    bottom, right = max(b.top + b.height for b in boxes), max(b.left + b.width for b in boxes)
    return CropBox(top, left, bottom - top, right - left, False)


def choose(crop: Crop, *, height: int, width: int, seed: int, step: int, slot: int, attempt: int = 0) -> CropBox:
    """Draw the crop of a slot. All frames of the slot share it.

    The area is uniform in `crop.scale` of the frame, and the logarithm of width / height is uniform in `crop.aspect`. A
    box that does not fit is drawn again, up to ten times. After that the largest centred box of an allowed aspect is
    taken.

    Args:
        crop: the settings.
        height, width: size of the frames, pixels.
        seed, step, slot, attempt: the numbers that determine the draw.

    Source: random resized crop, Szegedy et al. (arXiv:1409.4842). V-JEPA 2: area 0.3 to 1, aspect 0.75 to 1.35.
    """
    draws = generator(seed, "crop", step, slot, attempt)
    flip = bool(draws.random() < crop.flip)
    low, high = math.log(crop.aspect[0]), math.log(crop.aspect[1])
    for area, log_aspect in draws.random((10, 2)).tolist():
        pixels = (crop.scale[0] + area * (crop.scale[1] - crop.scale[0])) * height * width
        aspect = math.exp(low + log_aspect * (high - low))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = draws.integers(0, [height - h + 1, width - w + 1]).tolist()
            return CropBox(top, left, h, w, flip)
    aspect = min(max(width / height, crop.aspect[0]), crop.aspect[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    return CropBox((height - h) // 2, (width - w) // 2, h, w, flip)


def cut_out(frames: np.ndarray, box: CropBox, px: int, *, rows: np.ndarray | None = None) -> UInt8[Tensor, "T px px C"]:
    """Cut a box out of every frame and scale it to a square: `cut`, then `scale`.

    Args:
        frames: uint8 [N H W C], contiguous.
        box: the rectangle to cut out.
        px: height and width of the result.
        rows: numbers of the frames to take, int [T], ascending. Default: all.
    """
    return scale(cut(frames, box, rows=rows), box, px)


def cut(frames: np.ndarray, box: CropBox, *, rows: np.ndarray | None = None) -> UInt8[Tensor, "T h w C"]:
    """Cut a box out of every frame. The result is a view, unless `rows` omits or repeats frames."""
    part = frames[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if rows is not None and not np.array_equal(rows, np.arange(len(frames))):
        part = part[rows]
    return torch.from_numpy(part)


def scale(part: UInt8[Tensor, "T h w C"], box: CropBox, px: int) -> UInt8[Tensor, "T px px C"]:
    """Scale a cut-out to a square and flip it if the box says so, on its own device. The result is never a view.

    Bilinear with antialiasing. On a CPU the pixels stay uint8, and 16 frames of 456x256 to 256x256 take 1.4 ms on one
    core (benchmarks/README.md). A GPU computes in floats, which may differ by one level.
    """
    pictures = part.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    if (box.height, box.width) != (px, px):
        pictures = _resize(pictures, px) if pictures.is_cpu else _resize_by_floats(pictures, px)
    elif not box.flip:
        pictures = pictures.clone()
    pictures = pictures.permute(0, 2, 3, 1)
    return pictures.flip(2) if box.flip else pictures


def _resize(pictures: Tensor, px: int) -> Tensor:
    return torch.nn.functional.interpolate(pictures, (px, px), mode="bilinear", antialias=True)


def _resize_by_floats(pictures: UInt8[Tensor, "T C h w"], px: int) -> UInt8[Tensor, "T C px px"]:
    """Do the same as `_resize` on devices without a uint8 kernel."""
    return _resize(pictures.float(), px).round_().clamp_(0, 255).to(torch.uint8)
