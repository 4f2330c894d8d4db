"""docs/limits.md lists every time-out and retry limit of the code with its value."""

import ast
import re
from collections.abc import Iterator
from typing import get_args

import pytest
from pages import ROOT
from pydantic import BaseModel

from vjepa.config import Run
from vjepa_data.spec import Spec
from vjepa_launch.settings import Cluster

PAGE = ROOT / "docs" / "limits.md"
ROWS = dict(re.findall(r"^\| `([\w.]+)` \| ([\d.]+) \|", PAGE.read_text(), flags=re.MULTILINE))

LIMIT = re.compile(r"(?!.*_PER_)([A-Z_]*_(S|MIN|TRIES)|ATTEMPTS|RESTARTS|PATIENCE)")
SETTING = re.compile(r"(.*_)?(timeout|stall|hang|notice)_(s|min)|(idle_)?attempts|node_failures")

# Durations that limit no waiting: sizes, speeds, and sleeps of rehearsed work. In `media` and `synthetic` they are
# lengths of video.
NO_LIMITS = {
    "SAME_LENGTH_S",
    "SLOWEST_BYTES_S",
    "FRAMES_PER_CORE_S",
    "CLOCK_S",
    "READ_S",
    "STEP_S",
    "NO_LIMIT_MIN",
    "SLURM_CLOCK_S",
    "SHORT_S",
}
OF_VIDEO = re.compile(r"vjepa_data\.(synthetic|media\.(?!fetch|pool))")


def constants() -> Iterator[tuple[str, float]]:
    """Yield every module-level constant that is named like a time-out or a limit on attempts."""
    for room in ("", "data", "launch"):
        for file in sorted((ROOT / room).glob("vjepa*/**/*.py")):
            module = ".".join(file.relative_to(ROOT / room).with_suffix("").parts)
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                    (target,) = node.targets
                    name = target.id if isinstance(target, ast.Name) else ""
                    if LIMIT.fullmatch(name) and name not in NO_LIMITS and not OF_VIDEO.match(module):
                        yield f"{module}.{name}", float(node.value.value)  # pyright: ignore[reportArgumentType]


def settings(model: type[BaseModel], path: str) -> Iterator[tuple[str, float]]:
    """Yield every such setting of a settings class with its default."""
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from settings(kind, f"{path}.{name}")
        if SETTING.fullmatch(name):
            yield f"{path}.{name}", float(field.default)


FOUND = dict(constants()) | {
    name: value
    for path, model in (("run", Run), ("build", Spec), ("launch", Cluster))
    for name, value in settings(model, path)
}


@pytest.mark.parametrize("name", sorted(FOUND))
def test_a_limit_is_listed_with_its_value(name: str) -> None:
    assert name in ROWS, f"add a row to docs/limits.md: | `{name}` | {FOUND[name]:g} | ... |"
    assert float(ROWS[name]) == FOUND[name]


def test_the_page_lists_existing_limits_only() -> None:
    assert sorted(ROWS) == sorted(FOUND)
