"""Safe reading of DCP metadata, which is a pickle and could run arbitrary code.

The pickle is scanned first. A checkpoint whose metadata name anything but the few classes of the format is rejected.
Raw bytes among the tensors are rejected too, because DCP would unpickle them.
"""

import io
import pickle
from enum import Enum
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from vjepa.checkpoints import storage
from vjepa_data.settings import BadInput

HARMLESS = {
    "torch": {"Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its module in Python 3.13
}


def unpickle_metadata(checkpoint: Path) -> Metadata:
    """Read DCP's metadata of a checkpoint without running code from it.

    Raises:
        BadInput: the metadata name other classes, or are not DCP metadata.
    """
    file = checkpoint / ".metadata"
    try:
        found = _Harmless(io.BytesIO(storage.with_retries(file.read_bytes, file))).load()
    except _Strange as error:
        raise BadInput(
            f"{file} names {error}, which no checkpoint of ours does, and is not read: that might run foreign code"
        ) from None
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise BadInput(f"{file} cannot be read ({error}); choose another checkpoint") from None
    if not (isinstance(found, Metadata) and isinstance(found.storage_data, dict)):
        raise BadInput(f"{file} holds no metadata of a checkpoint; choose another checkpoint")
    return found


class _Strange(Exception):
    """A class or function that the format does not use."""


class _Harmless(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member
        if global_name not in HARMLESS.get(module_name, ()):
            raise _Strange(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _member(kind: Any, name: Any) -> Enum:
    """Return a member of an enum, which Python 3.11.0 to 3.11.3 pickle as `getattr(class, name)`."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise _Strange("builtins.getattr")
    return kind[name]
