"""Descriptions of the signals that a corpus holds: numbers in time beside each video. Never imports torch or pyarrow.

In a shard a signal is an ordinary WebDataset member, `KEY.<name>.npy`: float32 [rows, columns]. A text is
`KEY.<name>.txt` in UTF-8. The description is a part of the build spec, so the manifest carries it.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vjepa_data.settings import Settings

SNAP_ROWS = 1e-3
"""A time this close to a row, in rows, counts as that row. Clips are cut at whole microseconds."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,23}$")]
"""Name of a signal or text. With a key of 64 characters and the suffix it fits the 100 characters of a tar header."""


class SignalSpec(Settings):
    """A signal: its columns, its clock, and how a clip combines its rows."""

    columns: tuple[str, ...] = Field(min_length=1, max_length=4096)
    """Name of each column."""

    units: tuple[str, ...]
    """Unit of each column, such as m, rad or 1."""

    kind: Literal["action", "state"]
    """A `state` is a value at a time, sampled at each frame. An `action` acts from its row to the next row, and a clip
    combines all actions between two frames."""

    combine: Literal["sum", "last", "mean", "stack"] | None = None
    """How the actions between two frames are combined: `sum` for differences, `last` or `mean` for absolute commands,
    `stack` to keep every row. `stack` needs the same number of rows between any two frames."""

    rate_hz: float | None = Field(default=None, gt=0)
    """Rows per second of source time. Default: a row for each frame of the source video."""

    shift_s: float = 0.0
    """Time of the first row, in seconds after the first frame. Negative if the rows come late."""

    shift_rows: int = 0
    """The same in rows, added to `shift_s`. Set -1 if row `t` holds the action that led to frame `t`."""

    flip: tuple[float, ...] | None = None
    """Factor of each column under a horizontal flip of the picture, such as -1 for a sideways motion. Default: unknown,
    so flips are refused."""

    @model_validator(mode="after")
    def _consistent(self) -> "SignalSpec":
        for name, values in (("units", self.units), ("flip", self.flip)):
            if values is not None and len(values) != len(self.columns):
                raise ValueError(
                    f"{name} has {len(values)} entries for {len(self.columns)} columns; give a value per column"
                )
        if (self.kind == "action") != (self.combine is not None):
            raise ValueError(
                f"combine is {self.combine or 'missing'} for a signal of kind {self.kind}; set it for actions only"
            )
        return self

    def span(self, start_s: float, end_s: float, *, rate_hz: float, rows: int) -> range:
        """Return the rows that belong to a part of the source video.

        These are all actions that overlap the part, or all states inside it, so no row of a neighbouring episode.

        Args:
            start_s, end_s: the part, in seconds of the source video.
            rate_hz: rows per second.
            rows: rows of the source.
        """
        begin, end = (_snap((time_s - self.first_row_s(rate_hz)) * rate_hz) for time_s in (start_s, end_s))
        first = math.floor(begin) if self.kind == "action" else math.ceil(begin)
        return range(max(0, first), min(rows, math.ceil(end)))

    def first_row_s(self, rate_hz: float) -> float:
        """Return the time of row 0 on the clock of the source video, in seconds."""
        return self.shift_s + self.shift_rows / rate_hz


def _snap(position: float) -> float:
    return round(position) if abs(position - round(position)) < SNAP_ROWS else position


def member_of_signal(name: str) -> str:
    """Return the WebDataset suffix of a signal's member."""
    return f"{name}.npy"


def member_of_text(name: str) -> str:
    """Return the WebDataset suffix of a text's member."""
    return f"{name}.txt"


def signals_of(spec: Mapping[str, Any]) -> dict[str, SignalSpec]:
    """Read the signals that a manifest's spec describes; none for a foreign corpus."""
    return {name: SignalSpec.model_validate(values) for name, values in spec.get("signals", {}).items()}


def texts_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the names of the texts that a manifest's spec lists."""
    return tuple(spec.get("texts", ()))
