"""Generate physics scenes with known labels as real mp4 files, for the demo and its evaluation.

One or two flat shapes move in a box, with or without gravity. They bounce off the walls and each other, and some scenes
have a pillar in front. Shape, colour, size, speed and direction are drawn for each video and stored as labels, together
with the path of every object. A video is a function of (seed, number).

Two choices prevent a probe from answering by the colour of a pixel. Colours come in complementary pairs around
mid-grey, so an object is as often darker than the background as brighter, in every channel, and a linear readout of
pixels averages to zero. Objects are flat, so a patch inside an object looks the same everywhere. A third choice keeps
the demo short: the background is plain. With a different shade and gradient in each video, a tiny model spends its
minutes on backgrounds.

Letters: F frames, K objects, P Q height and width in pixels. Lengths are in sides of the frame, x to the right, y down.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

SHAPES = ("disc", "square", "triangle", "ring")

# Complementary pairs: red + cyan = green + magenta = blue + yellow = white + black = (1, 1, 1).
COLOURS = {
    "red": (0.88, 0.18, 0.18),
    "cyan": (0.12, 0.82, 0.82),
    "green": (0.15, 0.75, 0.20),
    "magenta": (0.85, 0.25, 0.80),
    "blue": (0.15, 0.30, 0.88),
    "yellow": (0.85, 0.70, 0.12),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
}

SUBSTEPS = 8  # simulation steps per frame: an object moves at most 1 % of the frame per step
WALL = 0.5
PILLAR_SHADE = (0.3, 0.7)


@dataclass(frozen=True)
class Rules:
    """Distribution of scenes. Ranges are uniform."""

    objects: tuple[int, int] = (1, 2)
    """Smallest and largest number of objects."""

    size: tuple[float, float] = (0.18, 0.28)
    """Radius of the circle around an object, scaled by 0.8 for two objects and by 0.65 for more."""

    speed: tuple[float, float] = (0.25, 0.9)
    """Initial speed, in sides per second."""

    gravity: tuple[float, float] = (0.3, 1.2)
    """Acceleration in scenes with gravity, in sides per second squared."""

    gravity_share: float = 0.4
    """Fraction of scenes with gravity."""

    pillar_share: float = 0.2
    """Fraction of scenes with a pillar in front."""

    spin: float = 1.0
    """Fastest rotation in either direction, in radians per second."""


@dataclass(frozen=True)
class Scene:
    """Content and motion of a video."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: Float[ndarray, " K"]
    centres: Float[ndarray, "F K 2"]
    angles: Float[ndarray, "F K"]
    speed: float
    """Initial speed of the first object, in sides per second."""

    direction: float
    """Initial direction of the first object, in radians: 0 is right, pi / 2 is down."""

    gravity: float
    pillar: tuple[float, float] | None
    """Left and right edge of the pillar."""

    pillar_shade: float

    @property
    def visible(self) -> Bool[ndarray, "F K"]:
        """True where the centre of an object is not behind the pillar."""
        if self.pillar is None:
            return np.ones(self.centres.shape[:2], dtype=bool)
        left, right = self.pillar
        x = self.centres[..., 0]
        return (x < left) | (x > right)


def draw_scene(seed: int, number: int, *, frames: int, fps: float, rules: Rules = Rules()) -> Scene:
    """Draw the content of a video, and simulate its motion.

    Args:
        seed: seed of the corpus.
        number: number of the video.
        frames: length of the video.
        fps: frames per second.
        rules: distribution of scenes.
    """
    draw = generator(seed, "scene", number)
    count = int(draw.integers(rules.objects[0], rules.objects[1], endpoint=True))
    shapes = tuple(SHAPES[i] for i in draw.integers(0, len(SHAPES), count))
    colours = tuple(list(COLOURS)[i] for i in draw.choice(len(COLOURS), count, replace=False))
    sizes = draw.uniform(*rules.size, count) * (1, 0.8, 0.65)[min(count, 3) - 1]
    direction = draw.uniform(0, 2 * np.pi, count)
    speed = draw.uniform(*rules.speed, count)
    gravity = draw.uniform(*rules.gravity) if draw.random() < rules.gravity_share else 0.0
    velocity = speed[:, None] * np.stack((np.cos(direction), np.sin(direction)), axis=1)
    centres = _move(_draw_centres(draw, sizes), velocity, sizes, gravity=gravity, frames=frames, fps=fps)
    turned = (
        draw.uniform(0, 2 * np.pi, count) + np.arange(frames)[:, None] / fps * draw.uniform(-1, 1, count) * rules.spin
    )
    width = draw.uniform(0.12, 0.2)
    left = draw.uniform(0.1, 0.9 - width)
    pillar = (left, left + width) if draw.random() < rules.pillar_share else None
    return Scene(
        shapes=shapes,
        colours=colours,
        sizes=sizes,
        centres=centres,
        angles=turned,
        speed=float(speed[0]),
        direction=float(direction[0]),
        gravity=float(gravity),
        pillar=pillar,
        pillar_shade=draw.uniform(*PILLAR_SHADE),
    )


