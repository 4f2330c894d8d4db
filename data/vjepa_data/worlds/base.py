"""The contract of a world: batched functions of states, actions and layouts, without any state of their own.

    layout, start = world.layouts(...), world.starts(...)      from uniform numbers that the caller draws
    state = world.step(state, action, layout)                  so that a world can be set to any state
    frames = world.render(state, layout, px)

Lengths are in sides of the frame, x to the right, y down. An action acts from its frame to the next.

Letters: E episodes, F frames of an episode, S columns of a state, A columns of an action, L columns of a layout,
P height and width in pixels, U uniform numbers.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8
from numpy import ndarray

LayoutKind = Literal["fixed", "random", "held_out"]
"""`fixed` is the same layout for all episodes. `random` and `held_out` are drawn from ranges that do not overlap."""

BANDS = 8
HELD_OUT_BANDS = (2, 5)
"""Parts of the range of a layout's number, of `BANDS` equal parts, that `random` layouts never have."""

States: TypeAlias = Float64[ndarray, "E S"]
Actions: TypeAlias = Float64[ndarray, "E A"]
Layouts: TypeAlias = Float64[ndarray, "E L"]


class World(ABC):
    """A world whose episodes are simulated together. Row `i` of every argument and result belongs to episode `i`."""

    name: ClassVar[str]
    state_columns: ClassVar[tuple[str, ...]]
    action_columns: ClassVar[tuple[str, ...]]
    layout_columns: ClassVar[tuple[str, ...]]

    max_action: ClassVar[float]
    """Largest absolute value of every column of an action. Larger values are clipped."""

    goal_distance: ClassVar[float]
    """A goal within this distance is reached."""

    @abstractmethod
    def layouts(self, kind: LayoutKind, u: Float[ndarray, "E U"]) -> Layouts:
        """Return the layout of each episode from `LAYOUT_NUMBERS` uniform numbers."""

    @abstractmethod
    def starts(self, layouts: Layouts, u: Float[ndarray, "E U"]) -> States:
        """Return valid states from `STATE_NUMBERS` uniform numbers. Goals are drawn in the same way."""

    @abstractmethod
    def step(self, states: States, actions: Actions, layouts: Layouts) -> States:
        """Return the states of the next frame."""

    @abstractmethod
    def distance(self, states: States, goals: States) -> Float64[ndarray, " E"]:
        """Return how far each state is from its goal, in sides."""

    @abstractmethod
    def expert(self, states: States, goals: States, layouts: Layouts) -> Actions:
        """Return an action that leads towards the goal, around obstacles."""

    @abstractmethod
    def straight(self, states: States, goals: States) -> Actions:
        """Return an action in the direction of the goal, whatever lies between."""

    @abstractmethod
    def render(self, states: States, layouts: Layouts, px: int) -> UInt8[ndarray, "E P P 3"]:
        """Draw each state with smooth edges."""


LAYOUT_NUMBERS = 2
STATE_NUMBERS = 4


def in_bands(u: Float[ndarray, " E"], *, kind: LayoutKind) -> Float64[ndarray, " E"]:
    """Map uniform numbers to the bands of [0, 1) that belong to a kind of layout."""
    bands = np.array([b for b in range(BANDS) if (b in HELD_OUT_BANDS) == (kind == "held_out")])
    place = u * len(bands)
    number = np.minimum(place.astype(np.int64), len(bands) - 1)
    return (bands[number] + (place - number)) / BANDS


def limit_length(vectors: Float[ndarray, "E 2"], longest: float) -> Float64[ndarray, "E 2"]:
    """Shorten vectors to a largest length."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors * np.minimum(1, longest / np.maximum(length, 1e-12))


def unit(vectors: Float[ndarray, "E 2"]) -> Float64[ndarray, "E 2"]:
    """Return vectors of length 1, and (1, 0) for a vector of length 0."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-12, vectors / np.maximum(length, 1e-12), (1.0, 0.0))


def stamp_disc(
    frames: UInt8[ndarray, "E P P 3"],
    centres: Float[ndarray, "E 2"],
    radii: Float[ndarray, " E"],
    colour: tuple[int, int, int],
) -> None:
    """Draw a disc with a smooth edge into each frame, in place. Only a window around the disc is touched."""
    count, px = frames.shape[:2]
    size = min(px, int(np.ceil(2 * float(radii.max(initial=0)) * px)) + 3)
    corner = np.clip(np.floor(centres * px).astype(np.int64) - size // 2, 0, px - size)
    columns, rows = (corner[:, i, None] + np.arange(size) for i in (0, 1))
    apart_x, apart_y = (
        (line + 0.5).astype(np.float32) - (centres[:, i, None] * px).astype(np.float32)
        for i, line in enumerate((columns, rows))
    )
    outside = np.hypot(apart_x[:, None, :], apart_y[:, :, None]) - (radii * px).astype(np.float32)[:, None, None]
    cover = np.clip(0.5 - outside, 0, 1)[..., None]
    place = np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    before = frames[place]
    frames[place] = np.rint(before + cover * (np.array(colour, dtype=np.float32) - before)).astype(np.uint8)


def is_between(
    x: Float[ndarray, "..."], low: Float[ndarray, "..."], high: Float[ndarray, "..."]
) -> Bool[ndarray, "..."]:
    """Return where numbers lie strictly inside a range."""
    return (x > low) & (x < high)
