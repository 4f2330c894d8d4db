"""What each token lies on, from the tracks of objects that a generated video carries in its JSON.

`labels["tracks"]` is a list of objects, one entry per frame of the video file in each list:

    {"shape": "disc", "size": 0.17, "x": [...], "y": [...], "visible": [...]}

x and y are the centre in shares of the frame (y downwards), size is the radius in the same unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from vjepa.config import Model
from vjepa.nn.grid import Grid
from vjepa_data.evaluation.clips import EvalClip

SECTORS = 8  # directions of motion that are told apart


@dataclass(frozen=True)
class TokenLabels:
    """Tokens that lie on an object, and what is asked of them."""

    clip: Int[ndarray, " n"]
    token: Int[ndarray, " n"]
    """Place in the grid: (t * h + row) * w + column."""
    shape: Shaped[ndarray, " n"]
    centre: Float[ndarray, "n 2"]
    """From the token's centre to the object's: dx, dy in shares of the frame."""
    velocity: Float[ndarray, "n 2"]
    """Of the object: shares of the frame per second."""
    direction: Int[ndarray, " n"]
    """Of the velocity, in 8 sectors, the first to the right, clockwise on the screen."""

    @classmethod
    def join(cls, parts: Sequence["TokenLabels"]) -> "TokenLabels":
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def none(cls) -> "TokenLabels":
        ids, pairs = np.zeros(0, int), np.zeros((0, 2))
        return cls(ids, ids, np.zeros(0, "U1"), pairs, pairs, ids)


def mean_velocity(clip: EvalClip) -> Float[ndarray, " 2"]:
    """How the objects of a clip move, on average, from its first frame to its last: shares of the frame per second.

    Of this very clip, since clips start anywhere and objects bounce: what a video's label says of its beginning is no
    answer for a clip from its middle. Not a number without objects or with a single frame, or where an object is
    hidden in some frame.
    """
    tracks, numbers = clip.labels.get("tracks"), np.array(clip.numbers)
    if not tracks or not all(np.array(track["visible"])[numbers].all() for track in tracks):
        return np.full(2, np.nan)
    first, last = (np.array([[track["x"][n], track["y"][n]] for track in tracks]) for n in numbers[[0, -1]])  # [o 2]
    elapsed = (numbers[-1] - numbers[0]) / clip.fps
    return (last - first).mean(0) / elapsed if elapsed > 0 else np.full(2, np.nan)


def token_labels(clip: EvalClip, grid: Grid, model: Model, *, clip_number: int) -> TokenLabels:
    """Label the tokens of one clip; those on no object, or on one that is hidden in some frame, have no label.

    A token belongs to the object whose centre is nearest in units of its size, if it lies inside that size.
    Source of the probe: a linear map from a token to what it lies on; pixels and untrained encoders are at chance
    in it, so what is above them was learned.
    """
    tracks = clip.labels.get("tracks")
    if not tracks:
        return TokenLabels.none()
    step = model.tubelet_frames
    numbers = np.array(clip.numbers)
    size = np.array([track["size"] for track in tracks], float)  # [o]
    x, y, seen = (np.array([track[name] for track in tracks], float)[:, numbers] for name in ("x", "y", "visible"))
    at = np.stack([x, y], -1).reshape(len(tracks), grid.t, step, 2)  # [o t step 2]
    seen = seen.reshape(len(tracks), grid.t, step).min(axis=-1) > 0  # [o t]
    centre = at.mean(2)
    seconds = (numbers / clip.fps).reshape(grid.t, step)
    elapsed = seconds[:, -1] - seconds[:, 0]  # 0 for tubelets of one frame: no velocity
    velocity = (at[:, :, -1] - at[:, :, 0]) / np.where(elapsed > 0, elapsed, math.inf)[:, None]  # [o t 2]
    rows, columns = (np.arange(grid.h) + 0.5) / grid.h, (np.arange(grid.w) + 0.5) / grid.w
    places = np.stack(np.meshgrid(columns, rows), -1)  # [h w 2], x first
    offset = centre[:, :, None, None] - places  # [o t h w 2]
    distance = np.linalg.norm(offset, axis=-1) / size[:, None, None, None]
    distance = np.where(seen[:, :, None, None], distance, np.inf)
    nearest = distance.argmin(axis=0)  # [t h w]
    t, row, column = np.nonzero(distance.min(axis=0) < 1)
    o = nearest[t, row, column]
    moved = velocity[o, t]
    return TokenLabels(
        clip=np.full(len(t), clip_number),
        token=(t * grid.h + row) * grid.w + column,
        shape=np.array([track["shape"] for track in tracks])[o],
        centre=offset[o, t, row, column],
        velocity=moved,
        direction=np.rint(np.arctan2(moved[:, 1], moved[:, 0]) / (2 * np.pi) * SECTORS).astype(int) % SECTORS,
    )
