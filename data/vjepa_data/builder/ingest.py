"""Stage 1 of a build: turn folders, files, lists, tables and tars of videos into one list of sources."""

import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from vjepa_data.builder.labels import MAX_BYTES, plain, read_labels
from vjepa_data.builder.tars import list_prefix
from vjepa_data.corpus.format import is_ours
from vjepa_data.media.fetch import SCHEMES, FileRef
from vjepa_data.media.video import IMAGE_SUFFIXES, SUFFIXES, Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.spec import Columns, Spec

TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})


@dataclass(frozen=True)
class InputFile:
    """One source: a video, or a part of it."""

    name: str
    """Permanent name in the corpus: the path below the given folder, or the text in the table. Independent of where
    the folder lies."""
    file: FileRef
    """Current location."""
    labels: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    split: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    refused: tuple[str, str] | None = None
    """Reason and detail, if it is already known to be unusable."""

    def as_refusal(self) -> Refused | None:
        return Refused(Reason(self.refused[0]), self.refused[1]) if self.refused else None


def ingest(sources: Sequence[str], *, spec: Spec, out: Path | None = None) -> list[InputFile]:
    """List every source in order of name.

    Args:
        sources: folders (searched recursively), video files, tables (CSV, TSV, JSONL, parquet) with one video per
            row, lists (.txt) with one per line, WebDataset tars, and URLs (http, https, s3, gs) of single files, or of
            a prefix if it ends in `/`.
        spec: whether to look for videos or images, and the names of a table's columns.
        out: folder of the corpus, which is skipped if it lies below a source.

    Raises:
        BadInput: a source does not exist or cannot be read, two sources have the same name, or no video is found.
    """
    if not sources:
        raise BadInput("no sources; give folders, video files or tables of videos")
    for text in sources:
        if out and "://" not in text and Path(text).resolve().is_relative_to(out.resolve()):
            raise BadInput(f"source {text} is --out or lies inside it; write the corpus to another folder")
    found = [source for text in sources for source in _expand(text, spec, out)]
    if not found:
        raise BadInput(f"no {spec.media} in {', '.join(sources)}{_other_files(sources)}; give a folder that has some")
    found.sort(key=lambda source: (source.name, source.start_s or 0.0, source.end_s or 0.0))
    for source, following in itertools.pairwise(found):
        if (source.name, source.start_s, source.end_s) == (following.name, following.start_s, following.end_s):
            if source.file == following.file:
                raise BadInput(f"{source.name!r} is listed twice; remove one entry, or give them different time ranges")
            paths = f"{source.file.path} and {following.file.path}"
            raise BadInput(f"two sources have the name {source.name!r} ({paths}); rename a folder or a file")
    return found


def _suffixes(spec: Spec) -> frozenset[str]:
    return SUFFIXES if spec.media == "videos" else IMAGE_SUFFIXES


def _expand(text: str, spec: Spec, out: Path | None) -> Iterable[InputFile]:
    if "://" in text:
        return _from_url(text, spec)
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
    """Yield every file below a folder that has the suffix of a video or a tar. Hidden files and folders are skipped.

    A broken link is a source too. It will be rejected as missing, so that it is reported.
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
    """Describe a video file, with the labels from the JSON file of the same stem if that exists."""
    name, sidecar = readable(name), path.with_suffix(".json")
    if not sidecar.is_file():
        return InputFile(name, FileRef(str(path)))
    try:
        with sidecar.open("rb") as file:
            return InputFile(name, FileRef(str(path)), labels=read_labels(file.read(MAX_BYTES + 1)))
    except (OSError, ValueError) as error:
        return InputFile(name, FileRef(str(path)), refused=(Reason.BAD_LABELS, f"{readable(sidecar.name)}: {error}"))


def readable(name: str) -> str:
    """Return a file name as text, with invalid UTF-8 bytes escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _from_url(url: str, spec: Spec) -> list[InputFile]:
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise BadInput(f"{url}: unsupported scheme {scheme!r}; use {', '.join(sorted(SCHEMES))} or copy the files")
    if not url.endswith("/"):
        return [InputFile(url, FileRef(url))]
    found = list_prefix(url, hint="give a .txt or .csv file of URLs")
    return [InputFile(file, FileRef(file)) for file in found if PurePosixPath(file).suffix.lower() in _suffixes(spec)]


def _other_files(sources: Sequence[str]) -> str:
    """Summarize the other files in the sources, for a message."""
    suffixes: dict[str, int] = {}
    for text in sources:
        for path in Path(text).rglob("*"):
            if path.is_file():
                suffixes[path.suffix or "no suffix"] = suffixes.get(path.suffix or "no suffix", 0) + 1
    if not suffixes:
        return " (empty)"
    common = sorted(suffixes, key=lambda suffix: -suffixes[suffix])[:4]
    return f" ({sum(suffixes.values())} other files: {', '.join(f'{suffixes[s]} x {s}' for s in common)})"


