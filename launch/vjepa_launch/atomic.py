"""Write small files so that a reader sees the old content or the new content, never a part."""

import json
import os
from pathlib import Path
from typing import Any


def atomic_write(path: Path, text: str) -> None:
    """Write `text` to a temporary file in the same folder and rename it to `path`. Create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if the file does not exist."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
