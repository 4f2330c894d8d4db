"""Read tables of videos row by row: CSV, TSV, JSON lines, a JSON array, parquet, and packed tables.

Cells of text tables stay text. A row that cannot be read becomes a problem of its own and costs no other row.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vjepa_data.settings import BadInput

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"})
UNPACKED: dict[str, Callable[..., io.BufferedIOBase]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
"""Byte order marks. The longer of two comes first."""

BATCH_ROWS = 1024
"""Rows of a parquet that are in memory at once."""


@dataclass(frozen=True)
class Row:
    """A row of a table, or the reason why it cannot be read."""

    number: int
    """Counted from 1, without the header and empty lines."""
    values: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    is_embedded: bool = False
    """The row holds the video itself."""


@dataclass(frozen=True)
class Table:
    """An open table."""

    names: tuple[str, ...] | None
    """Names of the columns, or None if each row has its own."""
    rows: Iterator[Row]
    embedded: str | None = None
    """The column that holds the videos themselves. Its values are their paths as text, or None without a path."""
    left_out: tuple[str, ...] = ()
    """Binary columns, which are not read."""


def table_suffix(path: Path) -> str | None:
    """Return the suffix of a table, without that of its packing, or None if the file is not a table."""
    inner = path.with_suffix("") if path.suffix.lower() in UNPACKED else path
    suffix = inner.suffix.lower()
    return suffix if suffix in SUFFIXES and (suffix != ".parquet" or inner == path) else None


def open_table(path: Path, *, path_column: str, encoding: str | None = None) -> Table:
    """Open a table.

    Args:
        path: the file.
        path_column: name of the column with the paths. It tells the delimiter of a CSV, and may hold the videos of a
            parquet.
        encoding: of text tables. Default: as the byte order mark says, else UTF-8.

    Raises:
        BadInput: the file cannot be read at all. `rows` raises it too, where a later part cannot be read.
    """
    suffix = table_suffix(path)
    if suffix == ".parquet":
        return _parquet(path, path_column)
    if suffix in (".csv", ".tsv"):
        return _csv(path, path_column, "\t" if suffix == ".tsv" else None, encoding)
    return Table(None, _json_array(path, encoding) if suffix == ".json" else _json_lines(path, encoding))


def text_encoding(path: Path) -> str:
    """Tell the encoding of a text file by its byte order mark or its zero bytes, else assume UTF-8."""
    with _open(path) as file:
        head = file.read(512)
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    if head.count(0) > len(head) // 4:
        return "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
    return "utf-8"


@contextmanager
def open_text(path: Path, encoding: str | None) -> Iterator[io.TextIOWrapper]:
    """Open a text file, packed or not. Bytes that are not UTF-8 become lone surrogates, as in file names.

    Raises:
        BadInput: the file cannot be read, or is not text in its encoding.
    """
    try:
        encoding = encoding or text_encoding(path)
        errors = "surrogateescape" if encoding in ("utf-8", "utf-8-sig") else "strict"
        buffer: Any = _open(path)
        with io.TextIOWrapper(buffer, encoding=encoding, errors=errors, newline="") as text:
            yield text
    except UnicodeError as error:
        raise BadInput(f"{path}: not text in {encoding} ({error}); set columns.encoding or convert it") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: cannot be read ({reason}); copy it again") from None


def _open(path: Path) -> io.BufferedIOBase:
    return UNPACKED.get(path.suffix.lower(), open)(path, "rb")


def _csv(path: Path, path_column: str, delimiter: str | None, encoding: str | None) -> Table:
    with open_text(path, encoding) as text:
        header = text.readline().lstrip("\ufeff")
    delimiter = delimiter or _delimiter(header, path_column)
    is_spaced = f"{delimiter} " in header
    names = next(csv.reader([header], delimiter=delimiter, skipinitialspace=is_spaced), [])
    names = [name.strip() for name in names]
    while names and not names[-1]:  # spreadsheets write empty columns to the right
        names.pop()
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"{path}: two columns are called {twice!r}; rename either")
    rows = _csv_rows(path, tuple(names), encoding, delimiter=delimiter, skipinitialspace=is_spaced)
    return Table(tuple(names), rows)


def _delimiter(header: str, path_column: str) -> str:
    """Choose the delimiter between the names of a header, of which one is the path column."""
    for delimiter in ",\t;|":
        if path_column in [name.strip(' "\r\n') for name in header.split(delimiter)]:
            return delimiter
    return max(",\t;|", key=header.count)


def _csv_rows(path: Path, names: tuple[str, ...], encoding: str | None, **form: Any) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with open_text(path, encoding) as text:
        text.readline()
        number = 0
        for cells, problem in _csv_records(iter(text), len(names), form):
            if cells or problem:
                number += 1
                yield Row(number, dict(zip(names, cells, strict=False)), problem)


def _csv_records(lines: Iterator[str], count: int, form: dict[str, Any]) -> Iterator[tuple[list[str], str]]:
    """Yield the cells of each record, and the fault of an invalid record.

    A quote that is never closed would swallow all lines to the next quote. A record of several lines that is malformed
    is therefore given up after its first line, and the following lines are read again.
    """
    while True:
        taken: list[str] = []
        reader = csv.reader(_remember(lines, taken), strict=True, **form)
        try:
            cells = next(reader, None)
            problem = ""
        except csv.Error as error:
            cells, problem = [], str(error)
        if cells is None:
            return
        if not problem and len(cells) != count and any(cells):
            problem = f"{len(cells)} values for {count} columns; quote values that hold the delimiter"
            if not any(cells[count:]) and len(cells) > count:
                problem = ""
        if problem and len(taken) > 1:
            lines = itertools.chain(taken[1:], lines)
        yield (cells if any(cells) else []), problem


def _remember(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _json_lines(path: Path, encoding: str | None) -> Iterator[Row]:
    with open_text(path, encoding) as text:
        number = 0
        for line in text:
            if line := line.strip().removeprefix("\ufeff"):
                number += 1
                yield _json_row(number, line)


def _json_row(number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON ({error})")
    if not isinstance(value, dict):
        return Row(number, {}, f"expected a JSON object, got {type(value).__name__}")
    return Row(number, value)


def _json_array(path: Path, encoding: str | None) -> Iterator[Row]:
    with open_text(path, encoding) as text:
        try:
            values = json.load(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not JSON ({error}); correct the file") from None
    if not isinstance(values, list):
        raise BadInput(
            f"{path}: expected a list of JSON objects, got {type(values).__name__}; write an object per video"
        )
    for number, value in enumerate(values, start=1):
        is_object = isinstance(value, dict)
        problem = "" if is_object else f"expected a JSON object, got {type(value).__name__}"
        yield Row(number, value if is_object else {}, problem)


def _parquet(path: Path, path_column: str) -> Table:
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); copy it again") from None
    kind = schema.field(path_column).type if path_column in schema.names else pa.string()
    embedded = path_column if _holds_bytes(kind) else None
    if embedded and not (_is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
        raise BadInput(f"{path}: column {path_column!r} is {kind}; give a column of paths, or of videos as bytes")
    left_out = tuple(f.name for f in schema if _holds_bytes(f.type) and f.name != embedded)
    names = [name for name in schema.names if name not in left_out]
    wanted = [name for name in names if name != embedded]
    if embedded and pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        wanted.append(f"{embedded}.path")
    return Table(tuple(names), _parquet_rows(path, wanted, embedded), embedded, left_out)


def _parquet_rows(path: Path, columns: list[str], embedded: str | None) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                is_embedded = embedded is not None and not _is_null(file.metadata.row_group(group), f"{embedded}.bytes")
                if not columns:  # videos without any labels
                    rows: Iterator[dict[str, Any] | None] = iter([{}] * file.metadata.row_group(group).num_rows)
                else:
                    batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                    rows = itertools.chain.from_iterable(map(_decode_batch, batches))
                for row in rows:
                    number += 1
                    if row is None:
                        yield Row(number, {}, "a text in it is not UTF-8")
                        continue
                    if embedded is not None:
                        row = {**row, embedded: (row.get(embedded) or {}).get("path")}
                    yield Row(number, row, is_embedded=is_embedded)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: damaged after row {number} ({reason}); copy it again") from None


def _decode_batch(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """Return the rows of a batch, and None for each row whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for number in range(batch.num_rows) for row in _decode_batch(batch.slice(number, 1))]


def _is_null(group: Any, column: str) -> bool:
    """Say whether a column of a row group is known to hold only nulls."""
    for position in range(group.num_columns):
        found = group.column(position)
        if found.path_in_schema == column:
            return found.statistics is not None and found.statistics.null_count == group.num_rows
    return False


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Say whether a column, or a field inside it, is binary."""
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(n).type for n in range(kind.num_fields)]
    return _is_binary(kind) or any(map(_holds_bytes, inner))
