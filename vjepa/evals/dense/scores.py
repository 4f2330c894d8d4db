"""Scores of predicted maps, from sums over the pixels of a video, so that videos can be resampled for an interval.

Letters: t frames, P height and width in pixels, k classes or numbers of a pixel, s sums, c videos.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from vjepa.evals.base import ScoreRow
from vjepa.evals.dense.data import MapKind
from vjepa_data.rng import generator

UNITS = {"objects": "share", "depth": "that of the maps", "flow": "percent of the frame's side per frame"}

MOVING = 0.005  # of the frame's side: a pixel that moves farther between two frames counts as moving


def _class_sums(predicted: Float[ndarray, "t P P k"], truth: Float[ndarray, "t P P 1"]) -> Float[ndarray, " s"]:
    """Count the pixels of each class: right, predicted, and true, over the pixels whose class is known."""
    classes, known = predicted.shape[-1], np.isfinite(truth[..., 0])
    told, true = predicted.argmax(-1)[known], truth[..., 0][known].astype(int)
    parts = (true[told == true], told, true)
    return np.concatenate([np.bincount(part, minlength=classes) for part in parts]).astype(float)


def _depth_sums(predicted: Float[ndarray, "t P P 1"], truth: Float[ndarray, "t P P 1"]) -> Float[ndarray, " s"]:
    known = np.isfinite(truth)
    return np.array([np.square((predicted - truth)[known], dtype=float).sum(), known.sum()], float)


def _flow_sums(predicted: Float[ndarray, "t P P 2"], truth: Float[ndarray, "t P P 2"]) -> Float[ndarray, " s"]:
    known = np.isfinite(truth).all(-1)
    error = 100 * np.linalg.norm((predicted - truth)[known], axis=-1)
    moves = np.linalg.norm(truth[known], axis=-1) > MOVING
    return np.array([error.sum(), len(error), error[moves].sum(), moves.sum()], float)


SUMS: Mapping[str, Callable[[ndarray, ndarray], ndarray]] = {
    "objects": _class_sums,
    "depth": _depth_sums,
    "flow": _flow_sums,
}


def class_iou(sums: Mapping[str, Float[ndarray, "c s"]], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the intersection over union of each class that occurs, for each kind of features."""
    return {
        name: {classes[number]: float(value) for number, value in enumerate(_ious(of.sum(0))) if np.isfinite(value)}
        for name, of in sums.items()
    }


def _ious(sums: Float[ndarray, "... s"]) -> Float[ndarray, "... k"]:
    """Return the intersection over union of each class, and NaN for a class that does not occur."""
    right, told, true = np.split(sums, 3, axis=-1)
    return np.where(true > 0, right / np.maximum(told + true - right, 1), np.nan)


def _rows(
    kind: str, metric: str, name: str, sums: Float[ndarray, "c s"], seed: int, score: Callable[[ndarray], ndarray]
) -> list[ScoreRow]:
    """Return the row of a score that is computed from sums, with its interval over resampled videos."""
    videos = len(sums)
    draws = generator(seed, "dense interval").multinomial(videos, np.full(videos, 1 / videos), 1000)
    with np.errstate(invalid="ignore", divide="ignore"):
        value, drawn = float(score(sums.sum(0))), score(draws @ sums)
    if not np.isfinite(value):
        return []
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return [ScoreRow(kind, metric, name, value, float(low), float(high), videos)]


def score_rows(kind: MapKind, name: str, sums: Float[ndarray, "c s"], seed: int) -> list[ScoreRow]:
    """Return the scores of a kind of features. Scores of pixels that do not exist are left out."""
    match kind:
        case "objects":
            return _rows(kind, "mIoU", name, sums, seed, lambda total: np.nanmean(_ious(total), axis=-1))
        case "depth":
            return _rows(kind, "RMSE", name, sums, seed, lambda total: np.sqrt(total[..., 0] / total[..., 1]))
        case "flow":
            every = _rows(kind, "end-point error", name, sums, seed, lambda total: total[..., 0] / total[..., 1])
            moving = lambda total: total[..., 2] / total[..., 3]  # noqa: E731
            return every + _rows(kind, "end-point error, moving", name, sums, seed, moving)
