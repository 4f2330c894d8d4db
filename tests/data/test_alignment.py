"""The six rules by which actions belong to frames, as properties over rates, phases and combinations.

The reference is written here in fractions: row `i` acts in [i, i + 1) / rate, and an interval holds the parts of rows
between its two frames.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vjepa_data.poses import pose_differences
from vjepa_data.reader.clip_times import choose
from vjepa_data.reader.signals import combine_actions, sample_states, state_differences
from vjepa_data.signal_spec import SignalSpec
from vjepa_data.spec import Spec

NTSC = Fraction(30000, 1001)
# rate of the rows, rate of the stored video, rate of the clip
CLOCKS = [
    (Fraction(30), Fraction(30), 4),
    (NTSC, NTSC, 4),
    (Fraction(60), Fraction(30), 5),  # stored at half the rate
    (2 * NTSC, NTSC, 4),
    (Fraction(10), Fraction(10), 10),
    (Fraction(50), Fraction(25), 5),
    (Fraction(15), Fraction(30), 10),  # rows slower than frames
    (Fraction(100), Fraction(24), 8),  # another clock
]
FRAMES, ROWS = 240, 1100
clocks = st.sampled_from(CLOCKS)


def clip(file_fps: Fraction, fps: int, slot: int, *, frames: int = 6) -> list[Fraction]:
    """Return exact frame times of a clip, as the reader draws them."""
    ask = {"file_frames": FRAMES, "file_fps": float(file_fps), "frames": frames, "fps": float(fps)}
    return [n / file_fps for n in choose(**ask, seed=1, step=0, slot=slot).frames]


def overlaps(begin: Fraction, end: Fraction) -> dict[int, Fraction]:
    """Return the part of each row inside an interval, in rows."""
    numbers = range(int(begin), int(-(-end // 1)))
    return {i: part for i in numbers if (part := min(Fraction(i + 1), end) - max(Fraction(i), begin)) > 0}


def cut(rows: np.ndarray, times: list[Fraction], rate: Fraction, combine: str, **more) -> tuple[np.ndarray, np.ndarray]:
    clock = {"rate_hz": float(rate), "start_s": 0.0, "combine": combine, **more}
    return combine_actions(rows, np.array([float(t) for t in times]), **clock)


@settings(max_examples=60)
@given(clocks, st.integers(0, 999), st.sampled_from(["sum", "mean", "last"]))
def test_an_interval_holds_what_acts_between_its_frames(clock, slot: int, combine: str):
    rate, file_fps, fps = clock
    times = clip(file_fps, fps, slot)
    rows = np.random.default_rng(slot).normal(size=(ROWS, 2)).astype(np.float32)
    values, valid = cut(rows, times, rate, combine)
    assert valid.all()
    for k in range(len(times) - 1):
        parts = overlaps(times[k] * rate, times[k + 1] * rate)
        total = sum(float(part) * rows[i].astype(np.float64) for i, part in parts.items())
        expected = {"sum": total, "mean": total / float(sum(parts.values())), "last": rows[max(parts)]}[combine]
        assert np.allclose(values[k], expected, atol=2e-3)


@settings(max_examples=60)
@given(clocks, st.integers(0, 999))
def test_stacked_rows_are_all_rows_in_their_order(clock, slot: int):
    rate, file_fps, fps = clock
    times = clip(file_fps, fps, slot)
    edges = [t * rate for t in times]
    counts = {b - a for a, b in itertools.pairwise(edges)}
    if len(counts) > 1 or (count := counts.pop()).denominator > 1:
        return  # refused when the stream is opened
    rows = np.arange(ROWS, dtype=np.float32)[:, None]
    values, _ = cut(rows, times, rate, "stack", stack=int(count))
    first = int(edges[0] + Fraction(1, 2))
    assert values.reshape(-1).tolist() == list(range(first, first + values.size))


@settings(max_examples=40)
@given(clocks, st.integers(0, 999), st.sampled_from([-2, -1, 1, 2]))
def test_a_shift_is_the_same_as_moved_rows(clock, slot: int, shift: int):
    """`shift_rows: -1` makes row t act where row t - 1 would."""
    rate, file_fps, fps = clock
    times = [t + 1 for t in clip(file_fps, fps, slot)]  # away from the edge
    rows = np.random.default_rng(slot).normal(size=(ROWS, 1)).astype(np.float32)
    spec = SignalSpec(columns=("a",), units=("1",), kind="action", combine="sum", shift_rows=shift)
    moved, _ = cut(rows, times, rate, "sum", start_s=spec.first_row_s(float(rate)))
    expected, _ = cut(np.roll(rows, shift, axis=0), times, rate, "sum")
    assert np.allclose(moved, expected, atol=2e-3)


@settings(max_examples=60)
@given(clocks, st.integers(0, 999), st.sampled_from(["sum", "mean", "last"]), st.integers(1, 3))
def test_no_action_of_another_episode_enters_a_clip(clock, slot: int, combine: str, episode: int):
    """Consecutive episodes of two seconds share a file. Rows of all other episodes are not finite."""
    rate, file_fps, fps = clock
    begin, end = Fraction(2 * episode), Fraction(2 * episode + 2)
    rows = np.full((ROWS, 1), np.nan, dtype=np.float32)
    spec = SignalSpec.model_validate({"columns": ["a"], "units": ["1"], "kind": "action", "combine": combine})
    span = spec.span(float(begin), float(end), rate_hz=float(rate), rows=ROWS)
    rows[max(0, int(begin * rate)) : int(-(-(end * rate) // 1))] = 1
    own = rows[span.start : span.stop]
    assert np.isfinite(own).all()
    start_s = span.start / float(rate) - float(begin)
    ask = {"file_frames": int(2 * file_fps), "file_fps": float(file_fps), "frames": 4, "fps": float(fps)}
    found = choose(**ask, seed=0, step=0, slot=slot).times_s[0]
    values, valid = combine_actions(own, found, rate_hz=float(rate), start_s=start_s, combine=combine)
    assert np.isfinite(values).all()
    assert valid.all()


def test_the_last_frame_of_an_episode_is_reached():
    ask = {"file_frames": 20, "file_fps": 10.0, "frames": 4, "fps": 5.0, "seed": 0, "step": 0}
    drawn = [choose(**ask, slot=slot).frames for slot in range(200)]
    assert {frames[-1] for frames in drawn} == set(range(6, 20))
    rows = np.arange(19, dtype=np.float32)[:, None]  # no action follows the last frame
    last = next(frames for frames in drawn if frames[-1] == 19)
    values, valid = combine_actions(rows, np.array(last) / 10, rate_hz=10, start_s=0, combine="last")
    assert values[:, 0].tolist() == [14, 16, 18]
    assert valid.all()


# Mirrors


ARMS = SignalSpec(
    columns=("left_turn", "right_turn", "x"),
    units=("rad", "rad", "side"),
    kind="state",
    flip=(-1, -1, -1),
    flip_swap=(("left_turn", "right_turn"),),
    flip_offset=(0, 0, 1),
)


def test_a_flip_swaps_arms_and_mirrors_positions():
    values = np.array([[[0.25, 0.5, 0.125]]], dtype=np.float32)
    assert ARMS.mirror(values).tolist() == [[[-0.5, -0.25, 0.875]]]
    assert np.array_equal(ARMS.mirror(ARMS.mirror(values)), values)


# Derived actions


def euler(x: float, y: float, z: float) -> np.ndarray:
    """Rz Ry Rx, by single turns."""
    turns = []
    for axis, angle in enumerate((x, y, z)):
        a, b = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        s = np.sin(angle) * (-1 if axis == 1 else 1)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -s, s
        turns.append(turn)
    return turns[2] @ turns[1] @ turns[0]


ANGLE = st.floats(-3, 3)


@settings(max_examples=60)
@given(st.lists(st.tuples(ANGLE, ANGLE, ANGLE), min_size=2, max_size=5))
def test_rotations_are_compared_by_matrix_product(poses: list[tuple[float, float, float]]):
    rows = np.array(poses)
    found = pose_differences(rows, [(0, 1, 2)])
    for k in range(len(rows) - 1):
        assert np.allclose(euler(*found[k]) @ euler(*rows[k]), euler(*rows[k + 1]), atol=1e-6)


def test_a_turn_across_pi_is_small_and_a_quaternion_agrees():
    rows = np.array([[0.5, 0, 0, 3.1, 1], [0.75, 0, 0, -3.1, 0]])
    expected = [[0.25, 0, 0, 2 * np.pi - 6.2, -1]]
    assert np.allclose(pose_differences(rows, [(1, 2, 3)]), expected)
    half = rows[:, 3:4] / 2
    quaternion = np.hstack((rows[:, :1], np.zeros((2, 2)), np.sin(half), np.cos(half), rows[:, 4:]))
    assert np.allclose(pose_differences(quaternion * 1.0, [(1, 2, 3, 4)]), expected)
    locked = pose_differences(np.array([[0.0, 0, 0], [0.3, np.pi / 2, 0]]), [(0, 1, 2)])[0]
    assert np.allclose(euler(*locked), euler(0.3, np.pi / 2, 0), atol=1e-6)


@settings(max_examples=30)
@given(clocks, st.integers(0, 999))
def test_a_derived_action_is_the_change_between_two_frames(clock, slot: int):
    rate, file_fps, fps = clock
    times = np.array([float(t) for t in clip(file_fps, fps, slot)])
    rows = np.random.default_rng(slot).normal(size=(ROWS, 2)).astype(np.float32)
    clock_of = {"rate_hz": float(rate), "start_s": 0.0}
    states, _ = sample_states(rows, times, **clock_of)
    values, valid = state_differences(rows, times, **clock_of, rotations=())
    assert np.array_equal(values, np.diff(states.astype(np.float64), axis=0).astype(np.float32))
    assert valid.all()
    held, valid = state_differences(rows, times[[0, 1, 1]], **clock_of, rotations=())
    assert valid.tolist() == [True, False]
    assert not held[1].any()


STATE = {"columns": ["x", "a", "b", "c"], "units": ["m", "rad", "rad", "rad"], "kind": "state"}
ACTION = {**STATE, "kind": "action", "combine": "sum"}


@pytest.mark.parametrize(
    ("signals", "error"),
    [
        ({"s": {**STATE, "flip_swap": [["x", "a"]]}}, "need flip"),
        ({"s": {**STATE, "flip": [1] * 4, "flip_swap": [["x", "q"]]}}, "'q', which is not a column"),
        ({"s": {**ACTION, "flip": [1] * 4, "flip_offset": [1] * 4}}, "flip_offset is for states"),
        ({"s": {**STATE, "rotations": [["x", "a"]]}}, "is not three or four columns"),
        ({"s": {**STATE, "rotations": [["x", "a", "b"]]}}, "are in m; give them in rad"),
        ({"s": {**STATE, "rotations": [["a", "b", "c"], ["x", "a", "b", "c"]]}}, "belongs to two rotations"),
        ({"d": {**ACTION, "difference_of": "s"}}, "'s', which is not a state here"),
        ({"s": STATE, "d": {**ACTION, "difference_of": "s", "shift_rows": 1}}, "the clock of its state"),
        (
            {"s": {**STATE, "rotations": [["x", "a", "b", "c"]]}, "d": {**ACTION, "difference_of": "s"}},
            "has 4 columns, the difference of s has 3",
        ),
    ],
)
def test_inconsistent_mirrors_and_derivations_are_refused(signals: dict, error: str):
    with pytest.raises(ValidationError, match=error):
        Spec.model_validate({"signals": signals})
