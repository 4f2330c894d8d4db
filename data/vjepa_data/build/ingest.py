"""What there is: folders, files and tables of videos become one list of sources."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from vjepa_data.settings import BadInput
from vjepa_data.spec import Columns, Spec
from vjepa_data.video import SUFFIXES, Reason, Refused

TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})


@dataclass(frozen=True)
class Source:
    """One video to take in, or a part of it."""

    name: str
    """What the corpus calls it, for ever: its path below the folder that was given, or its place in the table.
    Does not depend on where the folder lies."""
    path: str
    """Where it is now: an absolute path or a URL."""
    labels: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    split: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    refused: tuple[str, str] | None = None
    """Reason and detail, if it is known already that it cannot be used."""


def ingest(sources: Sequence[str], *, spec: Spec) -> list[Source]:
    """List every source in order of name.

    Args:
        sources: folders (searched with all below them), video files, and tables (CSV, TSV, JSONL, parquet) with one
            video a row.
        spec: gives the names of a table's columns.

    Raises:
        BadInput: one does not exist, cannot be read as what it is, or no video is found.
    """
    if not sources:
        raise BadInput("no sources; give folders, video files or tables of videos")
    found: list[Source] = []
    for text in sources:
        found.extend(_one(text, spec.columns))
    if not found:
        raise BadInput(f"no videos in {', '.join(sources)}{_what_else(sources)}; give a folder that holds some")
    found.sort(key=lambda source: (source.name, source.start_s or 0.0, source.end_s or 0.0))
    for one, following in itertools.pairwise(found):
        if (one.name, one.start_s, one.end_s) == (following.name, following.start_s, following.end_s):
            raise BadInput(
                f"two sources are called {one.name!r} ({one.path} and {following.path}); rename a folder or a file"
            )
    return found


def _one(text: str, columns: Columns) -> Iterable[Source]:
    path = Path(text).resolve()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise BadInput(f"{text}: no such file or folder; give folders, video files or tables of videos")
    if path.suffix.lower() in TABLES:
        return _table(path, columns)
    return [_video(path, path.name)]


def _folder(folder: Path) -> Iterator[Source]:
    """Every file below a folder that is called like a video; hidden files and folders are left alone."""
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not any(p.startswith(".") for p in below.parts):
            yield _video(path, f"{folder.name}/{below.as_posix()}")


def _video(path: Path, name: str) -> Source:
    """A video file, with the labels in the JSON file of the same stem if there is one."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return Source(name, str(path))
    try:
        return Source(name, str(path), labels=_labels(json.loads(sidecar.read_bytes())))
    except (OSError, ValueError) as error:
        return Source(name, str(path), refused=(Reason.BAD_LABELS, f"{sidecar.name}: {error}"))


def _labels(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    json.dumps(value, allow_nan=False)
    return value


def _what_else(sources: Sequence[str]) -> str:
    """What lies there instead, for a message."""
    suffixes: dict[str, int] = {}
    for text in sources:
        for path in Path(text).rglob("*"):
            if path.is_file():
                suffixes[path.suffix or "no suffix"] = suffixes.get(path.suffix or "no suffix", 0) + 1
    if not suffixes:
        return " (empty)"
    common = sorted(suffixes, key=lambda suffix: -suffixes[suffix])[:4]
    return f" ({sum(suffixes.values())} other files: {', '.join(f'{suffixes[s]} x {s}' for s in common)})"


def _table(path: Path, columns: Columns) -> Iterator[Source]:
    table = _read_table(path)
    if columns.path not in table.column_names:
        raise BadInput(
            f"{path}: no column {columns.path!r}, it has {', '.join(table.column_names)}; set columns.path=NAME"
        )
    meaning = {columns.path, columns.start, columns.end, columns.group, columns.split}
    labels = [name for name in table.column_names if name not in meaning] if columns.labels is None else columns.labels
    missing = [name for name in labels if name not in table.column_names]
    if missing:
        raise BadInput(f"{path}: no column {missing[0]!r}, it has {', '.join(table.column_names)}; set columns.labels")
    for number, row in enumerate(table.to_pylist(), start=1):
        where = row[columns.path]
        if not isinstance(where, str) or not where:
            raise BadInput(f"{path}: row {number} has no {columns.path!r}; remove the row or fill it in")
        yield Source(
            name=where,
            path=str((path.parent / where).resolve()),
            labels={name: _plain(row[name]) for name in labels if row[name] not in (None, "")},
            group=_text(row.get(columns.group)),
            split=_text(row.get(columns.split)),
            start_s=_seconds(path, number, row.get(columns.start)),
            end_s=_seconds(path, number, row.get(columns.end)),
        )


def _read_table(path: Path) -> pa.Table:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return pq.read_table(path)
        if suffix in (".jsonl", ".ndjson"):
            return pa_json.read_json(path)
        return pa_csv.read_csv(
            path,
            parse_options=pa_csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True),
        )
    except (OSError, pa.ArrowException) as error:
        raise BadInput(
            f"{path}: cannot be read as {suffix[1:]}: {str(error).splitlines()[0]}; check the file"
        ) from None


def _plain(value: Any) -> Any:
    """A value as JSON has it; dates and the like as text."""
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _seconds(path: Path, number: int, value: Any) -> float | None:
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise BadInput(f"{path}: row {number}: {value!r} is no time in seconds; write for example 12.5")
    return seconds


def as_refusal(source: Source) -> Refused | None:
    return Refused(Reason(source.refused[0]), source.refused[1]) if source.refused else None
