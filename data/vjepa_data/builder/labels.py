"""Read labels from untrusted JSON: any object of limited size that can be written as JSON again."""

import json
import math
from typing import Any

from vjepa_data.corpus.format import canonical_json

MAX_BYTES = 16 << 20
"""Largest labels of a sample, as JSON, whether they come from a table, a JSON file or a tar."""

MAX_FILE_BYTES = 4 * MAX_BYTES
"""Largest JSON file that is read for the labels of a sample. It may hold more than labels, and spaces."""

NOT_UTF8 = "is not text in UTF-8"
"""Fault of text that has bytes of another encoding, which are read as lone surrogates."""

YT_DLP_FIELDS = frozenset(
    """id title fulltitle description uploader uploader_id channel channel_id upload_date timestamp duration view_count
    like_count comment_count age_limit categories tags language license location extractor webpage_url chapters series
    season season_number episode episode_number artist track album release_date playlist playlist_index""".split()  # noqa: SIM905
)
"""Fields of yt-dlp's NAME.info.json that are labels. Other fields hold signed addresses, headers and cookies."""


def read_labels(data: bytes) -> dict[str, Any]:
    """Read a JSON object. NaN and infinity become null, as in tables.

    Raises:
        ValueError: it is not a JSON object, exceeds 16 MiB, or holds invalid text (lone surrogates).
    """
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    try:
        value = plain(json.loads(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return check_labels(value)


def check_labels(labels: dict[str, Any]) -> dict[str, Any]:
    """Return labels that can be stored.

    Raises:
        ValueError: they exceed 16 MiB as JSON, are nested too deeply, or hold text that is not Unicode.
    """
    try:
        size = len(canonical_json(labels))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        letter = error.object[error.start]
        cause = NOT_UTF8 if "\udc80" <= letter <= "\udcff" else "holds half a surrogate pair"
        raise ValueError(f"{error.object[max(0, error.start - 20) : error.end]!a} {cause}") from None
    if size > MAX_BYTES:
        raise ValueError(f"labels of {size} bytes, maximum: {MAX_BYTES}")
    return labels


def plain(value: Any) -> Any:
    """Convert a table cell to a JSON value: dates and other types become text, NaN and infinity become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) for item in value):  # pyarrow's form of a map
            return {str(name): plain(inner) for name, inner in value}
        return [plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
