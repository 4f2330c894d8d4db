"""From video files to batches of frames, signals and texts.

`ClipLoader` is the public API. It is imported on first use, so `import vjepa_data` does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa_data.reader.loader import ClipLoader as ClipLoader

__all__ = ["ClipLoader"]


def __getattr__(name: str) -> Any:
    if name == "ClipLoader":
        from vjepa_data.reader.loader import ClipLoader

        return ClipLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