def _locate(folder: Path, text: str) -> FileRef:
    """Resolve a cell or line: a URL, or a path relative to the folder of its table."""
    return FileRef(text if "://" in text else str((folder / text).resolve()))


def _has_no_header(path: Path, spec: Spec) -> bool:
    """Tell whether a `.csv` is a list of paths and class numbers, as V-JEPA and VideoMAE read them."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return _path_and_class(file.readline(), spec) is not None


def _path_and_class(line: str, spec: Spec) -> tuple[str, int] | None:
    """Split a line `PATH NUMBER` into path and class, or None if it has another form."""
    found = re.fullmatch(r"(.+?)[\s,]+([0-9]{1,9})", line.strip())
    if found is None or PurePosixPath(found[1]).suffix.lower() not in _suffixes(spec):
        return None
    return found[1], int(found[2])


def _list(path: Path, spec: Spec) -> Iterator[InputFile]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"{path}: not a text file; give a list with one path or URL per line") from None
    for line in filter(None, map(str.strip, lines)):
        name, label = _path_and_class(line, spec) or (line, None)
        yield InputFile(name, _locate(path.parent, name), labels={} if label is None else {"label": label})


def _tar(path: Path, name: str, spec: Spec) -> Iterator[InputFile]:
    """Yield the samples of a WebDataset tar, with labels from their json and txt. Other members are not read."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _, dot, suffix = member.name.rpartition("/")[2].partition(".")
                if member.isreg() and dot:
                    samples.setdefault(member.name[: -len(suffix) - 1], {})[suffix.lower()] = member
            for key, members in samples.items():
                plain_suffix = next((suffix for suffix in members if f".{suffix}" in _suffixes(spec)), None)
                for suffix in [plain_suffix] if plain_suffix else _dotted_suffixes(members, spec):
                    part = suffix.rpartition(".")[0]
                    own = {s.removeprefix(f"{part}."): member for s, member in members.items()}
                    sample = f"{name}/{key}.{part}" if part else f"{name}/{key}"
                    yield _tar_sample(tar, path, sample, members[suffix], own)
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path}: not a complete tar ({error}); copy it again") from None


def _dotted_suffixes(suffixes: Iterable[str], spec: Spec) -> list[str]:
    """Select suffixes of videos with dots in their names. WebDataset splits a name at its first dot."""
    return [suffix for suffix in suffixes if f".{suffix.rpartition('.')[2]}" in _suffixes(spec)]


def _tar_sample(
    tar: tarfile.TarFile, path: Path, name: str, video: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]
) -> InputFile:
    name, file = readable(name), FileRef(str(path), video.offset_data, video.size)
    text = {suffix: _read_start(tar, members[suffix]) for suffix in ("json", "txt") if suffix in members}
    try:
        facts = read_labels(text["json"]) if "json" in text else {}
        caption = {"caption": text["txt"].decode().strip()} if "txt" in text else {}
    except ValueError as error:
        return InputFile(name, file, refused=(Reason.BAD_LABELS, f"json: {error}"))
    if is_ours(facts):
        split = facts.get("split")
        return InputFile(
            name, file, facts["labels"], group=facts["group"], split=split if isinstance(split, str) else None
        )
    return InputFile(name, file, {**facts, **caption})


def _read_start(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read(MAX_BYTES + 1) if file is not None else b""


def _table(path: Path, columns: Columns) -> Iterator[InputFile]:
    table = _read_table(path, columns)
    if columns.path not in table.column_names:
        raise BadInput(
            f"{path}: no column {columns.path!r} among {', '.join(table.column_names)}; set columns.path=NAME"
        )
    meaning = {columns.path, columns.start, columns.end, columns.group, columns.split}
    labels = [name for name in table.column_names if name not in meaning] if columns.labels is None else columns.labels
    missing = [name for name in labels if name not in table.column_names]
    if missing:
        raise BadInput(
            f"{path}: no column {missing[0]!r} among {', '.join(table.column_names)}; set columns.labels=NAMES"
        )
    for number, row in enumerate(table.to_pylist(), start=1):
        name = row[columns.path]
        if not isinstance(name, str) or not name:
            raise BadInput(f"{path}: row {number} has no {columns.path!r}; remove the row or fill it in")
        yield InputFile(
            name=name,
            file=_locate(path.parent, name),
            labels={label: plain(row[label]) for label in labels if row[label] not in (None, "")},
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
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: cannot be parsed as {suffix[1:]} ({reason}); check the file") from None


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _split(path: Path, number: int, split: str | None) -> str | None:
    if split is not None and not (split.isascii() and split.isalnum() and split.islower() and len(split) <= 16):
        raise BadInput(f"{path}: row {number}: invalid split {split!r}; use up to 16 characters a-z, 0-9, such as val")
    return split


def _seconds(path: Path, number: int, value: Any) -> float | None:
    if value in (None, "") or value != value:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise BadInput(f"{path}: row {number}: {value!r} is not a time in seconds; write for example 12.5")
    return seconds
