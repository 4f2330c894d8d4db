"""Turn the rows of a table into sources: paths, time ranges, groups, splits and labels.

A row that cannot be used is refused with a reason. It stops neither its table nor the build.
"""

import datetime
import json
import logging
import re
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vjepa_data.builder.labels import NOT_UTF8, check_labels, plain
from vjepa_data.builder.source import InputFile, locate, readable
from vjepa_data.builder.tables import Row, Table, open_table
from vjepa_data.corpus.format import canonical_json
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.video import Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.spec import Columns

log = logging.getLogger(__name__)

NOT_GIVEN = frozenset({"", "na", "n/a", "nan", "nat", "null", "none"})
"""Text that stands for no time and no split, in lower case. A label keeps it."""

CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d*)?)")


def table_sources(path: Path, columns: Columns, *, name: str = "", below: str = "") -> Iterator[InputFile]:
    """Yield a source for every row of a table.

    Args:
        path: the table. Paths in it count from its folder.
        columns: meaning of its columns.
        name: permanent name of the table, which precedes the names of videos that it holds itself. Default: its file
            name.
        below: permanent name of its folder, which precedes the names of all videos.

    Raises:
        BadInput: the table cannot be read, or lacks a column that `columns` names.
    """
    name = name or readable(path.name)
    table = open_table(path, path_column=columns.path, encoding=columns.encoding)
    wanted = _fields(columns.path)
    if table.names is not None:
        _check_names(path, table.names, wanted, columns)
    if table.left_out:
        log.warning("%s: binary columns are not labels and not read: %s", name, ", ".join(table.left_out))
    reader = _RowReader(path, columns, name=name, below=below, table=table)
    seen: set[str] = set()
    refused_text = ""
    has_text = False
    for row in table.rows:
        seen |= row.values.keys()
        source = reader.source(row)
        if source.refused and NOT_UTF8 in source.refused[1]:
            refused_text = refused_text or f"row {row.number}: {source.refused[1]}"
        elif not has_text:
            has_text = not canonical_json(source.labels).isascii()
        yield source
    if refused_text and not has_text:  # not a single odd row: all the text that is not ASCII is in another encoding
        raise BadInput(f"{path}: {refused_text}; set columns.encoding, for example columns.encoding=cp1252")
    if table.names is None and seen:
        _check_names(path, tuple(sorted(seen)), wanted, columns)
    if table.names is None and not seen:
        raise BadInput(f"{path}: no row is a JSON object; write an object per line, or a list of objects in a .json")


def _fields(template: str) -> list[str]:
    """Return the columns that a path is made from.

    Raises:
        BadInput: the template is invalid.
    """
    if "{" not in template:
        return [template]
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise BadInput(f"columns.path={template!r}: {error}; write for example '{{id}}.mp4'") from None


def _check_names(path: Path, names: tuple[str, ...], wanted: list[str], columns: Columns) -> None:
    for settings, missing in (
        ("path=NAME", [name for name in wanted if name not in names]),
        ("labels=NAMES", [name for name in columns.labels or () if name not in names]),
        ("types", [name for name in columns.types if name not in names]),
    ):
        if missing:
            known = ", ".join(names)
            raise BadInput(f"{path}: no column {missing[0]!r} among {known}; set columns.{settings}")


