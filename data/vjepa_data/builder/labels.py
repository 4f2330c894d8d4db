"""Labels as strangers write them: any JSON object, small, and nothing that cannot be written down again."""

import json
import math
from typing import Any

from vjepa_data.corpus.format import canonical_json

MAX_BYTES = 1 << 20
"""Longest JSON that is read for the labels of one sample."""


def read_labels(data: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is none, is longer than 1 MiB, or holds what JSON cannot (NaN, halves of characters).
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    try:
        value = json.loads(data)
        canonical_json(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def plain(value: Any) -> Any:
    """A cell of a table as JSON has it: dates and the like as text, what is no number as nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