def _draw_centres(draw: np.random.Generator, sizes: Float[ndarray, " K"]) -> Float[ndarray, "K 2"]:
    """Draw centres of objects that do not touch. After 100 failures they may overlap, and then repel each other."""
    centres = np.empty((len(sizes), 2))
    for _ in range(100):
        centres = draw.uniform(sizes[:, None], 1 - sizes[:, None], (len(sizes), 2))
        apart = np.hypot(*np.moveaxis(centres[:, None] - centres[None], 2, 0)) + 9 * np.eye(len(sizes))
        if (apart > sizes[:, None] + sizes[None]).all():
            break
    return centres


def _move(
    centres: Float[ndarray, "K 2"],
    velocity: Float[ndarray, "K 2"],
    sizes: Float[ndarray, " K"],
    *,
    gravity: float,
    frames: int,
    fps: float,
) -> Float[ndarray, "F K 2"]:
    """Simulate objects that fall, and bounce without loss off the walls and, as discs, off each other."""
    centres, velocity = centres.copy(), velocity.copy()
    low, high = sizes[:, None], 1 - sizes[:, None]
    step_s = 1 / fps / SUBSTEPS
    path = np.empty((frames, *centres.shape))
    for frame in range(frames):
        path[frame] = centres
        for _ in range(SUBSTEPS):
            velocity[:, 1] += gravity * step_s
            centres += velocity * step_s
            velocity = np.where(centres < low, abs(velocity), np.where(centres > high, -abs(velocity), velocity))
            np.clip(centres, low, high, out=centres)
            for i in range(len(sizes)):
                for j in range(i):
                    _bounce(centres, velocity, sizes, i, j)
    return path


def _bounce(
    centres: Float[ndarray, "K 2"], velocity: Float[ndarray, "K 2"], sizes: Float[ndarray, " K"], i: int, j: int
) -> None:
    """Update two objects that touch, in place, with masses proportional to their areas."""
    apart = centres[i] - centres[j]
    distance = math.hypot(*apart)
    overlap = sizes[i] + sizes[j] - distance
    if overlap <= 0:
        return
    normal = apart / distance if distance > 0 else np.array([1.0, 0.0])
    closing = float((velocity[i] - velocity[j]) @ normal)
    if closing < 0:
        push = 2 * closing / (sizes[i] ** -2 + sizes[j] ** -2)
        velocity[i] -= push / sizes[i] ** 2 * normal
        velocity[j] += push / sizes[j] ** 2 * normal
    centres[i] += normal * overlap / 2
    centres[j] -= normal * overlap / 2


def draw_frames(scene: Scene, px: int) -> UInt8[ndarray, "F P P 3"]:
    """Draw a scene with smooth edges: objects in front of a plain background, and behind the pillar, if any.

    Args:
        scene: the scene.
        px: height and width of a frame.
    """
    grid = ((np.arange(px) + 0.5) / px).astype(np.float32)
    x, y = grid[None, None, :], grid[None, :, None]
    picture = np.full((len(scene.centres), px, px, 3), WALL, dtype=np.float32)
    for k, (shape, colour) in enumerate(zip(scene.shapes, scene.colours, strict=True)):
        centre = scene.centres[:, k, :, None, None].astype(np.float32)
        cos, sin = (f(scene.angles[:, k, None, None]).astype(np.float32) for f in (np.cos, np.sin))
        right, down = x - centre[:, 0], y - centre[:, 1]
        right, down = cos * right + sin * down, cos * down - sin * right
        cover = draw_shape(shape, right, down, float(scene.sizes[k]), px)[..., None]
        picture += cover * (np.array(COLOURS[colour], dtype=np.float32) - picture)
    if scene.pillar:
        left, right = scene.pillar
        cover = np.clip(0.5 - (abs(grid - (left + right) / 2) - (right - left) / 2) * px, 0, 1)[:, None]
        bricks = scene.pillar_shade + 0.06 * np.sign(np.sin(grid * 50)).astype(np.float32)[:, None, None]
        picture += cover * (bricks - picture)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def draw_shape(
    shape: str, right: Float[ndarray, "..."], down: Float[ndarray, "..."], radius: float, px: int
) -> Float[ndarray, "..."]:
    """Return how much of each pixel a shape covers, given the place of the pixels relative to its centre."""
    return np.clip(0.5 - _distance(shape, right, down, radius) * px, 0, 1)


