"""Many runs at once: a file of settings to vary becomes an array with a run for each element."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import Field, model_validator

from vjepa_launch.array import MOST_ELEMENTS
from vjepa_launch.settings import Settings


class Sweep(Settings):
    """A file that says what to vary."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,60}$")
    """Name of the sweep; its folder is `runs/NAME` unless told otherwise."""

    config: str
    """The run file that all elements start from: a path, or the name of one that ships with the project."""

    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Setting to values; every combination is an element (`{optim.lr: [1e-4, 3e-4], seed: [0, 1]}`)."""

    elements: tuple[dict[str, Any], ...] = ()
    """In place of a grid, or beside it: elements one by one (`[{optim.lr: 1e-4, steps: 100}]`)."""

    at_once: int = Field(default=256, ge=1)
    """Elements that run at a time."""

    @model_validator(mode="after")
    def _not_empty(self) -> "Sweep":
        if not self.grid and not self.elements:
            raise ValueError("a sweep needs a grid or elements")
        count = len(combinations(self))
        if count > MOST_ELEMENTS:
            raise ValueError(f"{count} elements are more than the {MOST_ELEMENTS} of one array; make several sweeps")
        return self


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    name: str
    overrides: tuple[str, ...]
    """`setting=value` with values in YAML, as on the command line."""


def combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """What each element sets."""
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    return (grid if sweep.grid else []) + list(sweep.elements)


def expand(sweep: Sweep) -> list[Variant]:
    """The runs of a sweep, named by their number and what they set."""
    variants = []
    for number, values in enumerate(combinations(sweep)):
        told = "-".join(f"{key}-{_plain(value)}" for key, value in values.items())
        name = f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', told)}"[:80]
        settings = {"name": f"{sweep.name}-{number:03d}", **values}
        variants.append(Variant(name, tuple(f"{key}={_plain(value)}" for key, value in settings.items())))
    return variants


def _plain(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
