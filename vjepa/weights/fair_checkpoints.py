"""Read checkpoint files of V-JEPA as their authors release them (`.pt`, `.pth.tar`) and infer our settings from them.

| release | recognized by | parts in the file |
|---|---|---|
| V-JEPA 2 | no tensors of positions (rotary) | `encoder`, `target_encoder`, `predictor` |
| V-JEPA | `pos_embed`: fixed sines and cosines, compared with ours | the same |
| V-JEPA 2.1 | `norms_block`, `patch_embed_img` | the same, or `ema_encoder` alone |

Parameter names are ours behind wrappers (`module.backbone.`). Files are read with `weights_only`, so no code in them is
run.
"""

import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from vjepa import config
from vjepa.nn.grid import Grid
from vjepa.nn.positions import sine_cosine
from vjepa.weights.tensors import some
from vjepa.weights.weights import sized_encoder
from vjepa_data.errors import BadInput

# Names of the parts; the first that the file has is used.
ONLINE, AVERAGE, PREDICTOR = ("encoder",), ("target_encoder", "ema_encoder"), ("predictor",)
WRAPPERS = re.compile(r"^(module\.|backbone\.|_orig_mod\.)+")

# Parts of tensor names in checkpoints that are not supported.
UNSUPPORTED = (
    (".mlp.fc3.", "a model with SwiGLU"),
    ("action_encoder.", "a V-JEPA 2-AC checkpoint"),
)

# V-JEPA 2.1's levels by depth, where they are not the ends of quarters (arXiv:2603.14482).
LEVELS = {48: (11, 23, 37, 47)}


@dataclass(frozen=True)
class Sizes:
    """Settings that cannot be inferred from the tensors of a file."""

    heads: int | None = None
    """Attention heads of the encoder; by default from the registry's model of this width and depth."""
    predictor_heads: int | None = None
    """By default 12 as in V-JEPA 2; for the first V-JEPA as many as the encoder has."""
    px: int | None = None
    """By default inferred from `pos_embed`, or 256."""
    frames: int | None = None
    """By default inferred from `pos_embed`, or 16."""
    fps: float = 4.0
    mask_tokens: tuple[int, ...] | None = None
    """Mask token of the file for each of our kinds of mask; by default all tokens in their order. V-JEPA 2 trained
    only the first token of files with one clip length, so use (0, 0) for two kinds of mask."""


@dataclass(frozen=True)
class FairCheckpoint:
    """Contents of a file, with the settings inferred from them."""

    model: config.Model
    px: int
    frames: int
    online: dict[str, Tensor] | None
    average: dict[str, Tensor] | None
    predictor: dict[str, Tensor] | None


def read_fair_checkpoint(path: Path, sizes: Sizes) -> FairCheckpoint:
    """Read a file and infer the model's settings. Tensors stay on disk until they are used.

    Raises:
        BadInput: the file holds Python objects, or an unsupported model.
    """
    content = _read_file(path)
    online, average, predictor = (_part(content, names) for names in (ONLINE, AVERAGE, PREDICTOR))
    encoder = average if online is None else online
    if encoder is None:
        raise BadInput(f"{path} holds {some(list(content))}; expected the parts encoder, target_encoder, predictor")
    every = {**encoder, **(predictor or {})}
    for mark, kind in UNSUPPORTED:
        if found := [name for name in every if mark in f".{name}" or name.startswith(mark)]:
            raise BadInput(f"{path} is {kind} ({some(found)}), which is not supported; give a V-JEPA, 2 or 2.1 encoder")
    model = _infer(path, encoder, predictor, sizes)
    px, frames = sizes.px or 256, sizes.frames or 16
    if "pos_embed" in encoder:
        grid = _grid_of(path, encoder["pos_embed"], model)
        px, frames = grid.h * model.patch_px, grid.t * model.tubelet_frames
        for part in (online, average, predictor):
            _drop_positions(path, part, grid)
    return FairCheckpoint(model, px, frames, online, average, predictor)


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise BadInput(
            f"{path} holds Python objects beside tensors and numbers; it is not read, because that would run its code"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({str(error).splitlines()[0]}); is it a complete torch file?") from None
    if not isinstance(content, Mapping):
        raise BadInput(
            f"{path} holds a {type(content).__name__}; expected the parts encoder, target_encoder, predictor"
        )
    return content


def _part(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor] | None:
    """Return the tensors of one part under our names: without wrappers, the mask tokens as one tensor."""
    found = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
    if found is None:
        return None
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in found.items()}
    tokens = sorted((name for name in tensors if name.startswith("mask_tokens.")), key=lambda name: int(name[12:]))
    if tokens:
        tensors["mask_tokens"] = torch.stack([tensors.pop(name) for name in tokens])  # [n 1 1 P]
    return tensors


