"""Expand a sweep file into runs, the elements of an array."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import Field, model_validator

from vjepa_launch.array import MAX_ELEMENTS
from vjepa_launch.settings import LaunchSettings


class Sweep(LaunchSettings):
    """A sweep file: a base configuration and the settings to vary."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,60}$")
    """Name of the sweep. Its folder is `runs/NAME` by default."""

    config: str
    """The run file that all elements start from: a path, or the name of a file that ships with the project."""

    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values for each setting. Every combination is an element (`{optim.lr: [1e-4, 3e-4], seed: [0, 1]}`)."""

    elements: tuple[dict[str, Any], ...] = ()
    """Single elements, instead of a grid or after it (`[{optim.lr: 1e-4, steps: 100}]`)."""

    at_once: int = Field(default=256, ge=1)
    """Elements that run at a time."""

    @model_validator(mode="after")
    def _check_size(self) -> "Sweep":
        if not self.grid and not self.elements:
            raise ValueError("a sweep needs a grid or elements")
        count = len(combinations(self))
        if count > MAX_ELEMENTS:
            raise ValueError(f"{count} elements exceed the limit of {MAX_ELEMENTS} per array; split the sweep")
        return self


@dataclass(frozen=True)
class Variant:
    """A run of a sweep."""

    name: str
    overrides: tuple[str, ...]
    """`setting=value` with values in YAML, as on the command line."""


def combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the settings of each element."""
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    return (grid if sweep.grid else []) + list(sweep.elements)


def expand(sweep: Sweep) -> list[Variant]:
    """Return the runs of a sweep, named by their number and settings."""
    variants = []
    for number, values in enumerate(combinations(sweep)):
        label = "-".join(f"{key}-{_one_line(value)}" for key, value in values.items())
        name = f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}"[:80]
        settings = {"name": f"{sweep.name}-{number:03d}", **values}
        variants.append(Variant(name, tuple(f"{key}={_one_line(value)}" for key, value in settings.items())))
    return variants


def _one_line(value: Any) -> str:
    """Format a value as YAML on a single line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
