"""Cutting signals with the frame times of a clip: times in, numbers out.

    source clock    0     1     2     3     4     5     6     7     8   rows of 10 Hz
    rows           a0    a1    a2    a3    a4    a5    a6    a7         row i acts in [i, i + 1) / 10 s
    frame times     |           |                 |                 |   frames of the clip
    state          s0          s2                s5                s8   the row nearest to each frame       [T, A]
    action          `a0+a1-----` `-a2+a3+a4------` `-a5+a6+a7------`    all rows between two frames         [T-1, A]

Times are seconds of the stored video, never frame numbers, so a video stored at another rate than its source keeps its
alignment. Sums and means weight a row by the part of it that lies between the two frames, so sums over consecutive
intervals add up to the whole.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float32, Float64

from vjepa_data.corpus.index import Index
from vjepa_data.corpus.signal_statistics import SignalStatistics, pool
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.poses import pose_differences
from vjepa_data.reader.clip_times import RATE_TOLERANCE, EligibleSamples, offsets, pace_of
from vjepa_data.reader.plan import Plan
from vjepa_data.settings import Data
from vjepa_data.signal_spec import SNAP_ROWS, SignalSpec, member_of_signal, member_of_text, stored_name

SLACK_ROWS = 0.5  # rows that may be missing at the edge of a video, as the builder allows

Rows = Float32[np.ndarray, "N A"]


@dataclass(frozen=True)
class CutSignal:
    """The part of a signal that belongs to the clips of a slot."""

    values: Float32[np.ndarray, "K n *A"]
    valid: Bool[np.ndarray, "K n"]


def row_positions(times_s: np.ndarray, *, rate_hz: float, start_s: float) -> Float64[np.ndarray, " T"]:
    """Return where times lie on the axis of rows. A time within 1/1000 of a row counts as that row."""
    positions = (np.asarray(times_s, dtype=np.float64) - start_s) * rate_hz
    nearest = np.round(positions)
    return np.where(np.abs(positions - nearest) < SNAP_ROWS, nearest, positions)


def sample_states(
    rows: Rows, times_s: np.ndarray, *, rate_hz: float, start_s: float
) -> tuple[Float32[np.ndarray, "T A"], Bool[np.ndarray, " T"]]:
    """Return the state at each frame: the row nearest in time, or the later of two equally near rows.

    Args:
        rows: the stored rows of the sample.
        times_s: time of each frame in the stored video, not decreasing.
        rate_hz: rows per second.
        start_s: time of row 0 in the stored video.

    Returns:
        Values, and which of them are real. False marks a held frame and a time that the rows do not cover.
    """
    positions = row_positions(times_s, rate_hz=rate_hz, start_s=start_s)
    nearest = np.clip(np.floor(positions + 0.5).astype(np.int64), 0, len(rows) - 1)
    is_covered = (positions >= -SLACK_ROWS) & (positions <= len(rows))
    is_held = np.diff(times_s, prepend=-np.inf) == 0
    return rows[nearest], is_covered & ~is_held


def combine_actions(
    rows: Rows, times_s: np.ndarray, *, rate_hz: float, start_s: float, combine: str, stack: int = 1
) -> tuple[Float32[np.ndarray, "intervals *A"], Bool[np.ndarray, " intervals"]]:
    """Combine all actions that act between each frame and the next.

    Args:
        rows: the stored rows of the sample. Row `i` acts in [start_s + i / rate_hz, start_s + (i + 1) / rate_hz).
        times_s: time of each frame in the stored video, not decreasing.
        rate_hz: rows per second.
        start_s: time of row 0 in the stored video.
        combine: "sum", "mean", "last" or "stack".
        stack: rows per interval, for "stack".

    Returns:
        Values [T-1, A], or [T-1, stack, A] for "stack", and which intervals are real. An interval is not real if its
        two frames are the same (a held frame), or if more than half a row of it is missing. Missing rows count as zero.
    """
    positions = row_positions(times_s, rate_hz=rate_hz, start_s=start_s)
    inside = np.clip(positions, 0, len(rows))
    length, covered = np.diff(positions), np.diff(inside)
    valid = (covered > 0) & (length - covered <= SLACK_ROWS)
    size = (stack, rows.shape[1]) if combine == "stack" else (rows.shape[1],)
    values = np.zeros((len(length), *size), dtype=np.float32)
    for k in np.flatnonzero(covered > 0):
        begin, end = float(inside[k]), float(inside[k + 1])
        if combine == "last":
            values[k] = rows[math.ceil(end) - 1]
        elif combine == "stack":
            first = math.floor(positions[k] + 0.5)
            here = rows[max(0, first) : max(0, first + stack)]
            values[k, max(0, -first) :][: len(here)] = here
        else:
            numbers = np.arange(math.floor(begin), math.ceil(end))
            weights = np.minimum(numbers + 1, end) - np.maximum(numbers, begin)
            total = (weights[:, None] * rows[numbers[0] : numbers[-1] + 1]).sum(axis=0, dtype=np.float64)
            values[k] = total / (end - begin) if combine == "mean" else total
    return values, valid


def state_differences(
    rows: Rows, times_s: np.ndarray, *, rate_hz: float, start_s: float, rotations: Sequence[Sequence[int]]
) -> tuple[Float32[np.ndarray, "intervals D"], Bool[np.ndarray, " intervals"]]:
    """Return how a state changes from each frame to the next, rotations by matrix product.

    Args:
        rows, times_s, rate_hz, start_s: as of `sample_states`.
        rotations: see `vjepa_data.poses`.
    """
    states, valid = sample_states(rows, times_s, rate_hz=rate_hz, start_s=start_s)
    return pose_differences(states, rotations).astype(np.float32), valid[1:] & valid[:-1]


def stack_size(*, fps: float, file_fps: float, rate_hz: float) -> int:
    """Return the rows between the first two frames of a clip."""
    step = offsets(frames=2, fps=fps, file_fps=file_fps)[1]
    return max(1, math.floor(step * rate_hz / file_fps + 0.5))


def check_signals(
    names: Sequence[str], texts: Sequence[str], sources: Sequence[EligibleSamples], *, flip: float
) -> None:
    """Make sure that every source has the signals and texts, in a form that a batch can hold.

    Args:
        names, texts: the signals and texts asked for.
        sources: the samples of each source.
        flip: probability of a horizontal flip.

    Raises:
        BadInput: a signal is missing, differs between sources, cannot be flipped, or cannot be stacked.
    """
    for source in sources:
        index = source.index
        for kind, wanted, found in (("signals", names, index.signals), ("texts", texts, index.texts)):
            for name in wanted:
                if name not in found:
                    raise BadInput(
                        f"{index.place} has no {kind[:-1]} {name!r}, only {', '.join(found) or 'none'}. "
                        f"Remove it from data.{kind}, or build the corpus with it."
                    )
        for name in names:
            spec, first = index.signals[name], sources[0].index.signals[name]
            if (spec.columns, spec.units, spec.kind, spec.combine) != (
                first.columns,
                first.units,
                first.kind,
                first.combine,
            ):
                raise BadInput(
                    f"signal {name!r} of {index.place} has other columns, units, kind or combine than that of "
                    f"{sources[0].index.place}. Build both with the same description."
                )
            if flip > 0 and spec.flip is None:
                raise BadInput(
                    f"data.crop.flip is {flip:g}, but signal {name!r} of {index.place} does not say how a flip changes "
                    f"it. Set data.crop.flip=0, or build the corpus with signals.{name}.flip."
                )
    for name in names:
        if sources[0].index.signals[name].combine == "stack":
            _check_stack(name, sources)


def _check_stack(name: str, sources: Sequence[EligibleSamples]) -> None:
    """Make sure that `stack` finds the same number of rows between any two frames of clips of equal length."""
    sizes: dict[int, int] = {}
    for source in sources:
        index = source.index
        rates = np.stack([index.fps, index.signal_rates[name]], axis=1)
        for file_fps, rate_hz in np.unique(rates, axis=0).tolist():
            fps = float(source.pace.rate(np.array([file_fps]))[0])
            if file_fps * RATE_TOLERANCE < fps:
                continue  # too slow to be drawn
            shape = {"frames": source.frames, "sequence": source.sequence, "gap_s": source.gap_s}
            ahead = offsets(**shape, fps=fps, file_fps=file_fps).reshape(source.sequence, -1)
            counts = np.unique(np.round(np.diff(ahead, axis=1) * rate_hz / file_fps, 3)).tolist()
            if not counts:
                continue
            if len(counts) > 1 or abs(counts[0] - round(counts[0])) > SNAP_ROWS or counts[0] < 1:
                raise BadInput(
                    f"signal {name!r} of {index.place} is stacked, but {fps:g} fps of a {file_fps:g} fps video leave "
                    f"{' or '.join(f'{c:g}' for c in counts)} rows between two frames. Set data.sources[].frame_step="
                    f"{max(1, round(file_fps / fps))}, or build the corpus with combine sum, mean or last."
                )
            if sizes.setdefault(source.frames, round(counts[0])) != round(counts[0]):
                raise BadInput(
                    f"signal {name!r} is stacked, but {index.place} has {counts[0]:g} rows between two frames and "
                    f"other sources have {sizes[source.frames]}. Set the same data.sources[].frame_step for all."
                )


def described_signals(names: Iterable[str], plan: Plan) -> dict[str, SignalSpec]:
    """Return the descriptions of signals, which are the same in all sources of a plan."""
    index = cast(EligibleSamples, plan.sources[0]).index
    return {name: index.signals[name] for name in names}


def interval_statistics(data: Data, name: str) -> SignalStatistics:
    """Return the statistics of a signal over all sources of a run, on the scale of its clips.

    Args:
        data: settings of the stream.
        name: name of the signal.

    Raises:
        BadInput: a corpus lacks the signal or its statistics.
    """
    parts = []
    for source in data.sources:
        index = Index(source.shards, source.split, corpus=source.corpus, part_s=source.part_s)
        if name not in index.signals:
            raise BadInput(f"{index.place} has no signal {name!r}; set data.signals to its signals")
        if name not in index.statistics:
            raise BadInput(
                f"{index.place} has no statistics of signal {name!r}: it has no train split, or an earlier version "
                "built it. Build it again, or set objective.normalise=none."
            )
        rows = float(np.median(index.signal_rates[name] / pace_of(source, data.clip).rate(index.fps)))
        combine = index.signals[name].combine
        parts.append(index.statistics[name].of_intervals(combine=combine, rows_per_interval=rows))
    return pool(parts)


def cut_signals(
    names: Sequence[str],
    members: Mapping[str, Any],
    index: Index,
    sample: int,
    *,
    times_s: np.ndarray,
    fps: float,
    flip: bool,
) -> dict[str, CutSignal]:
    """Cut the signals of a sample with the frame times of its clips.

    Args:
        names: the signals asked for.
        members: the sample's members, by suffix.
        index: the corpus.
        sample: its number in the index.
        times_s: frame times of the clips in the stored video, [K T].
        fps: frames per second of video time asked for.
        flip: whether the picture is flipped.

    Raises:
        Unreadable: a member is not the array that the manifest describes.
    """
    cut = {}
    for name in names:
        spec, source = index.signals[name], stored_name(name, index.signals)
        columns = len(index.signals[source].columns)
        rows = read_rows(members[member_of_signal(source)], columns=columns, name=source)
        clock = {
            "rate_hz": float(index.signal_rates[name][sample]),
            "start_s": float(index.signal_starts[name][sample]),
        }
        if spec.combine is None:
            parts = [sample_states(rows, times, **clock) for times in times_s]
        elif spec.difference_of is not None:
            rotations = index.signals[source].rotation_columns
            parts = [state_differences(rows, times, **clock, rotations=rotations) for times in times_s]
        else:
            stack = stack_size(fps=fps, file_fps=float(index.fps[sample]), rate_hz=clock["rate_hz"])
            parts = [combine_actions(rows, times, **clock, combine=spec.combine, stack=stack) for times in times_s]
        values = np.stack([values for values, _ in parts])
        cut[name] = CutSignal(spec.mirror(values) if flip else values, np.stack([valid for _, valid in parts]))
    return cut


def read_rows(data: bytes, *, columns: int, name: str) -> Rows:
    """Read the member of a signal.

    Raises:
        Unreadable: it is not a float32 array of this many columns with at least one row.
    """
    try:
        rows = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Unreadable("signal", f"signal {name!r}: {error}") from error
    if not isinstance(rows, np.ndarray) or rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != columns:
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "an archive"
        raise Unreadable("signal", f"signal {name!r} is {found}, not float32 [rows, {columns}]")
    if not len(rows):
        raise Unreadable("signal", f"signal {name!r} has no rows")
    return rows


def read_texts(names: Sequence[str], members: Mapping[str, Any]) -> dict[str, str]:
    """Read the texts of a sample.

    Raises:
        Unreadable: a text is not UTF-8.
    """
    try:
        return {name: members[member_of_text(name)].decode() for name in names}
    except UnicodeDecodeError as error:
        raise Unreadable("text", f"a text is not UTF-8: {error.reason} at byte {error.start}") from error
