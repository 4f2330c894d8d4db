"""Pretraining of video world models: predict the features of what is hidden, not its pixels."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vjepa.version import __version__ as __version__

if TYPE_CHECKING:
    from vjepa.weights.native import VideoEncoder


def load_encoder(path: Path | str, part: Literal["target", "encoder"] = "target") -> "VideoEncoder":
    """Load a frozen encoder onto the CPU in fp32: uint8 frames [B T H W C] in, features [B t h w D] out.

    A native export (`vjepa export --format native`) needs torch and safetensors for this and nothing else.

    Args:
        path: an export, a run, or a checkpoint.
        part: of a run or a checkpoint: `target`, the moving average whose features V-JEPA 2 evaluates, or `encoder`,
            the trained weights themselves. An export holds the one it was made of.

    Raises:
        ValueError: nothing there, torn, or another kind of model.
    """
    from vjepa.weights.native import check_there, load_native

    if (Path(path) / "model.json").is_file():
        return load_native(Path(path))
    if "://" not in str(path):
        check_there(Path(path))  # the next import may lack packages
    from vjepa.weights.load import load_encoder

    return load_encoder(path, part)
