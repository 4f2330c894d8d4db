"""What there is: folders, files, lists, tables and tars of videos become one list of sources."""

import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from vjepa_data.builder.labels import MAX_BYTES, plain, read_labels
from vjepa_data.corpus.format import is_ours
from vjepa_data.corpus.remote import store_errors
from vjepa_data.media.fetch import SCHEMES, FileRef
from vjepa_data.media.video import IMAGE_SUFFIXES, SUFFIXES, Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.spec import Columns, Spec

TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})


@dataclass(frozen=True)
class InputFile:
    """One video to take in, or a part of it."""

    name: str
    """What the corpus calls it, for ever: its path below the folder that was given, or its place in the table.
    Does not depend on where the folder lies."""
    place: FileRef
    """Where it is now."""
    labels: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    split: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    refused: tuple[str, str] | None = None
    """Reason and detail, if it is known already that it cannot be used."""

    def as_refusal(self) -> Refused | None:
        return Refused(Reason(self.refused[0]), self.refused[1]) if self.refused else None


def ingest(sources: Sequence[str], *, spec: Spec, out: Path | None = None) -> list[InputFile]:
    """List every source in order of name.

    Args:
        sources: folders (searched with all below them), video files, tables (CSV, TSV, JSONL, parquet) with one video
            a row, lists (.txt) with one a line, WebDataset tars, and addresses (http, https, s3, gs) of single
            files, or of a prefix if it ends in `/`.
        spec: says whether videos or images are wanted, and the names of a table's columns.
        out: a folder that is none of the sources though it lies below one: where the corpus will be.

    Raises:
        BadInput: one does not exist, cannot be read as what it is, or no video is found.
    """
    if not sources:
        raise BadInput("no sources; give folders, video files or tables of videos")
    within = [one for one in sources if out and "://" not in one and Path(one).resolve().is_relative_to(out.resolve())]
    if within:
        raise BadInput(f"{within[0]} is --out itself or lies in it; give the corpus another folder")
    found = [source for text in sources for source in _one(text, spec, out)]
    if not found:
        wanted = spec.media
        raise BadInput(f"no {wanted} in {', '.join(sources)}{_what_else(sources)}; give a folder that holds some")
    found.sort(key=lambda source: (source.name, source.start_s or 0.0, source.end_s or 0.0))
    for one, following in itertools.pairwise(found):
        if (one.name, one.start_s, one.end_s) == (following.name, following.start_s, following.end_s):
            if one.place == following.place:
                raise BadInput(f"{one.name!r} is listed twice; keep one of the two, or give them parts of their own")
            places = f"{one.place.path} and {following.place.path}"
            raise BadInput(f"two sources are called {one.name!r} ({places}); rename a folder or a file")
    return found


def _suffixes(spec: Spec) -> frozenset[str]:
    return SUFFIXES if spec.media == "videos" else IMAGE_SUFFIXES


def _one(text: str, spec: Spec, out: Path | None) -> Iterable[InputFile]:
    if "://" in text:
        return _address(text, spec)
    path = Path(text).resolve()
    if path.is_dir():
        return _folder(path, spec, out.resolve() if out else None)
    if not path.is_file():
        raise BadInput(f"{text}: no such file or folder; give folders, video files or tables of videos")
    suffix = path.suffix.lower()
    if suffix == ".txt" or (suffix == ".csv" and _has_no_header(path, spec)):
        return _list(path, spec)
    if suffix in TABLES:
        return _table(path, spec.columns)
    if suffix == ".tar":
        return _tar(path, path.name, spec)
    return [_file(path, path.name)]


def _folder(folder: Path, spec: Spec, out: Path | None) -> Iterator[InputFile]:
    """Every file below a folder that is called like a video, or a tar; hidden files and folders are left alone.

    A link that leads nowhere is a source too, which will be refused, so that nobody misses it in silence.
    """
    wanted = _suffixes(spec)
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if any(part.startswith(".") for part in below.parts) or (out is not None and path.is_relative_to(out)):
            continue
        if not path.is_file() and (path.exists() or not path.is_symlink()):
            continue
        if path.suffix.lower() in wanted:
            yield _file(path, f"{folder.name}/{below.as_posix()}")
        elif path.suffix.lower() == ".tar":
            yield from _tar(path, f"{folder.name}/{below.as_posix()}", spec)


def _file(path: Path, name: str) -> InputFile:
    """A video file, with the labels in the JSON file of the same stem if there is one."""
    name, sidecar = readable(name), path.with_suffix(".json")
    if not sidecar.is_file():
        return InputFile(name, FileRef(str(path)))
    try:
        with sidecar.open("rb") as file:
            return InputFile(name, FileRef(str(path)), labels=read_labels(file.read(MAX_BYTES + 1)))
    except (OSError, ValueError) as error:
        return InputFile(name, FileRef(str(path)), refused=(Reason.BAD_LABELS, f"{readable(sidecar.name)}: {error}"))


