"""A clone of facebookresearch/vjepa2, made importable for the benchmarks that compare with it.

    git clone https://github.com/facebookresearch/vjepa2 /somewhere
    export VJEPA2_REFERENCE=/somewhere

It is imported and called, never changed. Of its packages torch, numpy and, for its loader, decord are needed.
"""

import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vjepa.config import Model
from vjepa.methods.mask_settings import ReferenceMask
from vjepa.nn.grid import Grid

UNUSED = {
    "cv2": (),
    "einops": (),
    "psutil": (),
    "timm": ("models", "models.layers"),
    "torchvision": ("transforms", "transforms.functional"),
}
"""Packages that it imports and that nothing compared here calls, with their modules."""


def folder() -> Path | None:
    """Return the folder of the clone, or None when the variable is not set."""
    named = os.environ.get("VJEPA2_REFERENCE")
    if named is None:
        return None
    if not (Path(named) / "src" / "models" / "predictor.py").exists():
        sys.exit(f"VJEPA2_REFERENCE must name a clone of facebookresearch/vjepa2, got {named!r}; clone it and set it")
    return Path(named)


@contextmanager
def reference() -> Iterator[Path]:
    """Make its modules importable and hide its warnings in the block. Yields its folder."""
    clone = folder()
    if clone is None:
        sys.exit("VJEPA2_REFERENCE is not set; clone facebookresearch/vjepa2 and set it to the folder")
    for package, modules in UNUSED.items():
        _stand_in(package, modules)
    if str(clone) not in sys.path:
        sys.path.insert(0, str(clone))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield clone


def networks(model: Model, *, px: int, frames: int) -> tuple[nn.Module, nn.Module]:
    """Build its encoder and its predictor with two mask tokens, in the size of a model of ours."""
    size, narrow = model.encoder, model.predictor
    common: dict[str, Any] = {
        "img_size": (px, px),
        "patch_size": model.patch_px,
        "num_frames": frames,
        "tubelet_size": model.tubelet_frames,
        "qkv_bias": True,
        "use_rope": True,
        "use_sdpa": True,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
        "embed_dim": size.width,
    }
    encoder = importlib.import_module("src.models.vision_transformer").VisionTransformer(
        **common, depth=size.depth, num_heads=size.heads, mlp_ratio=size.mlp_ratio
    )
    predictor = importlib.import_module("src.models.predictor").VisionTransformerPredictor(
        **common,
        predictor_embed_dim=narrow.width,
        depth=narrow.depth,
        num_heads=narrow.heads,
        mlp_ratio=narrow.mlp_ratio,
        use_mask_tokens=True,
        num_mask_tokens=2,
    )
    return encoder, predictor


def sampler(kind: ReferenceMask, grid: Grid) -> Callable[[int], Any]:
    """Return its mask sampler: a number of clips to [visible, hidden], by torch's global generator."""
    return importlib.import_module("src.masks.multiseq_multiblock3d")._MaskGenerator(
        crop_size=(16 * grid.h, 16 * grid.w),
        num_frames=2 * grid.t,
        spatial_patch_size=(16, 16),
        temporal_patch_size=2,
        spatial_pred_mask_scale=kind.spatial_scale,
        temporal_pred_mask_scale=kind.temporal_scale,
        aspect_ratio=kind.aspect,
        npred=kind.blocks,
    )


def _stand_in(package: str, modules: tuple[str, ...]) -> None:
    """Put an empty package in the place of a package that is missing or cannot be loaded."""
    try:
        for name in (package, *(f"{package}.{module}" for module in modules)):
            importlib.import_module(name)
        return
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
    for name in (package, *(f"{package}.{module}" for module in modules)):
        sys.modules[name] = _Absent(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


class _Absent(types.ModuleType):
    """A package that is not here. All its functions do nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # a package, for the import system

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None