class _RowReader:
    """Reads the rows of a table."""

    def __init__(self, path: Path, columns: Columns, *, name: str, below: str, table: Table) -> None:
        self._path, self._columns, self._name, self._below, self._table = path, columns, name, below, table
        self._meaning = {columns.path, columns.start, columns.end, columns.group, columns.split}

    def source(self, row: Row) -> InputFile:
        """Return the source of a row, refused if the row cannot be used."""
        name, file = f"{self._name} row {row.number}", FileRef(str(self._path))
        try:
            if row.problem:
                raise Refused(Reason.BAD_LABELS, row.problem)
            name, file = self._place(row)
            return InputFile(
                name=name,
                file=file,
                labels=self._labels(row.values),
                group=_text(row.values.get(self._columns.group)),
                split=_split(row.values.get(self._columns.split)),
                start_s=_seconds(row.values.get(self._columns.start)),
                end_s=_seconds(row.values.get(self._columns.end)),
            )
        except Refused as refusal:
            return InputFile(name, file, refused=(refusal.reason, f"row {row.number}: {refusal.detail}"))

    def _place(self, row: Row) -> tuple[str, FileRef]:
        """Return the permanent name and the location of the video of a row."""
        template = self._columns.path
        if row.is_embedded:
            path = row.values.get(template)
            name = f"{self._name}/{row.number}" + (f"/{PurePosixPath(path).name}" if path else "")
            return name, FileRef(str(self._path), row.number - 1, column=template)
        text = _fill(template, row.values) if "{" in template else row.values.get(template)
        if not isinstance(text, str) or not text.strip():
            raise Refused(Reason.MISSING, f"no {template!r}; fill it in or remove the row")
        name, file = locate(self._path.parent, text.strip())
        return (f"{self._below}/{name}" if self._below and not file.is_remote else name), file

    def _labels(self, values: Mapping[str, Any]) -> dict[str, Any]:
        columns = self._columns
        names = [name for name in values if name not in self._meaning] if columns.labels is None else columns.labels
        labels = {}
        for name in names:
            value = values.get(name)
            if value in (None, ""):
                continue
            labels[name] = _convert(name, value, columns.types[name]) if name in columns.types else plain(value)
        try:
            return check_labels(labels)
        except ValueError as error:
            raise Refused(Reason.BAD_LABELS, str(error)) from None


def _fill(template: str, values: Mapping[str, Any]) -> str:
    """Fill the columns of a row into a path. `{start:06d}` writes a number with six digits."""
    parts = []
    for text, name, form, _ in string.Formatter().parse(template):
        parts.append(text)
        if name is None:
            continue
        value = values.get(name)
        if value in (None, ""):
            raise Refused(Reason.MISSING, f"no {name!r}, from which the path is made; fill it in or remove the row")
        try:
            number = float(value) if form and form[-1] in "dfeg" else None
            value = value if number is None else int(number) if form and form[-1] == "d" else number
            parts.append(format(value, form or ""))
        except (TypeError, ValueError) as error:
            raise Refused(Reason.MISSING, f"{name!r}: {value!r} does not fit {{{name}:{form}}} ({error})") from None
    return "".join(parts)


TYPES: dict[str, Callable[[Any], Any]] = {"text": str, "int": int, "float": float, "json": json.loads}


def _convert(name: str, value: Any, kind: str) -> Any:
    """Convert a cell to the type that the spec declares."""
    try:
        if kind == "bool":
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        return plain(TYPES[kind](value))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Refused(Reason.BAD_LABELS, f"{name}: {value!r} is not of type {kind}") from None


def _text(value: Any) -> str | None:
    try:
        check_labels({"": str(value)})
    except ValueError as error:
        raise Refused(Reason.BAD_LABELS, str(error)) from None
    return None if value in (None, "") else str(value)


def _split(value: Any) -> str | None:
    split = str(value).strip() if value is not None else ""
    if split.lower() in NOT_GIVEN:
        return None
    if not (split.isascii() and split.isalnum() and split.islower() and len(split) <= 16):
        detail = f"invalid split {split!r}; use up to 16 characters a-z, 0-9, such as val"
        raise Refused(Reason.BAD_LABELS, detail)
    return split


def _seconds(value: Any) -> float | None:
    """Read a time: seconds, `h:m:s`, `m:s`, or a time or duration of a parquet."""
    if isinstance(value, datetime.timedelta):
        value = value.total_seconds()
    text = str(value).strip() if value is not None else ""
    if text.lower() in NOT_GIVEN:
        return None
    clock = CLOCK.fullmatch(text)
    try:
        if clock:
            hours, minutes, rest = clock.groups()
            seconds = 3600 * int(hours or 0) + 60 * int(minutes) + float(rest.replace(",", "."))
        else:
            seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise Refused(Reason.BAD_RANGE, f"{text!r} is not a time; write seconds such as 12.5, or h:m:s")
    return seconds