def readable(name: str) -> str:
    """A file's name as text; bytes in it that are no UTF-8 are spelled out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _address(url: str, spec: Spec) -> Iterator[InputFile]:
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise BadInput(f"{url}: {scheme}: is not opened, only {', '.join(sorted(SCHEMES))}; copy the files here first")
    if not url.endswith("/"):
        yield InputFile(url, FileRef(url))
        return
    if scheme in ("http", "https"):
        raise BadInput(f"{url}: a web server does not list its files; give a .txt or .csv with one address a row")
    try:
        system, root = fsspec.url_to_fs(url)
        paths = sorted(system.find(root))
    except (OSError, ImportError, ValueError, *store_errors()) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{url}: cannot be listed ({reason}); check the address and the keys") from None
    for path in paths:
        if PurePosixPath(path).suffix.lower() in _suffixes(spec):
            address = f"{scheme}://{path}"
            yield InputFile(address, FileRef(address))


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


def _where(folder: Path, text: str) -> FileRef:
    """The place that a cell or line names: an address, or a path from the folder of its table."""
    return FileRef(text if "://" in text else str((folder / text).resolve()))


def _has_no_header(path: Path, spec: Spec) -> bool:
    """Whether a `.csv` is a list of paths and class numbers, as V-JEPA and VideoMAE read them."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return _labelled(file.readline(), spec) is not None


def _labelled(line: str, spec: Spec) -> tuple[str, int] | None:
    """The path and the class of a line `PATH NUMBER`; None if it is another."""
    found = re.fullmatch(r"(.+?)[\s,]+([0-9]{1,9})", line.strip())
    if found is None or PurePosixPath(found[1]).suffix.lower() not in _suffixes(spec):
        return None
    return found[1], int(found[2])


def _list(path: Path, spec: Spec) -> Iterator[InputFile]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"{path}: is not a text file; give a list with one path or address a line") from None
    for line in filter(None, map(str.strip, lines)):
        name, label = _labelled(line, spec) or (line, None)
        yield InputFile(name, _where(path.parent, name), labels={} if label is None else {"label": label})


def _tar(path: Path, name: str, spec: Spec) -> Iterator[InputFile]:
    """The samples of a WebDataset tar, with what their json and txt say; nothing else in them is looked at."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _, dot, suffix = member.name.rpartition("/")[2].partition(".")
                if member.isreg() and dot:
                    samples.setdefault(member.name[: -len(suffix) - 1], {})[suffix.lower()] = member
            for key, members in samples.items():
                whole = next((suffix for suffix in members if f".{suffix}" in _suffixes(spec)), None)
                for suffix in [whole] if whole else _dotted(members, spec):
                    part = suffix.rpartition(".")[0]
                    own = {s.removeprefix(f"{part}."): member for s, member in members.items()}
                    called = f"{name}/{key}.{part}" if part else f"{name}/{key}"
                    yield _tar_sample(tar, path, called, members[suffix], own)
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path}: is not a whole tar ({error}); copy it again") from None


def _dotted(suffixes: Iterable[str], spec: Spec) -> list[str]:
    """What follows the first dot of videos that have dots in their names, which WebDataset takes for suffixes."""
    return [suffix for suffix in suffixes if f".{suffix.rpartition('.')[2]}" in _suffixes(spec)]


def _tar_sample(
    tar: tarfile.TarFile, path: Path, name: str, video: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]
) -> InputFile:
    name, place = readable(name), FileRef(str(path), video.offset_data, video.size)
    text = {suffix: _small(tar, members[suffix]) for suffix in ("json", "txt") if suffix in members}
    try:
        facts = read_labels(text["json"]) if "json" in text else {}
        caption = {"caption": text["txt"].decode().strip()} if "txt" in text else {}
    except ValueError as error:
        return InputFile(name, place, refused=(Reason.BAD_LABELS, f"json: {error}"))
    if is_ours(facts):
        split = facts.get("split")
        return InputFile(
            name, place, facts["labels"], group=facts["group"], split=split if isinstance(split, str) else None
        )
    return InputFile(name, place, {**facts, **caption})


def _small(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read(MAX_BYTES + 1) if file is not None else b""


def _table(path: Path, columns: Columns) -> Iterator[InputFile]:
    table = _read_table(path, columns)
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
        yield InputFile(
            name=where,
            place=_where(path.parent, where),
            labels={name: plain(row[name]) for name in labels if row[name] not in (None, "")},
            group=_text(row.get(columns.group)),
            split=_split(path, number, _text(row.get(columns.split))),
            start_s=_seconds(path, number, row.get(columns.start)),
            end_s=_seconds(path, number, row.get(columns.end)),
        )


def _read_table(path: Path, columns: Columns) -> pa.Table:
    suffix = path.suffix.lower()
    texts = {name: pa.string() for name in (columns.path, columns.group, columns.split)}
    try:
        if suffix == ".parquet":
            return pq.read_table(path)
        if suffix in (".jsonl", ".ndjson"):
            return pa_json.read_json(path)
        return pa_csv.read_csv(
            path,
            parse_options=pa_csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=texts, strings_can_be_null=True),
        )
    except (OSError, pa.ArrowException) as error:
        raise BadInput(
            f"{path}: cannot be read as {suffix[1:]}: {str(error).splitlines()[0]}; check the file"
        ) from None


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _split(path: Path, number: int, split: str | None) -> str | None:
    if split is not None and not (split.isascii() and split.isalnum() and split.islower() and len(split) <= 16):
        raise BadInput(f"{path}: row {number}: split {split!r} is no short lower-case word; write for example val")
    return split


def _seconds(path: Path, number: int, value: Any) -> float | None:
    if value in (None, "") or value != value:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise BadInput(f"{path}: row {number}: {value!r} is no time in seconds; write for example 12.5")
    return seconds
