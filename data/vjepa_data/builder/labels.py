"""Read labels from untrusted JSON: any small object that can be written as JSON again."""

import json
import math
from typing import Any

from vjepa_data.corpus.format import canonical_json

MAX_BYTES = 1 << 20
"""Largest JSON file that is read for the labels of one sample."""


def read_labels(data: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is not a JSON object, exceeds 1 MiB, or holds invalid values (NaN, lone surrogates).
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    try:
        value = json.loads(data)
        canonical_json(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def plain(value: Any) -> Any:
    """Convert a table cell to a JSON value: dates and other types become text, NaN and infinity become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
