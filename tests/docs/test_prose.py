"""Few strings use the words and forms that docs/style.md bans."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ROOT

NO = r"(?:is|are|was|were) no\b(?! (?:better|worse|more|less|longer|later)\b)"
BANNED = re.compile(rf"\b(?:lest|anew|whoever|nobody|thereby|{NO})\b", re.IGNORECASE)
VAGUE = re.compile(r"\b(?:those|others|ones?|what)\b", re.IGNORECASE)
FRAGMENT = re.compile(r"(What|Of|Whether)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# room: most banned words, most docstrings that begin with a fragment, and most vague words per 1,000 words of
# docstrings. Lower these, and never raise them.
LIMITS = {
    "vjepa": (8, 2, 3.0),
    "data/vjepa_data": (9, 0, 3.0),
    "launch/vjepa_launch": (1, 0, 3.0),
    "examples": (0, 0, 5.0),
    "benchmarks": (2, 1, 5.5),
    "tests": (0, 0, 4.0),
}


def texts_of(file: Path) -> Iterator[str]:
    """Yield every docstring, field documentation and other string of prose in a Python file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value


def docstrings_of(file: Path) -> Iterator[str]:
    """Yield the docstring of every module, class and function in a Python file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, DOCUMENTED):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("room", LIMITS)
def test_a_room_has_few_banned_words(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    words, fragments, _ = LIMITS[room]
    found = [f"{file}: {hit[0]}" for file in files for text in texts_of(file) for hit in BANNED.finditer(text)]
    docs = [(file, text) for file in files for text in docstrings_of(file)]
    starts = [f"{file}: {text[:60]}" for file, text in docs if FRAGMENT.match(text)]
    assert len(found) <= words, "\n".join(found)
    assert len(starts) <= fragments, "\n".join(starts)


@pytest.mark.parametrize("room", LIMITS)
def test_docstrings_of_a_room_name_the_thing(room: str) -> None:
    docs = [(file, text) for file in sorted((ROOT / room).rglob("*.py")) for text in docstrings_of(file)]
    vague = [
        f"{file}: ...{text[max(0, hit.start() - 40) : hit.end() + 40]!r}"
        for file, text in docs
        for hit in VAGUE.finditer(text)
    ]
    assert 1000 * len(vague) <= LIMITS[room][2] * sum(len(text.split()) for _, text in docs), "\n".join(vague)


def test_pages_have_no_banned_words() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        found = [hit[0] for hit in BANNED.finditer(page.read_text())]
        assert len(found) <= (2 if page.name == "style.md" else 0), f"{page}: {found}"
