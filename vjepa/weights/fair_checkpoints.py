"""Read checkpoint files of V-JEPA as their authors release them (`.pt`, `.pth.tar`) and infer our settings from them.

| release | recognized by | parts in the file |
|---|---|---|
| V-JEPA 2.1 | `norms_block`, `patch_embed_img` | `encoder`, `target_encoder`, `predictor`, or `ema_encoder` alone |
| V-JEPA 2 | no table of positions, or an unused table and other marks | the same |
| V-JEPA 2-AC | the same, and `action_encoder` in the predictor | `encoder`, `predictor` |
| V-JEPA | `pos_embed`: fixed sines and cosines, compared with ours | the same |

The authors' own loader says of V-JEPA 2's files "state_dict has pos_embed but we use RoPE", so the table alone does
not tell the release: see `_release`. Parameter names are ours behind wrappers (`module.backbone.`), and forks also
write a flat mapping. Files are read with `weights_only`, so no code in them is run.
"""

import argparse
import logging
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vjepa import config
from vjepa.nn.grid import Grid
from vjepa.nn.positions import sine_cosine
from vjepa.weights.tensors import check_download, some
from vjepa.weights.weights import sized_encoder
from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)

# Names of the parts; the first that the file has is used.
ONLINE, AVERAGE, PREDICTOR = ("encoder",), ("target_encoder", "ema_encoder"), ("predictor",)
WRAPPERS = re.compile(r"^((module|backbone|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
INNER_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Names under which forks and trainers keep one flat mapping of all tensors, and prefixes of the tensors in it.
FLAT = ("state_dict", "model", "model_state_dict")
FLAT_PREFIX = re.compile(r"^((module|model|_orig_mod)\.)*")

# Types of values that forks keep with the tensors and that hold data alone: numpy's numbers and arrays, arguments.
HARMLESS: list[Any] = [
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.zeros(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    (np.zeros(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
    np.dtype,
    np.ndarray,
    argparse.Namespace,
]

Positions = Literal["rope", "sincos"]
"""Rotary positions (V-JEPA 2 and 2.1), or sines and cosines that are added to the tokens (the first V-JEPA)."""

# Parts of tensor names in checkpoints that are not supported.
UNSUPPORTED = ((".mlp.fc3.", "a model with SwiGLU"),)

ACTIONS = "action_encoder.weight"
"""Tensor of the predictor that tells a file of V-JEPA 2-AC. Its settings are in `vjepa.weights.import_dynamics`."""

# V-JEPA 2.1's levels by depth, where they are not the ends of quarters (arXiv:2603.14482).
LEVELS = {48: (11, 23, 37, 47)}

Objective = Literal["vjepa2", "vjepa2_1", "levjepa"]


@dataclass(frozen=True)
class Sizes:
    """Settings that cannot be inferred from the tensors of a file."""

    heads: int | None = None
    """Attention heads of the encoder, by default from the registry's model of this width and depth."""
    predictor_heads: int | None = None
    """By default 12 as in V-JEPA 2. For the first V-JEPA as many as the encoder has."""
    px: int | None = None
    """By default inferred from `pos_embed`, or 256."""
    frames: int | None = None
    """By default inferred from `pos_embed`, or 16."""
    fps: float = 4.0
    mask_tokens: tuple[int, ...] | None = None
    """Mask token of the file for each of our kinds of mask. By default all tokens in their order. V-JEPA 2 trained only
    the first token of files with a single clip length, so use (0, 0) for two kinds of mask."""
    positions: Positions | None = None
    """Positions of the model, by default recognized by several marks of the file."""
    objective: Objective | None = None
    """Method whose output layers an added predictor has. By default recognized by the encoder. Not for a file that has
    a predictor, whose layers determine it."""


@dataclass(frozen=True)
class FairCheckpoint:
    """Contents of a file, with the settings inferred from them."""

    model: config.Model
    px: int
    frames: int
    online: dict[str, Tensor] | None
    average: dict[str, Tensor] | None
    predictor: dict[str, Tensor] | None

    @property
    def has_actions(self) -> bool:
        """Whether the predictor is that of V-JEPA 2-AC."""
        return ACTIONS in (self.predictor or ())


def read_fair_checkpoint(path: Path, sizes: Sizes) -> FairCheckpoint:
    """Read a file and infer the model's settings. Tensors stay on disk until they are used.

    Raises:
        BadInput: the file holds Python objects, or an unsupported model.
    """
    content = _parts(_read_file(path))
    online, average, predictor = (_part(content, names) for names in (ONLINE, AVERAGE, PREDICTOR))
    encoder = average if online is None else online
    if encoder is None:
        raise BadInput(f"{path} holds {some(list(content))}; expected the parts encoder, target_encoder, predictor")
    every = {**encoder, **(predictor or {})}
    for mark, kind in UNSUPPORTED:
        if found := [name for name in every if mark in f".{name}" or name.startswith(mark)]:
            raise BadInput(f"{path} is {kind} ({some(found)}), which is not supported; give a V-JEPA, 2 or 2.1 encoder")
    release = _release(path, encoder, predictor, sizes.positions)
    model = _infer(path, encoder, predictor, sizes, release)
    grid = _grid_of(encoder["pos_embed"]) if "pos_embed" in encoder else None
    if release == "V-JEPA" and grid is None:
        raise BadInput(
            f"{path}: its pos_embed {list(encoder['pos_embed'].shape)} is not a table of sines and cosines of time, "
            "rows and columns in equal parts. Learned positions are not supported, and --positions rope ignores them."
        )
    px = sizes.px or (grid.h * model.patch_px if grid else 256)
    frames = sizes.frames or (grid.t * model.tubelet_frames if grid else 16)
    computed = grid if release == "V-JEPA" else None
    has_table = [_drop_positions(path, part, computed) for part in (online, average, predictor)]
    heads = f"{model.encoder.heads} heads" + (f", {model.predictor.heads} in the predictor" if predictor else "")
    unused = "; its pos_embed is left over and not used" if any(has_table) and computed is None else ""
    log.info(
        "%s is taken for %s with %s positions, %s, and clips of %d frames of %d px%s; to overrule: --positions, "
        "--heads, --predictor-heads, --frames, --px",
        *(path, release, model.rope, heads, frames, px, unused),
    )
    return FairCheckpoint(model, px, frames, online, average, predictor)


Release = Literal["V-JEPA", "V-JEPA 2", "V-JEPA 2.1"]


def _release(
    path: Path, encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor] | None, wanted: Positions | None
) -> Release:
    """Tell the release of a file by several marks.

    Raises:
        BadInput: the marks contradict each other, or the wanted positions do not fit the file.
    """
    if any(name.startswith(("norms_block.", "patch_embed_img.")) for name in encoder):
        if wanted == "sincos":
            raise BadInput(
                f"{path} is a V-JEPA 2.1 file (norms_block), whose positions are rotary; use --positions rope"
            )
        return "V-JEPA 2.1"
    table = encoder.get("pos_embed")
    if table is None or wanted == "rope":
        if wanted == "sincos":
            raise BadInput(f"{path} has no pos_embed, so its positions are not sines and cosines; use --positions rope")
        return "V-JEPA 2"
    if wanted == "sincos":
        return "V-JEPA"
    grid, tokens = _grid_of(table), (predictor or {}).get("mask_tokens")
    first, second = [], []
    if grid is not None and grid.h == 14:
        first.append(f"pos_embed is of {grid.t} x {grid.h} x {grid.w} tokens, as in V-JEPA's releases")
    if grid is not None and (grid.h == 16 or grid.t > 8):
        second.append(f"pos_embed is of {grid.t} x {grid.h} x {grid.w} tokens, as in V-JEPA 2's")
    if tokens is not None:
        marks = first if len(tokens) == 2 else second
        marks.append(f"{len(tokens)} mask tokens (the first V-JEPA has 2, V-JEPA 2 10)")
    if first and second:
        raise BadInput(
            f"{path} may be of V-JEPA ({'; '.join(first)}) or of V-JEPA 2 with an unused pos_embed "
            f"({'; '.join(second)}). Give --positions sincos for the first, --positions rope for the second."
        )
    return "V-JEPA 2" if second else "V-JEPA"


def _read_file(path: Path) -> Mapping[str, Any]:
    check_download(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # written before torch 1.6
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global:?|class) `?([\w.]+\.\w+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise BadInput(
            f"{path} holds Python objects in addition to tensors and numbers{what}. It is not read, because "
            "that would run its code. Where you trust it, save the parts encoder, target_encoder and "
            "predictor alone with torch.save."
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "it ends early")
        raise BadInput(f"{path} cannot be read ({reason}); is it a complete torch file?") from None
    if not isinstance(content, Mapping):
        raise BadInput(
            f"{path} holds a {type(content).__name__}; expected the parts encoder, target_encoder, predictor"
        )
    return content


def _parts(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parts of a file. A flat mapping of tensors, as forks write it, is cut by the names of the parts."""
    known = (*ONLINE, *AVERAGE, *PREDICTOR)
    if any(isinstance(content.get(name), Mapping) for name in known):
        return content
    inner = next((content[name] for name in FLAT if isinstance(content.get(name), Mapping) and content[name]), content)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in inner.items():
        if isinstance(tensor, Mapping) and name in known:
            return inner
        if isinstance(name, str) and isinstance(tensor, Tensor):
            first, _, rest = FLAT_PREFIX.sub("", name).partition(".")
            if first in known:
                parts.setdefault(first, {})[rest] = tensor
            else:
                parts.setdefault("encoder", {})[WRAPPERS.sub("", FLAT_PREFIX.sub("", name))] = tensor
    names = {INNER_WRAPPERS.sub("", WRAPPERS.sub("", name)) for part in parts.values() for name in part}
    return parts if "patch_embed.proj.weight" in names else content


def _part(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor] | None:
    """Return the tensors of a part under our names: without wrappers, the mask tokens as a single tensor."""
    found = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
    if found is None:
        return None
    tensors = {INNER_WRAPPERS.sub("", WRAPPERS.sub("", name)): tensor for name, tensor in found.items()}
    tokens = sorted((name for name in tensors if name.startswith("mask_tokens.")), key=lambda name: int(name[12:]))
    if tokens:
        tensors["mask_tokens"] = torch.stack([tensors.pop(name) for name in tokens])  # [n 1 1 P]
    return tensors


def _infer(
    path: Path, encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor] | None, sizes: Sizes, release: Release
) -> config.Model:
    """Infer the settings of a model from the shapes of its tensors."""
    try:
        width, _, tubelet, patch, _ = encoder["patch_embed.proj.weight"].shape
        depth = _depth(encoder, "blocks")
        ratio = _ratio(encoder["blocks.0.mlp.fc1.weight"].shape[0], width)
    except (KeyError, ValueError):
        shape = list(encoder["patch_embed.proj.weight"].shape) if "patch_embed.proj.weight" in encoder else []
        if len(shape) == 4:
            raise BadInput(
                f"{path} is an image model: its patch_embed.proj.weight {shape} has no axis of time; give a video model"
            ) from None
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
    settings: dict[str, Any] = {}
    predictor_heads = sizes.predictor_heads or 12
    if release == "V-JEPA":
        settings["rope"] = "sincos"
        predictor_heads = sizes.predictor_heads or heads
    elif release == "V-JEPA 2.1":
        levels = _depth(encoder, "norms_block")
        ends = LEVELS.get(depth, tuple((level + 1) * depth // levels - 1 for level in range(levels)))
        still = "patch_embed_img.proj.weight" in encoder
        settings |= {"levels": ends, "still_tokens": still, "rope": "interleaved", "rope_cells": 16}
        settings["predict_context"] = predictor is None or "predictor_proj_context.weight" in predictor
    if ACTIONS in (predictor or ()):
        settings["condition"] = "token"
        predictor_heads = sizes.predictor_heads or 16
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
        settings["encoder"] = sized_encoder(width, depth, heads, ratio)
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


# ---- tables of positions


def _grid_of(table: Tensor) -> Grid | None:
    """Return the grid of these sines and cosines [1 N D], or None if they fit no grid."""
    if table.dim() != 3:
        return None
    tokens = table.shape[1]
    for side in range(1, math.isqrt(tokens) + 1):
        grid = Grid(tokens // side**2, side, side)
        if grid.tokens == tokens and _differs(table, grid) == 0:
            return grid
    return None


def _drop_positions(path: Path, part: dict[str, Tensor] | None, grid: Grid | None) -> bool:
    """Remove the table of positions of a part and return whether there was a table.

    Args:
        path: the file.
        part: its tensors.
        grid: the grid whose positions our network computes, which the table must equal. None leaves the table unused.

    Raises:
        BadInput: the table differs.
    """
    tables = {name: part.pop(name) for name in ("pos_embed", "predictor_pos_embed") if part and name in part}
    for name, table in tables.items():
        if grid is not None and (difference := _differs(table, grid)):
            raise BadInput(f"{path}: {name} differs from the sines and cosines of {grid} by {difference:.2g}")
    return bool(tables)


def _differs(table: Tensor, grid: Grid) -> float:
    """Return the largest difference of a table [1 N D] from our positions, or 0 below rounding of the last bit."""
    if table.dim() != 3 or table.shape[1] != grid.tokens:
        return math.inf
    ours = sine_cosine(grid, torch.arange(grid.tokens)[None], table.shape[2])
    difference = (table.float() - ours).abs().max().item()
    return difference if difference > 2e-7 else 0.0
