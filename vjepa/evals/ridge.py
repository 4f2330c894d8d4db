"""Linear probes by ridge regression, with a cross-validated penalty. Folds and intervals are by clip.

Classes are predicted by regression on their one-hot code.

Letters: n rows (clips, or tokens of clips), d features, k targets, c clips.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from vjepa_data.rng import generator

Kind = Literal["class", "number"]

# Penalties as a share of the number of rows, for features of variance 1.
PENALTIES = tuple(10.0**power for power in range(-5, 4))

FOLDS = 5
FOLD_ROWS = 20_000  # the penalty is selected on clips with about so many rows; more did not change the choice

CHUNK = 16384  # rows turned to float64 at a time

Target = Shaped[ndarray, " n"] | Float[ndarray, "n k"]
"""A class, a number, or several numbers for each row."""


@dataclass(frozen=True)
class Table:
    """Rows of features, with the target and the clip of each row."""

    features: Float[Tensor, "n d"]
    target: Target
    clip: Int[ndarray, " n"]

    def __len__(self) -> int:
        return len(self.clip)

    def rows(self, keep: Shaped[ndarray, " m"]) -> "Table":
        """Return some of the rows."""
        return Table(self.features[torch.from_numpy(keep)], self.target[keep], self.clip[keep])


@dataclass(frozen=True)
class Score:
    """Accuracy or R2 on the test rows, with an interval over resampled test clips."""

    value: float
    low: float
    high: float
    """The 2.5 % and 97.5 % quantiles over 1,000 resamplings of the test clips."""
    rows: int
    clips: int
    penalty: float | None = None


def ridge_score(train: Table, test: Table, kind: Kind, *, seed: int = 0) -> Score:
    """Choose the penalty by five-fold cross-validation on `train`, fit on all of it, score on `test`.

    Args:
        train, test: rows of different clips.
        kind: `class` gives accuracy. `number` gives R2, which is 1 - squared errors / squared distances to the mean of
            `train`, each summed over all rows and the k targets (in the same unit).
        seed: seed of the resampling and of the folds.

    Raises:
        ValueError: there are fewer than two clips or classes to train on.
    """
    return fit_ridge(train, kind, seed=seed)(test)


def fit_ridge(train: Table, kind: Kind, *, seed: int = 0) -> Callable[[Table], Score]:
    """Return a function that scores any table by one fit to `train`, see `ridge_score`."""
    codes = _TargetCodes(train.target, kind)
    predict, penalty = _fit_best(train, codes, seed)
    return lambda test: _with_interval(predict(test.features), test, codes, seed, penalty)


def fit_linear(train: Table, *, seed: int = 0) -> "LinearMap":
    """Return the linear map from features to the numbers of `train`, with the penalty of `ridge_score`.

    Raises:
        ValueError: there are fewer than two clips to train on.
    """
    return _fit_best(train, _TargetCodes(train.target, "number"), seed)[0]


def _fit_best(train: Table, codes: "_TargetCodes", seed: int) -> tuple["LinearMap", float]:
    """Fit with the penalty that cross-validation chooses, and return the penalty too."""
    losses, errors = np.zeros(len(PENALTIES)), np.zeros(len(PENALTIES))
    for fold in _folds(train, seed):
        y = torch.from_numpy(codes(fold.held_out.target))
        predictions = [predict(fold.held_out.features) for predict in _fit(fold.fit.features, codes(fold.fit.target))]
        losses += [_clip_losses(predicted, fold.held_out, codes).losses.sum() for predicted in predictions]
        errors += [float((predicted - y).square().sum()) for predicted in predictions]
    best = int(np.lexsort((errors, losses))[0])  # accuracies on few clips are often equal, then the error decides
    return _fit(train.features, codes(train.target), (PENALTIES[best],))[0], PENALTIES[best]


def prior_score(train: Table, test: Table, kind: Kind, *, seed: int = 0) -> Score:
    """Score the prediction that ignores the features: the commonest class, or the mean."""
    codes = _TargetCodes(train.target, kind)
    predicted = torch.from_numpy(codes.mean).expand(len(test), -1)
    return _with_interval(predicted, test, codes, seed, None)


class _TargetCodes:
    """Code targets as numbers [n k]: one-hot classes, or the numbers themselves. Keeps their mean over fitted rows."""

    def __init__(self, target: Target, kind: Kind) -> None:
        self.classes = np.unique(target) if kind == "class" else None
        if self.classes is not None and len(self.classes) < 2:
            raise ValueError(f"all rows to train on have the class {self.classes[0]!r}; give rows of two classes")
        self.mean = self(target).mean(0)

    def __call__(self, target: Target) -> Float[ndarray, "n k"]:
        if self.classes is not None:
            return (target[:, None] == self.classes).astype(np.float64)
        return target.astype(np.float64).reshape(len(target), -1)


@dataclass(frozen=True)
class _Fold:
    """Rows to fit on, and rows of other clips."""

    fit: Table
    held_out: Table


def _folds(table: Table, seed: int) -> Iterator[_Fold]:
    """Cut the clips in five, and yield each fifth with the remaining clips. At most about `FOLD_ROWS` rows are used."""
    clips = np.unique(table.clip)
    if len(clips) < 2:
        raise ValueError(f"a linear probe needs at least 2 clips to train on, got {len(clips)}; give more clips")
    clips = generator(seed, "readout folds").permutation(clips)
    clips = clips[: max(FOLDS, round(len(clips) * min(1, FOLD_ROWS / len(table))))]
    for held in np.array_split(clips, min(FOLDS, len(clips))):
        inner = np.setdiff1d(clips, held)
        yield _Fold(*(table.rows(np.flatnonzero(np.isin(table.clip, part))) for part in (inner, held)))


class LinearMap:
    """Map x to (x - mean) / std @ weight + bias."""

    def __init__(
        self,
        mean: Float[Tensor, " d"],
        std: Float[Tensor, " d"],
        weight: Float[Tensor, "d k"],
        bias: Float[Tensor, " k"],
    ) -> None:
        self.mean, self.std, self.weight, self.bias = mean, std, weight, bias

    def __call__(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        parts = [(part.double() - self.mean) / self.std @ self.weight for part in features.split(CHUNK)]
        return torch.cat(parts) + self.bias


def _fit(
    features: Float[Tensor, "n d"], codes: Float[ndarray, "n k"], penalties: Sequence[float] = PENALTIES
) -> list[LinearMap]:
    """Fit a ridge regression for each penalty, from a decomposition of the smaller Gram matrix, in fp64."""
    rows, width = features.shape
    y = torch.from_numpy(codes)
    bias = y.mean(0)
    y = y - bias
    mean, std = _moments(features)
    if width <= rows:  # [d d]
        gram, cross = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, y.shape[1], dtype=y.dtype)
        for part, target in zip(features.split(CHUNK), y.split(CHUNK), strict=True):
            part = (part.double() - mean) / std
            gram += part.T @ part
            cross += part.T @ target
        values, vectors = torch.linalg.eigh(gram)
        cross = vectors.T @ cross
        weights = [vectors @ (cross / (values + p * rows)[:, None]) for p in penalties]
    else:  # [n n]
        x = (features.double() - mean) / std
        values, vectors = torch.linalg.eigh(x @ x.T)
        cross = vectors.T @ y
        weights = [x.T @ (vectors @ (cross / (values + p * rows)[:, None])) for p in penalties]
    return [LinearMap(mean, std, weight, bias) for weight in weights]


def _moments(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for part in features.split(CHUNK):
        total += part.double().sum(0)
    mean, square = total / len(features), torch.zeros_like(total)
    for part in features.split(CHUNK):
        square += (part.double() - mean).square().sum(0)
    std = (square / len(features)).sqrt()
    # A constant feature is ignored. Dividing by its rounding error would amplify noise.
    return mean, torch.where(std > 1e-6 * std.max().clamp(min=1e-12), std, torch.inf)


@dataclass(frozen=True)
class _ClipLosses:
    """Loss of each clip, and the largest loss that counts as no prediction at all, summed over its rows."""

    losses: Float[ndarray, " c"]
    """Number of wrong rows, or squared errors."""
    totals: Float[ndarray, " c"]
    """Number of rows, or squared distances to the mean of the fitted rows."""

    def score(self, clips: Int[ndarray, " m"] | slice = slice(None)) -> float:
        """Return 1 - loss / total over some clips: the accuracy, or R2."""
        total = self.totals[clips].sum()
        return float(1 - self.losses[clips].sum() / total) if total > 0 else float("nan")


def _clip_losses(predicted: Float[Tensor, "n k"], table: Table, codes: _TargetCodes) -> _ClipLosses:
    if codes.classes is not None:
        losses = (codes.classes[predicted.argmax(1).numpy()] != table.target).astype(float)
        totals = np.ones_like(losses)
    else:
        y = codes(table.target)
        losses, totals = np.square(predicted.numpy() - y).sum(1), np.square(y - codes.mean).sum(1)
    _, clip = np.unique(table.clip, return_inverse=True)
    return _ClipLosses(np.bincount(clip, losses), np.bincount(clip, totals))


def _with_interval(
    predicted: Float[Tensor, "n k"], test: Table, codes: _TargetCodes, seed: int, penalty: float | None
) -> Score:
    found = _clip_losses(predicted, test, codes)
    clips = len(found.losses)
    draws = generator(seed, "readout interval").integers(0, clips, (1000, clips))
    low, high = np.nanquantile([found.score(draw) for draw in draws], (0.025, 0.975))
    return Score(found.score(), float(low), float(high), len(test), clips, penalty)


def wilson(share: float, count: int) -> list[float]:
    """Return the 95 % interval of a share of `count` (Wilson, 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [middle - half, middle + half]
