"""Labels of tokens that lie on an object, from the object tracks in the JSON of generated videos.

`labels["tracks"]` is a list of objects. Its lists have an entry per frame of the video file:

    {"shape": "disc", "size": 0.17, "x": [...], "y": [...], "visible": [...]}

x and y are the centre in shares of the frame (y downwards). size is the radius in the same unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from vjepa.config import Model
from vjepa.nn.grid import Grid
from vjepa_data.evaluation.clips import EvalClip

SECTORS = 8  # classes of the direction of motion


@dataclass(frozen=True)
class TokenLabels:
    """Tokens that lie on an object, with the labels of that object."""

    clip: Int[ndarray, " n"]
    """Number of the clip of each token."""
    token: Int[ndarray, " n"]
    """Position in the grid: (t * h + row) * w + column."""
    shape: Shaped[ndarray, " n"]
    """Name of the object's shape."""
    centre: Float[ndarray, "n 2"]
    """Offset (dx, dy) from the token's centre to the object's, in shares of the frame."""
    velocity: Float[ndarray, "n 2"]
    """Velocity of the object, in shares of the frame per second."""
    direction: Int[ndarray, " n"]
    """Direction of the velocity in 8 sectors, clockwise on the screen. Sector 0 points to the right."""

    def shifted(self, clips: int) -> "TokenLabels":
        """Return the same labels with larger clip numbers."""
        return replace(self, clip=self.clip + clips)

    @classmethod
    def join(cls, parts: Sequence["TokenLabels"]) -> "TokenLabels":
        """Concatenate labels."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def none(cls) -> "TokenLabels":
        """Return the labels of a clip without objects."""
        ids, pairs = np.zeros(0, int), np.zeros((0, 2))
        return cls(ids, ids, np.zeros(0, "U1"), pairs, pairs, ids)


def mean_velocity(clip: EvalClip) -> Float[ndarray, " 2"]:
    """Return the mean velocity of the objects of a clip, from its first to its last frame, in frame widths per second.

    It is computed for each clip because clips start anywhere and objects bounce: a label of the beginning of the video
    is wrong for a clip from its middle. The result is nan without objects, with a single frame, or if an object is
    hidden in some frame.
    """
    tracks, numbers = clip.labels.get("tracks"), np.array(clip.numbers)
    if not tracks or not all(np.array(track["visible"])[numbers].all() for track in tracks):
        return np.full(2, np.nan)
    first, last = (np.array([[track["x"][n], track["y"][n]] for track in tracks]) for n in numbers[[0, -1]])  # [o 2]
    elapsed = (numbers[-1] - numbers[0]) / clip.fps
    return (last - first).mean(0) / elapsed if elapsed > 0 else np.full(2, np.nan)


def token_labels(clip: EvalClip, grid: Grid, model: Model, *, clip_number: int) -> TokenLabels:
    """Label the tokens of a clip that lie on an object which is visible throughout the tubelet.

    A token belongs to the object whose centre is nearest in units of the object's size, if the token lies within that
    size. A linear probe maps a token to these labels. Pixels and untrained encoders are at chance there, so scores
    above theirs were learned.
    """
    tracks = clip.labels.get("tracks")
    if not tracks:
        return TokenLabels.none()
    step = model.tubelet_frames
    numbers = np.array(clip.numbers)
    size = np.array([track["size"] for track in tracks], float)  # [o]
    x, y, visible = (np.array([track[name] for track in tracks], float)[:, numbers] for name in ("x", "y", "visible"))
    position = np.stack([x, y], -1).reshape(len(tracks), grid.t, step, 2)  # [o t step 2]
    visible = visible.reshape(len(tracks), grid.t, step).min(axis=-1) > 0  # [o t]
    centre = position.mean(2)
    seconds = (numbers / clip.fps).reshape(grid.t, step)
    elapsed = seconds[:, -1] - seconds[:, 0]  # 0 for tubelets of one frame, which have no velocity
    velocity = (position[:, :, -1] - position[:, :, 0]) / np.where(elapsed > 0, elapsed, math.inf)[:, None]  # [o t 2]
    rows, columns = (np.arange(grid.h) + 0.5) / grid.h, (np.arange(grid.w) + 0.5) / grid.w
    centres = np.stack(np.meshgrid(columns, rows), -1)  # [h w 2], x first
    offset = centre[:, :, None, None] - centres  # [o t h w 2]
    distance = np.linalg.norm(offset, axis=-1) / size[:, None, None, None]
    distance = np.where(visible[:, :, None, None], distance, np.inf)
    nearest = distance.argmin(axis=0)  # [t h w]
    t, row, column = np.nonzero(distance.min(axis=0) < 1)
    o = nearest[t, row, column]
    velocity = velocity[o, t]  # [n 2]
    return TokenLabels(
        clip=np.full(len(t), clip_number),
        token=(t * grid.h + row) * grid.w + column,
        shape=np.array([track["shape"] for track in tracks])[o],
        centre=offset[o, t, row, column],
        velocity=velocity,
        direction=np.rint(np.arctan2(velocity[:, 1], velocity[:, 0]) / (2 * np.pi) * SECTORS).astype(int) % SECTORS,
    )
