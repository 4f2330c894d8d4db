"""Stage 1 of a build: turn folders, files, lists, tables and tars of videos into one list of sources.

Everything that is not read is named: as a refused source if it may hold videos, else in the log.
"""

import dataclasses
import hashlib
import itertools
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlsplit

from vjepa_data.builder import hdf5, lerobot
from vjepa_data.builder.labels import MAX_FILE_BYTES, YT_DLP_FIELDS, check_labels, read_labels
from vjepa_data.builder.source import InputFile as InputFile
from vjepa_data.builder.source import locate, readable
from vjepa_data.builder.table_rows import table_sources
from vjepa_data.builder.tables import UNPACKED, open_table, open_text, table_suffix
from vjepa_data.builder.tar_members import Span, TarSample, read_tar, video_suffixes
from vjepa_data.builder.tars import list_prefix
from vjepa_data.corpus.format import is_ours
from vjepa_data.corpus.http_client import public_url
from vjepa_data.media.fetch import SCHEMES, FileRef
from vjepa_data.media.video import IMAGE_SUFFIXES, SUFFIXES, Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.signal_spec import stored
from vjepa_data.spec import Spec

log = logging.getLogger(__name__)

PACKED = re.compile(r".*\.(tar\.\w+|tgz|tbz2?|txz|tzst|zip|7z|rar)", re.IGNORECASE)
"""Names of archives that must be unpacked first."""

SECRET = re.compile(
    r"(x-(amz|goog|oss|cos)-.*|.*sign.*|sig|s[eprvt]|sk[eoitsv]+d?|expires?|exp|e|policy|key-pair-id|.*access.*id|.*token.*"
    r"|auth.*|.*key|hdn\w*|hmac|hash|md5|verify|response-content-.*|download|dl)",
    re.IGNORECASE,
)
"""Parameters of a query that sign a URL or change only how it is sent, so that they do not tell two files apart."""

TABLE_NAMES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
"""Tables that Hugging Face puts into a folder of videos, with the column `file_name`."""

MAX_NESTED = 4
"""Lists that may name each other in a row."""


def ingest(sources: Sequence[str], *, spec: Spec, out: Path | None = None) -> list[InputFile]:
    """List every source in order of name.

    Args:
        sources: folders (searched recursively), LeRobot folders, HDF5 files with episodes, video files, tables (CSV,
            TSV, JSONL, JSON, parquet) with a video per row, lists (.txt) with a path per line, WebDataset tars, and
            URLs (http, https, s3, gs) of single files, or of a prefix if it ends in `/`.
        spec: whether to look for videos or images, and the names of a table's columns.
        out: folder of the corpus, which is skipped if it lies below a source.

    Raises:
        BadInput: a source does not exist or cannot be read, two sources have the same name, or no video is found.
    """
    if not sources:
        raise BadInput("no sources; give folders, video files or tables of videos")
    for text in sources:
        if out and "://" not in text and _absolute(text).is_relative_to(_absolute(out)):
            raise BadInput(f"source {text} is --out or lies inside it; write the corpus to another folder")
    found = [source for text in sources for source in _expand(text, spec, out)]
    if not any(source.refused is None or source.refused[0] != Reason.SKIPPED for source in found):
        shown = ", ".join(map(public_url, sources))
        example = f"; {found[0].name} is {found[0].refused[1]}" if found and found[0].refused else ""
        raise BadInput(f"no {spec.media} in {shown}{_other_files(sources)}{example}; give a folder that has some")
    if spec.folder_label is not None:
        found = [_with_folder_label(source, spec.folder_label) for source in found]
    found = _tell_urls_apart(found)
    found.sort(key=lambda source: (source.name, source.start_s or 0.0, source.end_s or 0.0))
    return _refuse_repeated(found)


def _with_folder_label(source: InputFile, label: str) -> InputFile:
    folder = PurePosixPath(source.name).parent.name
    return dataclasses.replace(source, labels={label: folder, **source.labels}) if folder else source


def _tell_urls_apart(sources: list[InputFile]) -> list[InputFile]:
    """Add a hash of the query to names of URLs that differ only in their query, such as `?id=1` and `?id=2`."""
    places: dict[str, set[str]] = {}
    for source in sources:
        if source.file.is_remote:
            places.setdefault(source.name, set()).add(_query_hash(source.file.path))
    return [
        dataclasses.replace(source, name=f"{source.name}?{_query_hash(source.file.path)}")
        if len(places.get(source.name, ())) > 1
        else source
        for source in sources
    ]


