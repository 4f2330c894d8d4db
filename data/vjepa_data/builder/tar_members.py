"""Read the table of contents of a tar that any program wrote, and name everything in it that cannot be used.

Python's tarfile stops at the first end mark or invalid header without a word. Tars joined with `cat` have several end
marks, and damaged tars have invalid headers, so this module continues after each of them, or reports the members that
it leaves out.
"""

import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vjepa_data.media.video import Reason

BLOCK = 1 << 20

MAX_LINKS = 40
"""Longest chain of links that is followed, as in Linux."""

PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"\xfd7zXZ": "unxz", b"BZh": "bunzip2", b"PK": "unzip"}
"""First bytes of compressed files, and the program that unpacks each."""


NO_END_MARK = Reason.TRUNCATED, "ends without an end mark, so files may be missing; copy it again"


@dataclass(frozen=True)
class Span:
    """A member's bytes in its tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class Skipped:
    """A member that is left out, or the rest of the tar if `name` is empty."""

    name: str
    reason: Reason
    detail: str


@dataclass
class TarSample:
    """All members with the same key: the name up to the first dot after the last slash."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)
    """By suffix, in lower case."""
    parts: dict[str, int] = field(default_factory=dict)
    """Number of the joined tar that each member comes from."""


@dataclass
class TarContents:
    """Samples of a tar in the order of their first member, and the members that are left out."""

    samples: list[TarSample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def read_tar(path: Path) -> TarContents:
    """List the samples of a tar. Only headers are read.

    Members of a sample need not be adjacent. Links count as the member that they point to. AppleDouble files (`._*`)
    are passed over. The first of several members with the same name is kept. If they come from tars that were joined,
    the later members form a sample of their own, with `~2` after the key.
    """
    contents = TarContents()
    samples: dict[str, TarSample] = {}
    for part, name, span in _spans(path, contents.skipped):
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot or base.startswith("._") or "__MACOSX" in folder.split("/"):
            continue
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        if key in samples and samples[key].parts.get(suffix, part) < part:
            key = f"{key}~{part + 1}"
        sample = samples.setdefault(key, TarSample(key))
        if suffix in sample.members:
            contents.skipped.append(Skipped(name, Reason.DUPLICATE, "an earlier file has the same name"))
            continue
        sample.members[suffix], sample.parts[suffix] = span, part
    contents.samples.extend(samples.values())
    return contents


def _spans(path: Path, skipped: list[Skipped]) -> Iterator[tuple[int, str, Span]]:
    """Yield number of the joined tar, name and bytes of every regular file and of every link to a file."""
    known: dict[tuple[int, str], Span] = {}
    links: list[tuple[int, str, str]] = []
    try:
        with path.open("rb") as file:
            for part, member in _headers(file, path.stat().st_size, skipped):
                span = _span(member, path.stat().st_size, skipped)
                if span is not None:
                    known[part, posixpath.normpath(member.name)] = span
                    yield part, member.name, span
                elif member.islnk():
                    links.append((part, member.name, posixpath.normpath(member.linkname)))
                elif member.issym():
                    folder = posixpath.dirname(member.name)
                    links.append((part, member.name, posixpath.normpath(posixpath.join(folder, member.linkname))))
    except OSError as error:
        skipped.append(Skipped("", Reason.MISSING, error.strerror or "cannot be read"))
    targets = {(part, posixpath.normpath(name)): target for part, name, target in links}
    for part, name, target in links:
        for _ in range(MAX_LINKS):
            target = targets.get((part, target), target)
        if (part, target) in known:
            yield part, name, known[part, target]
        else:
            skipped.append(Skipped(name, Reason.SKIPPED, "a link to a file that is not in the tar"))


def _span(member: tarfile.TarInfo, size: int, skipped: list[Skipped]) -> Span | None:
    """Return the bytes of a regular file that is stored as a whole, and report other files with contents."""
    stored: Any = member.sparse  # offset and size of each piece that is not a hole
    pieces = [piece for piece in stored if piece[1]] if member.issparse() else [(0, member.size)]
    if member.isreg() and pieces != [(0, member.size)]:
        detail = "stored with holes (tar --sparse); extract it, and pack it without --sparse"
        skipped.append(Skipped(member.name, Reason.SKIPPED, detail))
    elif member.isreg() and member.offset_data + member.size > size:
        skipped.append(Skipped(member.name, Reason.TRUNCATED, "extends past the end of the tar; copy the tar again"))
    elif member.isreg():
        return Span(member.offset_data, member.size)
    elif not (member.isdir() or member.islnk() or member.issym()):
        kind = member.type.decode("ascii", "backslashreplace")
        skipped.append(Skipped(member.name, Reason.SKIPPED, f"not a regular file (type {kind!r} in the tar)"))
    return None


def _headers(file: BinaryIO, size: int, skipped: list[Skipped]) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Yield every header, with the number of its tar in a file of joined tars."""
    if size == 0:
        skipped.append(Skipped("", Reason.EMPTY, "0 bytes"))
    part = end = 0
    while (at := _next_nonzero(file, end)) < size:
        if 0 < end == at > size - tarfile.BLOCKSIZE:  # the last header is cut
            skipped.append(Skipped("", *NO_END_MARK))
            return
        file.seek(at)
        end = at
        try:
            with tarfile.TarFile(fileobj=file, mode="r") as tar:
                for member in tar:
                    if member.offset < end or member.size < 0:
                        raise tarfile.ReadError("a size is negative")
                    end = member.offset + 1
                    yield part, member
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            if not (skipped and skipped[-1].reason is Reason.TRUNCATED):  # said of its last member
                skipped.append(Skipped("", *_explain(file, at, end, size, error)))
            return
        if end == at:
            skipped.append(Skipped("", *_explain(file, at, end, size, None)))
            return
        if end >= size:
            skipped.append(Skipped("", *NO_END_MARK))
        part += 1


def _next_nonzero(file: BinaryIO, at: int) -> int:
    """Return the position of the first byte from `at` on that is not zero, or the end of the file."""
    file.seek(at)
    while block := file.read(BLOCK):
        rest = block.lstrip(b"\0")
        if rest:
            return at + len(block) - len(rest)
        at += len(block)
    return at


def _explain(file: BinaryIO, at: int, end: int, size: int, error: Exception | None) -> tuple[Reason, str]:
    """Say why a tar cannot be read, or cannot be read further than `end`."""
    if end == at == 0:
        file.seek(0)
        head = file.read(16)
        for magic, program in PACKED.items():
            if head.startswith(magic):
                return Reason.SKIPPED, f"not a tar but compressed; unpack it with {program}"
        kind = "a web page" if head.lstrip().startswith(b"<") else "it has no valid header"
        return Reason.DAMAGED, f"not a tar ({kind}); copy it again"
    if error is not None and "unexpected end" in str(error):
        return NO_END_MARK
    return Reason.DAMAGED, f"invalid header near byte {end}, so the last {size - end} bytes are not read; copy it again"


def video_suffixes(suffixes: Iterable[str], wanted: frozenset[str]) -> list[str]:
    """Select the suffixes of videos in a sample: `mp4`, and suffixes with dots, such as `left.mp4`."""
    return [suffix for suffix in suffixes if f".{suffix.rpartition('.')[2]}" in wanted]
