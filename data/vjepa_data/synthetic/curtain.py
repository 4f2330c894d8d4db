"""Generate scenes that test memory: a curtain closes over an object, and the object or another comes back.

    | object is shown | curtain closes | closed for 1, 4, 16 or 30 s, 0-3 distractors pass | opens | object again |
    start           close           closed                                               open  opened           end

A video is a row of acts, each with a new object. Half of the objects rest, half go on moving behind the curtain. While
it is closed, the picture shows the curtain and distractors alone, so that only memory tells which object comes back.
Labels hold, for each act, its frames, shape, place at opening, and the number and order of the distractors. A video is
a function of (seed, number).

Letters: F frames, P height and width in pixels. Lengths are in sides of the frame, x to the right, y down.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from vjepa_data.rng import generator
from vjepa_data.settings import BadInput
from vjepa_data.synthetic.physics import COLOURS, SHAPES, draw_shape, write_video

GAPS_S = (1, 4, 16, 30)
"""Seconds for which a curtain stays closed. The first act of video n has gap n % 4."""

SHOWN_S = (2.0, 4.0)
"""Shortest and longest time for which an object is shown before its curtain closes."""

SLIDE_S = 0.5
"""Time in which the curtain closes or opens."""

RETURN_S = 2.0
"""Time for which the object is shown again."""

SPEED = (0.1, 0.3)
"""Speed of moving objects, in sides per second. They bounce off the walls."""

SIZE = 0.35
"""Radius of an object. At 48 px, a linear readout of a tiny encoder's features must tell its shape in full sight."""

BRIGHT = ("cyan", "green", "yellow", "white")
"""Colours of objects, all brighter than the backdrop: with complementary colours, readouts of shape average to zero."""

BACKDROP = 0.15
DISTRACTOR_SIZE = 0.12
DISTRACTOR_S = 1.0
"""Time in which a distractor crosses the picture. A gap of 1 s has at most one."""

MAX_DISTRACTORS = 3
CURTAIN = ((0.42, 0.36, 0.40), (0.36, 0.30, 0.34))
"""Colours of its stripes."""


@dataclass(frozen=True)
class Distractor:
    """An object that crosses in front of the closed curtain."""

    shape: str
    colour: str
    start_s: float
    """Time since the curtain is closed."""
    y: float
    rightwards: bool


@dataclass(frozen=True)
class Act:
    """An object and a curtain. Times are frame numbers of the video."""

    start: int
    close: int
    """The curtain begins to close."""
    closed: int
    open: int
    """The curtain begins to open: frame `open - 1` is the last without any of the object."""
    opened: int
    end: int
    gap_s: float
    shape: str
    colour: str
    moves: bool
    at: tuple[float, float]
    """Place at the start."""
    velocity: tuple[float, float]
    """Sides per second, or zero for an object at rest."""
    distractors: tuple[Distractor, ...]


def draw_acts(seed: int, number: int, *, seconds: float, fps: int) -> list[Act]:
    """Draw the acts of a video: as many as fit with their gaps, and at least one."""
    draw = generator(seed, "curtain", number)
    acts = [_draw_act(draw, GAPS_S[number % len(GAPS_S)], start=0, fps=fps)]
    while True:
        rest_s = seconds - acts[-1].end / fps - SHOWN_S[1] - 2 * SLIDE_S - RETURN_S
        gaps_s = [gap_s for gap_s in GAPS_S if gap_s <= rest_s]
        if not gaps_s:
            return acts
        gap_s = gaps_s[int(draw.integers(len(gaps_s)))]
        acts.append(_draw_act(draw, gap_s, start=acts[-1].end, fps=fps))


def _draw_act(draw: np.random.Generator, gap_s: float, *, start: int, fps: int) -> Act:
    shown_s, moves = draw.uniform(*SHOWN_S), bool(draw.random() < 0.5)
    angle, speed = draw.uniform(0, 2 * np.pi), draw.uniform(*SPEED)
    at = draw.uniform(SIZE, 1 - SIZE, 2)
    count = min(int(draw.integers(MAX_DISTRACTORS, endpoint=True)), int(gap_s / DISTRACTOR_S))
    starts = np.sort(draw.uniform(0, gap_s - DISTRACTOR_S, count)) if count else []
    kinds = draw.integers(0, (len(SHAPES), len(BRIGHT), 2), (MAX_DISTRACTORS, 3))
    heights = draw.uniform(DISTRACTOR_SIZE, 1 - DISTRACTOR_SIZE, MAX_DISTRACTORS)
    spans = np.cumsum([shown_s, SLIDE_S, gap_s, SLIDE_S, RETURN_S])
    close, closed, opening, opened, end = (start + round(span * fps) for span in spans)
    return Act(
        start, close, closed, opening, opened, end,
        gap_s=gap_s,
        shape=SHAPES[int(draw.integers(len(SHAPES)))],
        colour=BRIGHT[int(draw.integers(len(BRIGHT)))],
        moves=moves,
        at=(float(at[0]), float(at[1])),
        velocity=(float(speed * np.cos(angle)), float(speed * np.sin(angle))) if moves else (0.0, 0.0),
        distractors=tuple(
            Distractor(SHAPES[kind[0]], BRIGHT[kind[1]], float(begin), float(y), bool(kind[2]))
            for begin, kind, y in zip(starts, kinds.tolist(), heights.tolist(), strict=False)
        ),
    )  # fmt: skip