def _query_hash(url: str) -> str:
    parts = urlsplit(url)
    pairs = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True)]
    kept = sorted((name, value) for name, value in pairs if not SECRET.fullmatch(name))
    return hashlib.blake2b(repr((kept, parts.fragment)).encode(), digest_size=4).hexdigest()


def _refuse_repeated(found: list[InputFile]) -> list[InputFile]:
    """Keep the first of several entries for the same part of a video, and refuse the rest.

    Raises:
        BadInput: different files have the same name.
    """
    kept: list[InputFile] = []
    clashes: list[str] = []
    first: dict[tuple[str, float | None, float | None], InputFile] = {}
    for source in found:
        if source.refused is None:
            other = first.setdefault((source.name, source.start_s, source.end_s), source)
            if source.file != other.file and not source.file.is_remote:
                clashes.append(f"{source.name!r} is {other.file.path} and {source.file.path}")
            elif source is not other:
                detail = "listed several times; the first entry is kept"
                source = dataclasses.replace(source, refused=(Reason.DUPLICATE, detail))
        kept.append(source)
    if clashes:
        more = f", and {len(clashes) - 3} more" if len(clashes) > 3 else ""
        raise BadInput(
            f"two sources have the same name: {'; '.join(clashes[:3])}{more}. "
            "Give the folder above both as the source, or rename a source."
        )
    return kept


def _suffixes(spec: Spec) -> frozenset[str]:
    return SUFFIXES if spec.media == "videos" else IMAGE_SUFFIXES


def _absolute(path: str | Path) -> Path:
    """Return an absolute path without links. Unlike `Path.resolve`, it accepts links that point to each other."""
    return Path(os.path.realpath(path))


def _expand(text: str, spec: Spec, out: Path | None) -> Iterable[InputFile]:
    if "://" in text:
        return _from_url(text, spec)
    path = _absolute(text)
    if os.path.isdir(path) and lerobot.is_lerobot(path):
        return _lerobot(path, spec)
    if os.path.isdir(path):
        return _folder(path, spec, _absolute(out) if out else None)
    if not os.path.isfile(path):
        raise BadInput(f"{text}: no such file or folder; give folders, video files or tables of videos")
    return _expand_file(path, path.name, spec)


def _expand_file(path: Path, name: str, spec: Spec, *, below: str = "", depth: int = 0) -> Iterable[InputFile]:
    """Yield the sources of a list, table or tar, or a video file itself.

    Args:
        path, name: location and permanent name of the file.
        spec: as for `ingest`.
        below: permanent name of the folder of a list or table, which precedes the names in it.
        depth: number of lists that lead to this file.
    """
    suffix = table_suffix(path)
    plain = path.with_suffix("") if path.suffix.lower() in UNPACKED else path
    if plain.suffix.lower() == ".txt" or (suffix == ".csv" and _has_no_header(path, spec)):
        return _list(path, spec, below, depth)
    if suffix is not None:
        return table_sources(path, spec.columns, name=readable(name), below=below)
    if path.suffix.lower() == ".tar":
        return _tar(path, readable(name), spec)
    if path.suffix.lower() in hdf5.SUFFIXES:
        return hdf5.episodes(path, readable(name), spec)
    if PACKED.fullmatch(path.name):
        return [_packed(path, name)]
    return [_file(path, name)]


def _packed(path: Path, name: str) -> InputFile:
    return InputFile(readable(name), FileRef(str(path)), refused=(Reason.SKIPPED, "a packed archive; unpack it"))


