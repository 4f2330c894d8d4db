"""Differences of poses: the motion of an arm between two frames, which V-JEPA 2-AC takes as an action.

Positions and grippers are subtracted. A rotation is compared as a matrix, R_next R_this^T, because angles wrap around
and depend on their order. The result is written as Euler angles about the fixed axes x, y, z.

Source: V-JEPA 2 (arXiv:2506.09985), section 3.1.

Letters: N poses, A columns, D columns of a difference.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Rows = Float[np.ndarray, "N A"]


def pose_differences(rows: Rows, rotations: Sequence[Sequence[int]] = ()) -> Float[np.ndarray, "M D"]:
    """Return the difference between each pose and the next, float64.

    Args:
        rows: N poses.
        rotations: numbers of the columns of each rotation: three Euler angles in radians about the fixed axes x, y, z,
            or the four numbers x, y, z, w of a quaternion.

    Returns:
        N - 1 differences, with the columns in the order of the poses. Each rotation becomes three Euler angles in
        the place of its first column.
    """
    wide = rows.astype(np.float64)
    parts = dict(enumerate(np.diff(wide, axis=0).T[:, :, None]))  # column -> [N - 1, 1]
    for columns in rotations:
        matrices = _from_quaternion(wide[:, columns]) if len(columns) == 4 else _from_euler(wide[:, columns])
        parts[columns[0]] = _to_euler(matrices[1:] @ matrices[:-1].swapaxes(1, 2))
        for column in columns[1:]:
            del parts[column]
    return np.concatenate([parts[column] for column in sorted(parts)], axis=1)


def _from_euler(angles: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3 3"]:
    """Return Rz Ry Rx."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(angles).T, np.cos(angles).T
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _from_quaternion(quaternions: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 3 3"]:
    lengths = np.linalg.norm(quaternions, axis=1, keepdims=True)
    x, y, z, w = (quaternions / np.where(lengths > 0, lengths, 1)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _to_euler(matrices: Float[np.ndarray, "N 3 3"]) -> Float[np.ndarray, "N 3"]:
    """Invert `_from_euler`. At a turn of exactly 90 degrees about y, x takes all of the other turn and z is 0."""
    sy = np.clip(-matrices[:, 2, 0], -1, 1)
    is_locked = np.abs(sy) > 1 - 1e-12
    free_x = np.arctan2(matrices[:, 2, 1], matrices[:, 2, 2])
    free_z = np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])
    locked_x = np.arctan2(np.sign(sy) * matrices[:, 0, 1], np.sign(sy) * matrices[:, 0, 2])
    return np.stack((np.where(is_locked, locked_x, free_x), np.arcsin(sy), np.where(is_locked, 0, free_z)), axis=1)
