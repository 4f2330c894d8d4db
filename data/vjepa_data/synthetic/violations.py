"""Generate films in which something impossible happens while it is hidden, for `vjepa eval surprise`.

Films come in quadruplets. Two possible films A and B show the same picture around a moment at which all that differs
between them is hidden. Two more films change over at that moment: A's first half with B's second half, and B's first
half with A's second half. Both are impossible. Each half occurs once in a possible film and once in an impossible film,
and the pictures before and after the change are identical in all four films, so neither a frame, nor half a film, nor
the difference between two frames tells which films are impossible. Each frame is encoded alone, so that decoded films
have these properties too.

Seven laws are broken:

    permanence  an object that went behind the screen does not come out, or a new object comes out
    continuity  it comes out in another lane
    colour      it comes out with another colour
    shape       it comes out with another shape
    solidity    it passes a wall behind the screen, or is thrown back without a wall
    gravity     it falls before the screen and flies straight on after it, or the reverse
    inertia     it turns behind the screen without contact

Quadruplet n is a function of (seed, n). Its law is n modulo 7, and the time for which the object is hidden goes through
`HIDDEN_FRAMES`.

Source: the quadruplets of IntPhys (arXiv:1803.07616).

Letters: F frames, P height and width in pixels. Lengths are in sides of the frame, x to the right, y down.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from vjepa_data.rng import generator
from vjepa_data.settings import BadInput
from vjepa_data.synthetic.physics import COLOURS, PILLAR_SHADE, SHAPES, WALL, draw_shape, write_video

LAWS = ("permanence", "continuity", "colour", "shape", "solidity", "gravity", "inertia")

HIDDEN_FRAMES = (4, 8, 16, 24)
"""Number of frames for which an object is hidden."""

FRAMES, FPS, PX = 48, 12, 64
RADIUS = 0.11
SPEED = 0.03  # sides per frame
RISE = 6  # frames in which a screen rises

Way = Literal["straight", "back", "absent"]


@dataclass(frozen=True)
class Object:
    """A flat shape that crosses the picture and is behind the screen in the middle of the film."""

    shape: str
    colour: str
    way: Way
    """Whether it comes out on the other side, comes back, or does not exist."""
    speed: float
    """Horizontal speed, in sides per frame. The object is at the centre of the screen in the middle of the film."""
    y: float
    """Height at the centre of the screen."""
    slope: float = 0.0
    """Vertical speed over horizontal speed, there."""
    fall: float = 0.0
    """Vertical acceleration, in sides per frame squared."""

    def place(self, frame: int) -> tuple[float, float] | None:
        """Return the centre of the object in a frame, or None if it does not exist."""
        if self.way == "absent":
            return None
        t = frame - (FRAMES - 1) / 2
        along = self.speed * t if self.way == "straight" else -self.speed * abs(t)
        return 0.5 + along, self.y + self.slope * self.speed * t + self.fall * t**2 / 2


@dataclass(frozen=True)
class Film:
    """The events in a possible film."""

    object: Object
    wall: bool
    """Whether a wall stands behind the screen, seen before the screen rises."""


@dataclass(frozen=True)
class Quadruplet:
    """Two possible films that are equal while their difference is hidden."""

    law: str
    hidden_frames: int
    screen: tuple[float, float]
    """Left and right edge of the screen."""
    shade: float
    rises: bool
    """Whether the screen rises in the first frames, so that the hidden part is seen first."""
    mirrored: bool
    """Whether the films are flipped, left to right."""
    a: Film
    b: Film

    @property
    def change(self) -> int:
        """Number of the first frame of the second half."""
        return FRAMES // 2

    def screen_top(self, frame: int) -> float:
        """Return the upper edge of the screen in a frame."""
        return max(0.0, 1 - (frame + 1) / RISE) if self.rises else 0.0


def draw_quadruplet(seed: int, number: int) -> Quadruplet:
    """Draw a quadruplet."""
    draw = generator(seed, "violation", number)
    law = LAWS[number % len(LAWS)]
    hidden = HIDDEN_FRAMES[number // len(LAWS) % len(HIDDEN_FRAMES)]
    width = min(0.6, 2 * RADIUS + SPEED * (hidden + 1))
    speed = (width - 2 * RADIUS) / (hidden + 1)
    first, other = draw.choice(len(COLOURS), 2, replace=False)
    shape, other_shape = draw.choice(len(SHAPES), 2, replace=False)
    colours = list(COLOURS)
    y, tilt, side = draw.uniform(0.42, 0.58), draw.uniform(0.25, 0.4), int(draw.integers(2)) * 2 - 1
    plain = Object(SHAPES[shape], colours[first], "straight", speed, y)
    a = b = Film(plain, wall=False)
    match law:
        case "permanence":
            b = Film(replace(plain, way="absent"), wall=False)
        case "continuity":
            lane = draw.uniform(0.18, 0.28)
            a, b = (Film(replace(plain, y=0.5 + sign * lane), wall=False) for sign in (-1, 1))
        case "colour":
            b = Film(replace(plain, colour=colours[other]), wall=False)
        case "shape":
            b = Film(replace(plain, shape=SHAPES[other_shape]), wall=False)
        case "solidity":
            b = Film(replace(plain, way="back"), wall=True)
        case "gravity":
            # It reaches 0.3 of a side above or below its highest or lowest point at the edge of the picture.
            fall = side * 2 * 0.3 / (0.5 / speed) ** 2
            a = Film(replace(plain, y=0.5 - side * 0.1, fall=fall), wall=False)
            b = Film(replace(plain, y=0.5 - side * 0.1, slope=0.0), wall=False)
        case "inertia":
            a, b = (Film(replace(plain, y=0.5, slope=sign * tilt), wall=False) for sign in (-1, 1))
    if draw.integers(2):
        a, b = b, a
    return Quadruplet(
        law=law,
        hidden_frames=hidden,
        screen=(0.5 - width / 2, 0.5 + width / 2),
        shade=float(draw.uniform(*PILLAR_SHADE)),
        rises=law == "solidity",
        mirrored=bool(draw.integers(2)),
        a=a,
        b=b,
    )


def draw_film(scene: Quadruplet, film: Film, px: int = PX) -> UInt8[ndarray, "F P P 3"]:
    """Draw a possible film: the object, and before it the screen."""
    grid = ((np.arange(px) + 0.5) / px).astype(np.float32)
    x, y = grid[None, :], grid[:, None]
    picture = np.full((FRAMES, px, px, 3), WALL, np.float32)
    bricks = scene.shade + 0.06 * np.sign(np.sin(grid * 50)).astype(np.float32)[:, None, None]
    for frame, canvas in enumerate(picture):
        if film.wall:
            _paint(canvas, np.clip(0.5 - (abs(x - 0.5) - RADIUS / 4) * px, 0, 1) * (y > 0.2), np.float32(0.15))
        place = film.object.place(frame)
        if place is not None:
            _paint(canvas, draw_shape(film.object.shape, x - place[0], y - place[1], RADIUS, px), _colour(film.object))
        left, right = scene.screen
        cover = np.clip(0.5 - (abs(x - 0.5) - (right - left) / 2) * px, 0, 1)
        cover = cover * np.clip(0.5 + (y - scene.screen_top(frame)) * px, 0, 1)
        _paint(canvas, cover, bricks)
    if scene.mirrored:
        picture = picture[:, :, ::-1]
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _paint(canvas: Float[ndarray, "P P 3"], cover: Float[ndarray, "P P"], colour: Any) -> None:
    canvas += cover[..., None].astype(np.float32) * (colour - canvas)


def _colour(thing: Object) -> Float[ndarray, " 3"]:
    return np.array(COLOURS[thing.colour], np.float32)


def draw_films(scene: Quadruplet, px: int = PX) -> dict[str, UInt8[ndarray, "F P P 3"]]:
    """Draw the four films of a quadruplet by name: `aa` and `bb` are possible, `ab` and `ba` are not."""
    a, b = draw_film(scene, scene.a, px), draw_film(scene, scene.b, px)
    change = scene.change
    same = slice(change - 1, change + 1)
    if not np.array_equal(a[same], b[same]):
        raise AssertionError(f"the difference is seen at the change: {scene}")
    ab, ba = np.concatenate((a[:change], b[change:])), np.concatenate((b[:change], a[change:]))
    return {"aa": a, "bb": b, "ab": ab, "ba": ba}


def write_violations(
    out: Path,
    *,
    quadruplets: int,
    seed: int,
    px: int = PX,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write the films of quadruplets as mp4 files, and `violations.json`, which names the four films of each.

    Possible films are in the folder `possible`, impossible films in `impossible`. Each film has a json with its labels.

    Args:
        out: folder, created if it does not exist.
        quadruplets: number of quadruplets, each of 4 films.
        seed: seed of the films. Quadruplet n of a seed is the same in a folder of any length.
        px: height and width, even.
        advance: called with the number of quadruplets that are written and of all.

    Returns:
        Paths of the films.

    Raises:
        BadInput: the number of quadruplets is below 1, or the size is odd or too small.
    """
    if quadruplets < 1:
        raise BadInput(f"videos ({quadruplets}) must be at least 1; try {8 * len(LAWS)}")
    if px % 2 or px < 32:
        raise BadInput(f"px ({px}) must be even and at least 32; try {PX}")
    paths, entries = [], []
    for folder in ("possible", "impossible"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number in range(quadruplets):
        scene = draw_quadruplet(seed, number)
        films = {}
        for name, frames in draw_films(scene, px).items():
            possible = name[0] == name[1]
            path = out / ("possible" if possible else "impossible") / f"film_{number:06d}_{name}.mp4"
            write_video(path, frames, fps=FPS, intra=True)
            path.with_suffix(".json").write_text(json.dumps(describe(scene, name)) + "\n")
            films[name] = path.relative_to(out).as_posix()
            paths.append(path)
        entries.append(describe_quadruplet(scene, number, films))
        advance(number + 1, quadruplets)
    content = {"format": 1, "seed": seed, "px": px, "fps": FPS, "change": FRAMES // 2, "quadruplets": entries}
    (out / "violations.json").write_text(json.dumps(content, indent=1) + "\n")
    return paths


def describe_quadruplet(scene: Quadruplet, number: int, films: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry of a quadruplet in `violations.json`: its law, and the paths of its films by name."""
    return {"number": number, "law": scene.law, "hidden_frames": scene.hidden_frames, "films": dict(films)}


def describe(scene: Quadruplet, name: str) -> dict[str, Any]:
    """Return the labels of a film: its law, whether it is possible, and the scene of either half."""
    halves = {"first": scene.a if name[0] == "a" else scene.b, "second": scene.a if name[1] == "a" else scene.b}
    return {
        "law": scene.law,
        "possible": name[0] == name[1],
        "hidden_frames": scene.hidden_frames,
        "screen": list(scene.screen),
        "shade": scene.shade,
        "rises": scene.rises,
        "mirrored": scene.mirrored,
        **{half: asdict(film) for half, film in halves.items()},
    }


def read_scene(labels: Mapping[str, Any]) -> Quadruplet:
    """Return the quadruplet of a film from its labels, whose `a` is the film's first half and `b` its second.

    Raises:
        KeyError, TypeError: the labels are of another kind.
    """
    first, second = (Film(Object(**labels[half]["object"]), wall=labels[half]["wall"]) for half in ("first", "second"))
    left, right = labels["screen"]
    form = {name: labels[name] for name in ("law", "hidden_frames", "shade", "rises", "mirrored")}
    return Quadruplet(**form, screen=(left, right), a=first, b=second)