def place(act: Act, frames: Float[ndarray, " F"], fps: int) -> Float[ndarray, "F 2"]:
    """Return the centre of the object at some frames: straight lines, folded at the walls."""
    way = np.array(act.at) + np.array(act.velocity) * ((frames - act.start) / fps)[:, None]
    room = 1 - 2 * SIZE
    folded = np.mod(way - SIZE, 2 * room)
    return SIZE + np.where(folded > room, 2 * room - folded, folded)


def draw_frames(acts: list[Act], px: int, *, fps: int) -> UInt8[ndarray, "F P P 3"]:
    """Draw a video of consecutive acts."""
    grid = ((np.arange(px) + 0.5) / px).astype(np.float32)
    picture = np.full((acts[-1].end, px, px, 3), BACKDROP, dtype=np.float32)
    stripes = np.where((grid * 12).astype(int)[:, None] % 2, *(np.array(stripe, np.float32) for stripe in CURTAIN))
    for act in acts:
        frames = np.arange(act.start, act.end, dtype=np.float64)
        part = picture[act.start : act.end]
        _paint(part, act.shape, act.colour, place(act, frames, fps), SIZE)
        slide = np.interp(frames, (act.close, act.closed, act.open, act.opened), (0, 1, 1, 0)).astype(np.float32)
        edge = np.minimum(grid, 1 - grid)[None] * 2 - slide[:, None]  # negative behind the two halves of the curtain
        cover = np.where(slide[:, None] >= 1, 1, np.clip(0.5 - edge * px / 2, 0, 1) * (slide > 0)[:, None])
        part += cover[:, None, :, None] * (stripes - part)
        for one in act.distractors:
            share = ((frames - act.closed) / fps - one.start_s) / DISTRACTOR_S
            now = (share >= 0) & (share <= 1) & (frames >= act.closed) & (frames < act.open)
            way = np.where(one.rightwards, share, 1 - share)[now] * (1 + 2 * DISTRACTOR_SIZE) - DISTRACTOR_SIZE
            crossing = part[now]
            _paint(crossing, one.shape, one.colour, np.stack((way, np.full_like(way, one.y)), axis=1), DISTRACTOR_SIZE)
            part[now] = crossing
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _paint(
    picture: Float[ndarray, "F P P 3"], shape: str, colour: str, centres: Float[ndarray, "F 2"], size: float
) -> None:
    """Paint a shape into frames, in place."""
    grid = ((np.arange(picture.shape[1]) + 0.5) / picture.shape[1]).astype(np.float32)
    x, y = centres.astype(np.float32).T[:, :, None, None]
    cover = draw_shape(shape, grid[None, None, :] - x, grid[None, :, None] - y, size, picture.shape[1])
    picture += cover[..., None] * (np.array(COLOURS[colour], dtype=np.float32) - picture)


def describe(acts: list[Act], *, fps: int) -> dict[str, Any]:
    """Return the labels of a video: its acts, and the path of every object as in the physics scenes."""
    frames = np.arange(acts[-1].end, dtype=np.float64)
    tracks, described = [], []
    for act in acts:
        centres = place(act, np.clip(frames, act.start, act.end - 1), fps)
        is_behind = (frames >= act.close) & (frames < act.opened)
        visible = (frames >= act.start) & (frames < act.end) & ~is_behind
        tracks.append(
            {
                "shape": act.shape,
                "shape_id": SHAPES.index(act.shape),
                "colour": act.colour,
                "size": SIZE,
                "x": np.round(centres[:, 0], 4).tolist(),
                "y": np.round(centres[:, 1], 4).tolist(),
                "visible": visible.tolist(),
            }
        )
        facts = asdict(act)
        del facts["at"], facts["velocity"], facts["distractors"]
        where = np.round(place(act, np.array([float(act.open)]), fps)[0], 4).tolist()
        order = [one.shape for one in act.distractors]
        described.append({**facts, "place": where, "count": len(order), "order": order})
    return {"shape": acts[0].shape, "gap_s": acts[0].gap_s, "acts": described, "tracks": tracks}


def write_curtains(
    out: Path,
    *,
    videos: int,
    seed: int,
    px: int = 48,
    seconds: float = 48.0,
    fps: int = 6,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write an mp4 (H.264) and a json with labels for each video, in one folder.

    Args:
        out: folder, created if it does not exist.
        videos: number of videos.
        seed: seed of the corpus. Video n of a seed is the same in a corpus of any length.
        px: height and width, even.
        seconds: longest video, unless its first act is longer.
        fps: frames per second.
        advance: called with the number of videos that are written and of all videos.

    Returns:
        Paths of the videos.

    Raises:
        BadInput: the size is odd or too small.
    """
    if px % 2 or px < 32:
        raise BadInput(f"px ({px}) must be even and at least 32; try 48")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(videos):
        acts = draw_acts(seed, number, seconds=seconds, fps=fps)
        paths.append(out / f"curtain_{number:06d}.mp4")
        write_video(paths[-1], draw_frames(acts, px, fps=fps), fps=fps)
        paths[-1].with_suffix(".json").write_text(json.dumps(describe(acts, fps=fps)) + "\n")
        advance(number + 1, videos)
    return paths
