"""A source of a build, and the permanent names of sources."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vjepa_data.corpus.http_client import public_url
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.video import Reason, Refused


@dataclass(frozen=True)
class InputFile:
    """A source: a video, or a part of it."""

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


def readable(name: str) -> str:
    """Return a file name as text, with invalid UTF-8 bytes escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def locate(folder: Path, text: str) -> tuple[str, FileRef]:
    """Return the permanent name and the location that a cell or line gives: a URL, or a path relative to a folder.

    Names of URLs have no password and no query, which may be a signature.

    Raises:
        Refused: the path holds a zero byte.
    """
    if "://" in text:
        return public_url(text), FileRef(text)
    try:
        is_text = "\0" not in os.fsdecode(os.fsencode(text))
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise Refused(Reason.MISSING, f"{text[:100]!a} is not a path; it holds a zero byte or is not text")
    path = os.path.join(folder, os.path.expanduser(text) if text.startswith("~") else text)
    if "\\" in text and not os.path.lexists(path):  # written on Windows
        path = os.path.join(folder, text.replace("\\", "/"))
    return readable(text), FileRef(os.path.realpath(path) if ".." in Path(path).parts else path)