def _distance(shape: str, x: Float[ndarray, "..."], y: Float[ndarray, "..."], radius: float) -> Float[ndarray, "..."]:
    """Compute the signed distance of points to a shape, negative inside. Its circumcircle has about this `radius`."""
    match shape:
        case "disc":
            return np.hypot(x, y) - radius
        case "square":
            return np.maximum(abs(x), abs(y)) - 0.8 * radius
        case "triangle":
            return np.maximum(abs(x) * np.float32(math.sqrt(3) / 2) + y / 2, -y) - 0.58 * radius
        case "ring":
            return abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius
    raise AssertionError(shape)


def describe(scene: Scene) -> dict[str, Any]:
    """Return the labels of a video. They describe every frame, see `vjepa_data.synthetic.maps`."""
    tracks = [
        {
            "shape": scene.shapes[k],
            "shape_id": SHAPES.index(scene.shapes[k]),
            "colour": scene.colours[k],
            "size": round(float(scene.sizes[k]), 4),
            "x": [round(float(x), 4) for x in scene.centres[:, k, 0]],
            "y": [round(float(y), 4) for y in scene.centres[:, k, 1]],
            "angle": [round(float(angle), 4) for angle in scene.angles[:, k]],
            "visible": [bool(seen) for seen in scene.visible[:, k]],
        }
        for k in range(len(scene.shapes))
    ]
    return {
        "shape": scene.shapes[0],
        "colour": scene.colours[0],
        "speed": round(scene.speed, 4),
        "direction": round(scene.direction, 4),
        "objects": len(scene.shapes),
        "gravity": round(scene.gravity, 4),
        "pillar": scene.pillar is not None,
        **({"pillar_edges": [round(float(x), 4) for x in scene.pillar]} if scene.pillar else {}),
        "tracks": tracks,
    }


def write_corpus(
    out: Path,
    *,
    videos: int,
    seed: int,
    px: int = 64,
    seconds: float = 4.0,
    fps: int = 12,
    rules: Rules = Rules(),
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write an mp4 (H.264) and a json with labels for each video.

    Args:
        out: folder, created if it does not exist.
        videos: number of videos.
        seed: seed of the corpus. Video n of a seed is the same in a corpus of any length.
        px: height and width, even.
        seconds: length of a video.
        fps: frames per second.
        rules: distribution of scenes.
        advance: called with the number of videos that are written and of all videos.

    Returns:
        Paths of the videos.

    Raises:
        BadInput: the number of videos is below 1, or the size is odd or too small for H.264.
    """
    if videos < 1:
        raise BadInput(f"videos ({videos}) must be at least 1; try 400")
    if px % 2 or px < 16:
        raise BadInput(f"px ({px}) must be even and at least 16; try 64")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(videos):
        scene = draw_scene(seed, number, frames=round(seconds * fps), fps=fps, rules=rules)
        paths.append(out / f"scene_{number:06d}.mp4")
        write_video(paths[-1], draw_frames(scene, px), fps=fps)
        paths[-1].with_suffix(".json").write_text(json.dumps(describe(scene)) + "\n")
        advance(number + 1, videos)
    return paths


def write_video(
    path: Path,
    frames: Sequence[UInt8[ndarray, "P Q 3"]] | UInt8[ndarray, "F P Q 3"],
    *,
    fps: int,
    intra: bool = False,
) -> None:
    """Encode at high quality, since the builder encodes once more. A single thread makes the bytes reproducible.

    Args:
        path: file to write.
        frames: the pictures.
        fps: frames per second.
        intra: encode each frame alone, at a constant quantizer, so that equal frames are equal after decoding, whatever
            the film shows before. By default frames are predicted from each other, which leaves traces.
    """
    options = {"crf": "12", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
    if intra:
        options = {"qp": "12", "g": "1", "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