def _folder(folder: Path, spec: Spec, out: Path | None) -> list[InputFile]:
    """List every video and tar below a folder. Hidden files and folders are skipped.

    Tables named `metadata` that list videos give their labels. Other tables and HDF5 files are read if there are
    neither videos nor tars. Trajectories of DROID have their videos with them. A broken link is a source too: it will
    be rejected as missing, so that it is reported.
    """
    wanted = _suffixes(spec)
    found: list[InputFile] = []
    tables: list[Path] = []
    videos: list[Path] = []
    others: list[Path] = []
    arrays: list[Path] = []

    def name_of(path: Path) -> str:
        return readable(path.relative_to(folder.parent).as_posix())

    for path in _walk(folder, out, found):
        suffix = path.suffix.lower()
        if suffix in wanted:
            videos.append(path)
        elif suffix == ".tar":
            found.extend(_tar(path, name_of(path), spec))
        elif suffix in hdf5.SUFFIXES:
            arrays.append(path)
        elif PACKED.fullmatch(path.name):
            found.append(_packed(path, name_of(path)))
        elif table_suffix(path) not in (None, ".json"):
            tables.append(path)
        else:
            others.append(path)
    trajectories = [path for path in arrays if path.name == hdf5.TRAJECTORY]
    droid = {path.parent for path in trajectories}
    videos = [path for path in videos if droid.isdisjoint(path.parents)]
    has_media = bool(videos or trajectories) or any(source.refused is None for source in found)
    for path in arrays:
        if path in trajectories or not has_media:
            found.extend(hdf5.episodes(path, name_of(path), spec))
        else:
            others.append(path)
    has_media = has_media or bool(arrays)
    listed: set[str] = set()
    for path in tables:
        columns = spec.columns
        if _lists_videos(path):
            columns = columns.model_copy(update={"path": "file_name"})
            rows = list(table_sources(path, columns, name=name_of(path), below=name_of(path.parent)))
            listed |= {source.file.path for source in rows}
            found.extend(_with_sidecar(source) for source in rows)
        elif has_media:
            others.append(path)
        else:
            found.extend(table_sources(path, columns, name=name_of(path), below=name_of(path.parent)))
    found.extend(_file(path, name_of(path)) for path in videos if str(path) not in listed)
    _log_others(folder, others, videos)
    return found


def _lists_videos(path: Path) -> bool:
    """Tell whether a table is Hugging Face's list of the videos in its folder, with the column `file_name`."""
    if path.name.lower() not in TABLE_NAMES:
        return False
    try:
        table = open_table(path, path_column="file_name")
        first = itertools.islice(table.rows, 100) if table.names is None else ()
        return "file_name" in (table.names or {name for row in first for name in row.values})
    except BadInput as error:
        log.warning("%s, so it gives no labels", error)
        return False


def _walk(folder: Path, out: Path | None, skipped: list[InputFile]) -> Iterator[Path]:
    """Yield all files below a folder, and add unreadable folders and files to `skipped`."""

    def skip(path: Path, reason: Reason, detail: str) -> None:
        name = path.relative_to(folder.parent).as_posix()
        skipped.append(InputFile(readable(name), FileRef(str(path)), refused=(reason, detail)))

    def on_error(error: OSError) -> None:
        skip(Path(os.fsdecode(error.filename)), Reason.MISSING, f"a folder that cannot be read: {error.strerror}")

    for root, folders, files in os.walk(folder, onerror=on_error):
        here = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and here / name != out)
        for name in folders:
            if (here / name).is_symlink():
                skip(here / name, Reason.SKIPPED, "a link to a folder; give the folder itself as a source")
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = here / name
            try:
                is_file = stat.S_ISREG(path.stat().st_mode)
            except OSError:
                is_file = True  # a broken link, or no permission; it will be rejected
            if is_file:
                yield path
            else:
                skip(path, Reason.SKIPPED, "not a regular file")


def _log_others(folder: Path, others: Sequence[Path], videos: Sequence[Path]) -> None:
    """Say which files of a folder are not read, except those that belong to a video."""
    stems = {(path.parent, path.name.partition(".")[0]) for path in videos}
    left = [path for path in others if (path.parent, path.name.partition(".")[0]) not in stems]
    if left:
        log.info("%s: not read: %s", folder.name, _count_suffixes(left))


def _count_suffixes(paths: Sequence[Path]) -> str:
    counts = Counter(path.suffix or "no suffix" for path in paths).most_common(8)
    files = ", ".join(f"{count} x {suffix}" for suffix, count in counts)
    tables = [path.name for path in paths if table_suffix(path) not in (None, ".json")]
    return files + (f" (to use a table such as {tables[0]}, give it as the source)" if tables else "")


def _lerobot(folder: Path, spec: Spec) -> Iterator[InputFile]:
    """Yield the episodes of a LeRobot folder as parts of its videos."""
    opened = lerobot.open_folder(folder, spec.camera)
    refusals = lerobot.refusals(opened, stored(spec.signals))
    for episode in opened.episodes:
        refused = refusals.get(episode.number)
        yield InputFile(
            name=f"{folder.name}/{episode.video.relative_to(folder).as_posix()}",
            file=FileRef(str(episode.video)),
            labels={"episode": episode.number, "task": "; ".join(episode.tasks)},
            group=f"{folder.name}/episode {episode.number}",
            start_s=episode.start_s,
            end_s=opened.end_s(episode),
            refused=refused and (refused.reason, refused.detail),
        )


