"""Pretraining of video world models: predict the features of hidden tokens instead of pixels."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from vjepa.version import __version__ as __version__

if TYPE_CHECKING:
    from vjepa.weights.video_encoder import VideoEncoder
    from vjepa.weights.world_model import WorldModel as WorldModel

__all__ = ["WorldModel", "__version__", "load", "load_encoder"]


def load(path: Path | str, part: Literal["target", "encoder"] = "target") -> "WorldModel":
    """Load a trained model onto the CPU in fp32: `encode`, `predict` and `rollout`, as far as its method trained them.

    A native export (`vjepa export --format native`) needs torch and safetensors for this and no other package.

    Args:
        path: a run, a checkpoint, or an export.
        part: which encoder of a run or a checkpoint: `target`, the moving average whose features V-JEPA 2 evaluates
            (the trained encoder if the method keeps no average), or `encoder`, the trained weights. An export holds
            the encoder that it was made of.

    Raises:
        ValueError: there is no model at the path, it is damaged, or it is of another kind.

    Example:
        >>> model = vjepa.load("runs/demo")
        >>> sorted(model.capabilities)
        ['encode', 'predict']
        >>> features = model.encode(torch.zeros(1, 16, 256, 256, 3, dtype=torch.uint8))  # [B t h w D]
    """
    path = _expand(path)
    return _reader(path).load(path, part)


def load_encoder(path: Path | str, part: Literal["target", "encoder"] = "target") -> "VideoEncoder":
    """Load only the encoder of a trained model: uint8 frames [B T H W C] in, features [B t h w D] out.

    Equal to `load(path, part).encoder`, but reads no other part.

    Raises:
        ValueError: as for `load`.
    """
    path = _expand(path)
    return _reader(path).load_encoder(path, part)


def _expand(path: Path | str) -> Path | str:
    """Replace a leading `~`, which a shell would have replaced."""
    return path if "://" in str(path) else Path(path).expanduser()


def _reader(path: Path | str) -> ModuleType:
    """Return the module that loads this model. The module for native exports needs no pydantic."""
    from vjepa.weights import native

    if (Path(path) / "model.json").is_file():
        return native
    if "://" not in str(path):
        native.check_there(Path(path))  # the next import may lack packages
    from vjepa.weights import load

    return load


def __getattr__(name: str) -> Any:
    if name == "WorldModel":  # imported late, since it needs torch
        from vjepa.weights.world_model import WorldModel

        return WorldModel
    raise AttributeError(f"module 'vjepa' has no attribute {name!r}")
