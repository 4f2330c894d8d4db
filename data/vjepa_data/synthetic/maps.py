"""Draw exact maps of generated scenes from their labels: which object, how far in front, moving where.

The labels of `vjepa synthesize physics` and `vjepa synthesize violations` describe the geometry of every frame, so that
maps can be drawn in any size. A pixel belongs to the thing that covers its centre.

Letters: F frames, P height and width in pixels. Lengths are in sides of the frame, x to the right, y down.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from vjepa_data.settings import BadInput
from vjepa_data.synthetic import violations
from vjepa_data.synthetic.physics import SHAPES, draw_shape

CLASSES = ("background", "wall", *SHAPES, "screen")
"""The classes of `Maps.objects`. The pillar of the demo's scenes is a screen, too."""

LAYERS = {"background": 0, "wall": 1, **dict.fromkeys(SHAPES, 2), "screen": 3}
"""Order in depth, from the back."""


@dataclass(frozen=True)
class Maps:
    """Maps of some frames of a video."""

    objects: UInt8[ndarray, "F P P"]
    """Number of the class in `CLASSES`."""
    depth: Float[ndarray, "F P P"]
    """Order in depth, from 0 at the back to 3."""
    flow: Float[ndarray, "F P P 2"]
    """Movement (x, y) of what is seen at a pixel since the frame before in the list. NaN in the first frame."""


@dataclass(frozen=True)
class _Pose:
    """The place of a shape in a frame."""

    x: float
    y: float
    angle: float = 0.0


@dataclass(frozen=True)
class _Thing:
    """A part of a frame: the pixels that it covers if nothing is in front, and its movement, if it is a shape."""

    kind: str
    cover: Bool[ndarray, "P P"]
    now: _Pose | None = None
    before: _Pose | None = None


def draw_maps(labels: Mapping[str, Any], numbers: Sequence[int], px: int) -> Maps:
    """Draw the maps of frames of a generated video.

    Args:
        labels: of the video.
        numbers: numbers of the frames in the video file.
        px: height and width of the maps.

    Raises:
        BadInput: the labels do not describe a scene.
    """
    things = _things_of(labels)
    shape = (len(numbers), px, px)
    maps = Maps(np.zeros(shape, np.uint8), np.zeros(shape, np.float32), np.zeros((*shape, 2), np.float32))
    maps.flow[0] = np.nan
    for place, number in enumerate(numbers):
        for thing in things(number, numbers[max(0, place - 1)], px):
            maps.objects[place][thing.cover] = CLASSES.index(thing.kind)
            maps.depth[place][thing.cover] = LAYERS[thing.kind]
            if place:
                maps.flow[place][thing.cover] = _flow(thing, px)
    return maps


def _flow(thing: _Thing, px: int) -> Float[ndarray, "n 2"]:
    """Return the movement of the covered pixels from the earlier pose to the present pose."""
    if thing.now is None or thing.before is None:
        return np.zeros((int(thing.cover.sum()), 2))
    row, column = np.nonzero(thing.cover)
    x, y = (column + 0.5) / px, (row + 0.5) / px
    turn = thing.before.angle - thing.now.angle
    right, down = x - thing.now.x, y - thing.now.y
    old_x = thing.before.x + math.cos(turn) * right - math.sin(turn) * down
    old_y = thing.before.y + math.sin(turn) * right + math.cos(turn) * down
    return np.stack((x - old_x, y - old_y), axis=1)


_Things = Callable[[int, int, int], Iterator[_Thing]]
"""Yield the things in a frame from back to front, given the numbers of the frame and of an earlier frame, and px."""


def _things_of(labels: Mapping[str, Any]) -> _Things:
    try:
        if "first" in labels and "second" in labels:
            return _violation_things(violations.read_scene(labels))
        has_angles = all("angle" in track for track in labels["tracks"])
        if not has_angles or (labels["pillar"] and "pillar_edges" not in labels):
            raise BadInput(
                "these labels lack the angles of objects or the edges of the pillar; write the videos again with "
                "`vjepa synthesize`, which draws the same scenes, and shard them"
            )
        return _physics_things(labels)
    except (KeyError, TypeError):
        found = ", ".join(sorted(labels)) or "none"
        raise BadInput(
            f"these labels do not describe a scene (they are {found}); give a corpus of `vjepa synthesize physics` or "
            "`vjepa synthesize violations`, or a table of images and maps"
        ) from None


def _grid(px: int) -> tuple[Float[ndarray, "1 P"], Float[ndarray, "P 1"]]:
    centres = (np.arange(px) + 0.5) / px
    return centres[None, :], centres[:, None]


def _shape(kind: str, radius: float, now: _Pose, before: _Pose | None, px: int) -> _Thing:
    x, y = _grid(px)
    cos, sin = math.cos(now.angle), math.sin(now.angle)
    right, down = x - now.x, y - now.y
    right, down = cos * right + sin * down, cos * down - sin * right
    return _Thing(kind, draw_shape(kind, right, down, radius, px) > 0.5, now, before)


def _physics_things(labels: Mapping[str, Any]) -> _Things:
    def things(frame: int, earlier: int, px: int) -> Iterator[_Thing]:
        for track in labels["tracks"]:
            now, before = (_Pose(track["x"][n], track["y"][n], track["angle"][n]) for n in (frame, earlier))
            yield _shape(track["shape"], track["size"], now, before, px)
        if labels["pillar"]:
            left, right = labels["pillar_edges"]
            x, y = _grid(px)
            yield _Thing("screen", (x > left) & (x < right) & (y > 0))

    return things


def _violation_things(scene: violations.Quadruplet) -> _Things:
    """Movement follows the half of the film that the frame is in: around the change nothing that moves is seen."""

    def things(frame: int, earlier: int, px: int) -> Iterator[_Thing]:
        film = scene.a if frame < scene.change else scene.b
        x, y = _grid(px)
        if film.wall:
            yield _Thing("wall", (abs(x - 0.5) < violations.RADIUS / 4) & (y > 0.2))
        now, before = (_pose(film.object.place(n), mirrored=scene.mirrored) for n in (frame, earlier))
        if now is not None:
            yield _shape(film.object.shape, violations.RADIUS, now, before, px)
        left, right = scene.screen
        yield _Thing("screen", (abs(x - 0.5) < (right - left) / 2) & (y > scene.screen_top(frame)))

    return things


def _pose(place: tuple[float, float] | None, *, mirrored: bool) -> _Pose | None:
    if place is None:
        return None
    x, y = place
    return _Pose(1 - x if mirrored else x, y)