def _infer(
    path: Path, encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor] | None, sizes: Sizes
) -> config.Model:
    """Infer the settings of a model from the shapes of its tensors."""
    try:
        width, _, tubelet, patch, _ = encoder["patch_embed.proj.weight"].shape
        depth = _depth(encoder, "blocks")
        ratio = _ratio(encoder["blocks.0.mlp.fc1.weight"].shape[0], width)
    except (KeyError, ValueError):
        raise BadInput(
            f"{path}: its encoder has {some(sorted(encoder))}; expected patch_embed.proj.weight and blocks.0.*"
        ) from None
    heads = sizes.heads
    if heads is None:
        known = [size[2] for size in config.ENCODERS.values() if size[:2] == (width, depth)]
        if not known:
            raise BadInput(
                f"{path}: an encoder of width {width} and depth {depth} is not in the table of sizes; give its --heads"
            )
        heads = known[0]
    settings: dict[str, Any] = {"encoder": sized_encoder(width, depth, heads, ratio)}
    predictor_heads = sizes.predictor_heads or 12
    if "pos_embed" in encoder:
        settings["rope"] = "sincos"
        predictor_heads = sizes.predictor_heads or heads
    elif levels := _depth(encoder, "norms_block"):
        ends = LEVELS.get(depth, tuple((level + 1) * depth // levels - 1 for level in range(levels)))
        still = "patch_embed_img.proj.weight" in encoder
        settings |= {"levels": ends, "still_tokens": still, "rope": "interleaved", "rope_cells": 16}
        settings["predict_context"] = "predictor_proj_context.weight" in (predictor or {})
    if predictor is not None and "predictor_norm.weight" in predictor:
        narrow = predictor["predictor_norm.weight"].shape[0]
        fc1 = predictor.get("predictor_blocks.0.mlp.fc1.weight")
        settings["predictor"] = {
            "width": narrow,
            "depth": max(1, _depth(predictor, "predictor_blocks")),
            "heads": predictor_heads,
            "mlp_ratio": _ratio(fc1.shape[0], narrow) if fc1 is not None else 4.0,
        }
    try:
        return config.Model.model_validate({**settings, "patch_px": patch, "tubelet_frames": tubelet})
    except ValidationError as error:
        raise BadInput(f"{path}: its sizes are not a valid model: {error.errors()[0]['msg']}") from None


def _ratio(hidden: int, width: int) -> float:
    """Return a ratio from which the network computes the same number of hidden channels."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _depth(tensors: Iterable[str], stack: str) -> int:
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{stack}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


# ---- the first V-JEPA


def _grid_of(path: Path, table: Tensor, model: config.Model) -> Grid:
    """Return the grid of these sines and cosines.

    Raises:
        BadInput: they fit no grid.
    """
    tokens = table.shape[1]
    for side in range(1, math.isqrt(tokens) + 1):
        grid = Grid(tokens // side**2, side, side)
        if grid.tokens == tokens and _differs(table, grid) == 0:
            return grid
    raise BadInput(
        f"{path}: its pos_embed {list(table.shape)} is not a table of sines and cosines of time, rows and columns in "
        "equal parts; learned positions are not supported"
    )


def _drop_positions(path: Path, part: dict[str, Tensor] | None, grid: Grid) -> None:
    """Remove the table of positions after comparing it with the positions that our network computes."""
    for name in ("pos_embed", "predictor_pos_embed"):
        if part and (table := part.pop(name, None)) is not None and (difference := _differs(table, grid)):
            raise BadInput(f"{path}: {name} differs from the sines and cosines of {grid} by {difference:.2g}")


def _differs(table: Tensor, grid: Grid) -> float:
    """Return the largest difference of a table [1 N D] from our positions; 0 below rounding of the last bit."""
    if table.dim() != 3 or table.shape[1] != grid.tokens:
        return math.inf
    ours = sine_cosine(grid, torch.arange(grid.tokens)[None], table.shape[2])
    difference = (table.float() - ours).abs().max().item()
    return difference if difference > 2e-7 else 0.0