def _file(path: Path, name: str) -> InputFile:
    return _with_sidecar(InputFile(readable(name), FileRef(str(path))))


def _with_sidecar(source: InputFile) -> InputFile:
    """Add the labels from VIDEO.json, or from the VIDEO.info.json of yt-dlp. Labels from a table come first."""
    if source.refused or source.file.is_remote or not source.file.is_whole:
        return source
    path = Path(source.file.path)
    sidecar = next(
        (file for suffix in (".json", ".info.json") if os.path.isfile(file := path.with_suffix(suffix))), None
    )
    if sidecar is None:
        return source
    try:
        with sidecar.open("rb") as file:
            labels = read_labels(file.read(MAX_FILE_BYTES + 1))
        if sidecar.name == f"{path.stem}.info.json":
            labels = {name: value for name, value in labels.items() if name in YT_DLP_FIELDS}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return dataclasses.replace(source, refused=(Reason.BAD_LABELS, f"{readable(sidecar.name)}: {reason}"))
    return dataclasses.replace(source, labels={**labels, **source.labels})


def _from_url(url: str, spec: Spec) -> list[InputFile]:
    scheme = url.partition("://")[0]
    shown = public_url(url)
    if scheme not in SCHEMES:
        raise BadInput(f"{shown}: unsupported scheme {scheme!r}; use {', '.join(sorted(SCHEMES))} or copy the files")
    if shown.endswith("/"):
        found = list_prefix(url, hint="give a .txt or .csv file of URLs")
        wanted = _suffixes(spec)
        return [InputFile(file, FileRef(file)) for file in found if PurePosixPath(file).suffix.lower() in wanted]
    path = Path(shown)
    if table_suffix(path) or path.suffix.lower() in (".txt", ".tar"):
        kind = "tars are read by `vjepa index`, or" if path.suffix.lower() == ".tar" else "lists and tables are read"
        raise BadInput(f"{shown}: {kind} from this machine; download it first")
    return [InputFile(shown, FileRef(url))]


def _other_files(sources: Sequence[str]) -> str:
    """Summarize the other files in the sources, for a message."""
    files = [path for text in sources if "://" not in text for path in Path(text).rglob("*") if os.path.isfile(path)]
    return f" ({len(files)} other files: {_count_suffixes(files)})" if files else " (empty)"


def _has_no_header(path: Path, spec: Spec) -> bool:
    """Tell whether a `.csv` is a list of paths and class numbers, as V-JEPA and VideoMAE read them."""
    with open_text(path, spec.columns.encoding) as file:
        return _path_and_class(file.readline().lstrip("\ufeff"), spec) is not None


def _path_and_class(line: str, spec: Spec) -> tuple[str, int] | None:
    """Split a line `PATH NUMBER` into path and class, or None if it has another form."""
    found = re.fullmatch(r"(.+?)[\s,]+(-?[0-9]{1,9})", line.strip())
    if found is None or PurePosixPath(found[1]).suffix.lower() not in _suffixes(spec):
        return None
    return found[1], int(found[2])


def _list(path: Path, spec: Spec, below: str, depth: int) -> Iterator[InputFile]:
    """Yield the source of every line. A line may name a table, tar or list as well, and `#` begins a comment."""
    with open_text(path, spec.columns.encoding) as file:
        for number, line in enumerate(file, start=1):
            line = line.strip().lstrip("\ufeff")
            if line and not (line.startswith("#") and not os.path.lexists(os.path.join(path.parent, line))):
                yield from _list_line(path, number, line, spec, below, depth)


