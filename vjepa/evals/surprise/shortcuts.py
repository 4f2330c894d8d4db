"""Audit a benchmark of violations: can single pictures, averages or file sizes tell which films are impossible?

A logistic regression is fitted to statistics of films without any sequence of events: one random frame, the mean frame,
the mean difference between neighbouring frames, and the size of the file. On films of other scenes it must be right by
chance only. If it is not, the films have a shortcut, and their scores say nothing about physics.

Groups of films that share their halves are compared, too: the impossible films of a group together must not have larger
files or larger differences than its possible films. Compression leaves such a trace if the quality of the second half
depends on the first.

Letters: F frames, n films, d numbers per film.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray

from vjepa_data.evaluation.violations import ViolationSet
from vjepa_data.rng import generator

NAMES = ("random frame", "mean frame", "mean difference", "file size")

SIDE, FOLDS, WEIGHT_DECAY = 8, 5, 1e-2

NEWTON_STEPS = 20  # 6 to 11 are enough for a change below 1e-8, on random and on separable data


ROUNDING = 1e-6  # of fp32

GROUPED = ("mean difference", "file size")


def features(frames: UInt8[ndarray, "F H W 3"], path: Path, number: int) -> dict[str, Float[ndarray, " d"]]:
    """Return the statistics of a film that `audit` reads, by name. Film `number` always draws the same random frame."""
    drawn = int(generator(0, "shortcut", number).integers(len(frames)))
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    size = np.array([float(sum(file.stat().st_size for file in files))])
    found = (_shrink(frames[drawn]), _shrink(frames.mean(axis=0)), change.mean(keepdims=True), size)
    return {name: value.astype(np.float32) for name, value in zip(NAMES, found, strict=True)}


def _shrink(frame: ndarray) -> Float[ndarray, " d"]:
    picture = torch.from_numpy(np.asarray(frame, np.float32)).permute(2, 0, 1)
    return F.adaptive_avg_pool2d(picture, SIDE).flatten().numpy()


def audit(films: ViolationSet, hints: Mapping[str, Sequence[Float[ndarray, " d"]]]) -> list[dict[str, Any]]:
    """Return the accuracy of each statistic, and whether chance explains it.

    The first rows are those of logistic regressions on scenes left out. The others are the share of groups in which a
    number is larger for the impossible films. The band is the binomial 95 % band of 50 %.
    """
    used = sorted({place for pair in films.pairs for place in pair})
    labels = np.array([not films.films[place].possible for place in used])
    _, groups = np.unique([films.films[place].group for place in used], return_inverse=True)
    rows = []
    for name, values in hints.items():
        right = _predict(np.stack([values[place] for place in used]), labels, groups) == labels
        rows.append(_row(name, right))
    if len(films.pairs) > groups.max() + 1:  # some group has several pairs
        for name in (name for name in GROUPED if name in hints):
            numbers = np.array([float(hints[name][place][0]) for place in used])
            sums = [np.bincount(groups, np.where(labels == kind, numbers, 0)) for kind in (True, False)]
            rows.append(_row(f"{name}, groups", exceeds(*sums)))
    return rows


def _row(name: str, right: Bool[ndarray, " n"] | Float[ndarray, " n"]) -> dict[str, Any]:
    accuracy, half = float(right.mean()), 1.96 * float(np.sqrt(0.25 / len(right)))
    band = {"low": 0.5 - half, "high": 0.5 + half}
    return {"statistic": name, "accuracy": accuracy, **band, "is_chance": abs(accuracy - 0.5) <= half}


def exceeds(values: Float[ndarray, " n"], others: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """Return 1 where a value is larger than the other, a half where they are equal up to rounding, and 0 elsewhere."""
    ties = np.abs(values - others) <= ROUNDING * np.abs(others)
    return np.where(ties, 0.5, values > others)


def _predict(x: Float[ndarray, "n d"], labels: Bool[ndarray, " n"], groups: Int[ndarray, " n"]) -> Bool[ndarray, " n"]:
    """Classify each film by a logistic regression that is fitted to other groups."""
    predicted = np.zeros(len(x), bool)
    folds = groups % FOLDS
    for fold in np.unique(folds):
        test = folds == fold
        if test.all():
            continue
        mean, std = x[~test].mean(0), x[~test].std(0) + 1e-6
        weights = _fit((x[~test] - mean) / std, labels[~test])
        predicted[test] = np.append((x[test] - mean) / std, np.ones((test.sum(), 1)), axis=1) @ weights > 0
    return predicted


def _fit(x: Float[ndarray, "n d"], labels: Bool[ndarray, " n"]) -> Float[ndarray, " d1"]:
    """Fit a logistic regression with weight decay by Newton's method. The last weight is the bias."""
    inputs = np.append(x, np.ones((len(x), 1)), axis=1).astype(np.float64)
    weights, decay = np.zeros(inputs.shape[1]), 2 * WEIGHT_DECAY
    for _ in range(NEWTON_STEPS):
        share = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (share - labels) / len(x) + decay * weights
        curvature = (inputs.T * (share * (1 - share))) @ inputs / len(x) + decay * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, gradient)
    return weights
