"""Rows of robot folders, written to the user's cache like the sidecar file of a signal."""

import hashlib
import io
from pathlib import Path

import numpy as np

from vjepa_data.atomic import atomic_write
from vjepa_data.corpus.sample_table import user_cache


def cache_rows(kind: str, name: str, identity: tuple[object, ...], rows: np.ndarray) -> Path:
    """Write the rows of a signal, and return the file.

    Args:
        kind: folder of the cache.
        name: name of the signal, which errors show as that of the file.
        identity: values that tell these rows from all other rows of the same name.
        rows: [rows, columns].
    """
    text = "\0".join(map(str, identity)).encode()
    path = user_cache() / kind / hashlib.sha256(text).hexdigest()[:24] / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(rows), version=(1, 0), allow_pickle=False)
    atomic_write(path, sink.getvalue())
    return path
