"""Descriptions of the signals that a corpus holds: numbers in time for each video. Never imports torch or pyarrow.

In a shard a signal is an ordinary WebDataset member, `KEY.<name>.npy`: float32 [rows, columns]. A text is
`KEY.<name>.txt` in UTF-8. The description is a part of the build spec, so the manifest carries it.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_serializer, model_validator

from vjepa_data.settings import Settings, without_unused

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
    """Combination of the actions between two frames: `sum` for differences, `last` or `mean` for absolute commands,
    `stack` to keep every row. `stack` needs the same number of rows between any two frames."""

    rate_hz: float | None = Field(default=None, gt=0)
    """Rows per second of source time. Default: a row for each frame of the source video."""

    shift_s: float = 0.0
    """Time of the first row, in seconds after the first frame. Negative if the rows come late."""

    shift_rows: int = 0
    """The shift in rows, added to `shift_s`. Set -1 if row `t` holds the action that led to frame `t`."""

    flip: tuple[float, ...] | None = None
    """Factor of each column under a horizontal flip of the picture, such as -1 for a sideways motion. Default: unknown,
    so flips are refused."""

    flip_swap: tuple[tuple[str, str], ...] = ()
    """Columns that change places under a flip, such as the joints of a left and a right arm. The factors come after."""

    flip_offset: tuple[float, ...] = ()
    """Addition to each column of a state after its factor: 1 for a position x in [0, 1] that becomes 1 - x."""

    rotations: tuple[tuple[str, ...], ...] = ()
    """Columns of a state that together are a rotation: three Euler angles about the fixed axes x, y, z in rad, or the
    quaternion x, y, z, w."""

    source: tuple[str, ...] = ()
    """Datasets of an HDF5 episode, side by side, such as `observation/robot_state/cartesian_position`. Default: the
    dataset of the signal's name."""

    difference_of: str | None = None
    """Derive this action from the state of this name: its change between two frames, as in V-JEPA 2-AC. A rotation is
    compared by matrix product and gives three Euler angles. Nothing is stored for it."""

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
        self._check_mirror()
        self._check_rotations()
        return self

    def _check_mirror(self) -> None:
        if self.flip is None and (self.flip_swap or self.flip_offset):
            raise ValueError("flip_swap and flip_offset need flip; give the factor of each column, 1 for no change")
        if self.flip_offset and (self.kind == "action" or len(self.flip_offset) != len(self.columns)):
            raise ValueError(
                "flip_offset is for states, with a value per column; remove it, or give it to every column"
            )
        swapped = [name for pair in self.flip_swap for name in pair]
        if unknown := [name for name in swapped if swapped.count(name) > 1 or name not in self.columns]:
            raise ValueError(f"flip_swap has {unknown[0]!r}, which is not a column or occurs twice; name columns once")

    def _check_rotations(self) -> None:
        units = dict(zip(self.columns, self.units, strict=True))
        for group in self.rotations:
            if self.kind == "action" or len(group) not in (3, 4) or not set(group) <= set(self.columns):
                raise ValueError(f"rotation {', '.join(group)} is not three or four columns of a state")
            if len(group) == 3 and (wrong := {units[name] for name in group} - {"rad"}):
                raise ValueError(f"Euler angles {', '.join(group)} are in {wrong.pop()}; give them in rad")
        named = [name for group in self.rotations for name in group]
        if len(set(named)) < len(named):
            raise ValueError("a column belongs to two rotations; name it once")
        if self.difference_of is not None and (
            self.combine != "sum" or self.rate_hz or self.shift_s or self.shift_rows
        ):
            raise ValueError(
                "a derived signal is an action with combine sum and the clock of its state; remove rate_hz and shifts"
            )

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: Any) -> dict[str, Any]:
        """Omit unused settings of later versions, so that such corpora keep their bytes and hashes."""
        return without_unused(serialize(self), "flip_swap", "flip_offset", "rotations", "source", "difference_of")

    @property
    def rotation_columns(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the columns of each rotation."""
        return tuple(tuple(map(self.columns.index, group)) for group in self.rotations)

    def mirror(self, values: np.ndarray) -> np.ndarray:
        """Return values [..., columns] as a horizontal flip of the picture changes them."""
        assert self.flip is not None, "the sources are checked before"
        others = dict(self.flip_swap) | {b: a for a, b in self.flip_swap}
        if others:
            values = values[..., [self.columns.index(others.get(name, name)) for name in self.columns]]
        values = values * np.asarray(self.flip, dtype=np.float32)
        return values + np.asarray(self.flip_offset, dtype=np.float32) if self.flip_offset else values

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


def check_derived(signals: Mapping[str, SignalSpec]) -> None:
    """Check that derived signals name a state of the same sources and have its columns.

    Raises:
        ValueError: they do not.
    """
    for name, signal in signals.items():
        if signal.difference_of is None:
            continue
        state = signals.get(signal.difference_of)
        if state is None or state.kind != "state":
            raise ValueError(f"signal {name} is the difference of {signal.difference_of!r}, which is not a state here")
        expected = len(state.columns) - sum(len(group) == 4 for group in state.rotations)
        if len(signal.columns) != expected:
            raise ValueError(
                f"signal {name} has {len(signal.columns)} columns, the difference of {signal.difference_of} has "
                f"{expected}: one for each column, and three for a quaternion"
            )


def stored_name(name: str, signals: Mapping[str, SignalSpec]) -> str:
    """Return the name of the stored signal that a signal is read from: its own, or that of its state."""
    return signals[name].difference_of or name


def stored(signals: Mapping[str, SignalSpec]) -> dict[str, SignalSpec]:
    """Return the signals that have a member in each sample: all signals that are not derived."""
    return {name: signal for name, signal in signals.items() if signal.difference_of is None}


def _snap(position: float) -> float:
    return round(position) if abs(position - round(position)) < SNAP_ROWS else position


def member_of_signal(name: str) -> str:
    """Return the WebDataset suffix of a signal's member."""
    return f"{name}.npy"


def member_of_text(name: str) -> str:
    """Return the WebDataset suffix of a text's member."""
    return f"{name}.txt"


def signals_of(spec: Mapping[str, Any]) -> dict[str, SignalSpec]:
    """Read the signals that a manifest's spec describes. A foreign corpus has none."""
    return {name: SignalSpec.model_validate(values) for name, values in spec.get("signals", {}).items()}


def texts_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the names of the texts that a manifest's spec lists."""
    return tuple(spec.get("texts", ()))