def _list_line(path: Path, number: int, line: str, spec: Spec, below: str, depth: int) -> Iterable[InputFile]:
    place = FileRef(str(path))
    own = f"{readable(path.name)} line {number}"
    text, label = _path_and_class(line, spec) or (line, None)
    if quoted := re.fullmatch(r"file\s+(['\"]?)(.+)\1", text):  # a list for ffmpeg's concat
        text = quoted[2]
    kind = PurePosixPath(public_url(text)).suffix.lower()
    words = re.match(r"(\S+)\s", text)
    if kind not in _suffixes(spec) and words and PurePosixPath(words[1]).suffix.lower() in _suffixes(spec):
        detail = f"line {number}: text after the path; use a table (.csv, .tsv) to give labels"
        return [InputFile(own, place, refused=(Reason.BAD_LABELS, detail))]
    try:
        name, file = locate(path.parent, text)
    except Refused as refusal:
        return [InputFile(own, place, refused=(refusal.reason, f"line {number}: {refusal.detail}"))]
    name = f"{below}/{name}" if below and not file.is_remote else name
    is_nested = kind in (".tar", ".txt") or table_suffix(Path(text)) not in (None, ".json")
    if is_nested and not file.is_remote:
        if depth >= MAX_NESTED:
            raise BadInput(f"{path}: line {number} names a list, {MAX_NESTED} lists deep; give that list itself")
        if os.path.isfile(file.path):
            return _expand_file(Path(file.path), name, spec, below=name.rpartition("/")[0], depth=depth + 1)
    return [InputFile(name, file, labels={} if label is None else {"label": label})]


def _tar(path: Path, name: str, spec: Spec) -> Iterator[InputFile]:
    """Yield the samples of a WebDataset tar, with labels from their json and txt. Other members are not read."""
    contents = read_tar(path)
    wanted = _suffixes(spec)
    has_video = False
    for sample in contents.samples:
        suffixes = video_suffixes(sample.members, wanted)
        has_video = has_video or bool(suffixes)
        for suffix in suffixes:
            part = suffix.rpartition(".")[0]
            is_first = not part and suffix == next(s for s in suffixes if "." not in s)
            ending = "" if is_first else f".{part or suffix}"
            yield from _tar_sample(path, readable(f"{name}/{sample.key}{ending}"), sample, suffix, spec)
    for skipped in contents.skipped:
        if not skipped.name or PurePosixPath(skipped.name).suffix.lower() in {*wanted, ".json", ".txt"}:
            has_video = True  # or an unreadable file with the name of a video
            whole = readable(f"{name}/{skipped.name}".rstrip("/"))
            yield InputFile(whole, FileRef(str(path)), refused=(skipped.reason, skipped.detail))
    if not has_video:
        kinds = Counter(f".{suffix}" for sample in contents.samples for suffix in sample.members).most_common(4)
        detail = f"a tar without {spec.media} ({', '.join(f'{n} x {suffix}' for suffix, n in kinds) or 'no files'})"
        yield InputFile(name, FileRef(str(path)), refused=(Reason.EMPTY, detail))


def _tar_sample(path: Path, name: str, sample: TarSample, video: str, spec: Spec) -> Iterator[InputFile]:
    """Yield a sample, and a refusal of its caption alone if that is in another encoding."""
    part = video.rpartition(".")[0]
    members = {suffix.removeprefix(f"{part}.") if part else suffix: span for suffix, span in sample.members.items()}
    file = FileRef(str(path), sample.members[video].offset, sample.members[video].size)
    try:
        with path.open("rb") as tar:
            facts = read_labels(_read(tar, members["json"])) if "json" in members else {}
            text = _read(tar, members["txt"]) if "txt" in members and not is_ours(facts) else b""
    except (OSError, ValueError) as error:
        yield InputFile(name, file, refused=(Reason.BAD_LABELS, f"json: {error}"))
        return
    if is_ours(facts):
        split = facts.get("split")
        split = split if isinstance(split, str) else None
        yield InputFile(name, file, facts["labels"], group=facts["group"], split=split)
        return
    try:
        yield InputFile(name, file, check_labels({**facts, **(_caption(text, spec) if text else {})}))
    except ValueError as error:
        yield InputFile(name, file, facts)
        yield InputFile(f"{name}.txt", file, refused=(Reason.BAD_LABELS, f"the caption is left out: {error}"))


def _caption(data: bytes, spec: Spec) -> dict[str, Any]:
    try:
        return {"caption": data.decode(spec.columns.encoding or "utf-8-sig").strip()}
    except UnicodeDecodeError as error:
        raise ValueError(f"not {error.encoding} at byte {error.start}; set columns.encoding, such as cp1252") from None


def _read(tar: BinaryIO, span: Span) -> bytes:
    tar.seek(span.offset)
    return tar.read(min(span.size, MAX_FILE_BYTES + 1))
