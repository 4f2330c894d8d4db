"""What a linear readout finds in features: ridge regression, its penalty cross-validated, folds and intervals by clip.

n rows (clips, or tokens of clips), d features, k targets. A class is read out by regression on its one-hot code.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from vjepa_data.rng import generator

Kind = Literal["class", "number"]

# Penalties as a share of the number of rows, for features of variance 1: from none to nearly all.
PENALTIES = tuple(10.0**power for power in range(-5, 4))

FOLDS = 5
FOLD_ROWS = 20_000  # the penalty is chosen on clips with about so many rows; more cost time and change nothing

CHUNK = 16384  # rows turned to float64 at a time

Target = Shaped[ndarray, " n"] | Float[ndarray, "n k"]
"""Of each row a class or a number, or several numbers."""


@dataclass(frozen=True)
class Table:
    """Rows of features with the target of each, and the clip that each comes from."""

    features: Float[Tensor, "n d"]
    target: Target
    clip: Int[ndarray, " n"]

    def __len__(self) -> int:
        return len(self.clip)

    def rows(self, keep: Shaped[ndarray, " m"]) -> "Table":
        return Table(self.features[torch.from_numpy(keep)], self.target[keep], self.clip[keep])


@dataclass(frozen=True)
class Score:
    """Accuracy or R2 on the test rows, with an interval over resampled test clips."""

    value: float
    low: float
    high: float
    """2.5 % and 97.5 % quantiles of 1,000 resamplings of the test clips."""
    rows: int
    clips: int
    penalty: float | None = None


def ridge_score(train: Table, test: Table, kind: Kind, *, seed: int = 0) -> Score:
    """Choose the penalty by five-fold cross-validation on `train`, fit on all of it, score on `test`.

    Args:
        train, test: rows; their clips must differ.
        kind: `class` gives accuracy; `number` gives R2, 1 - squared errors / squared distances to the mean of
            `train`, each summed over all rows and the k targets (which are of one unit).
        seed: of the resampling and of the folds.

    Raises:
        ValueError: fewer than two clips to train on, or one class only.
    """
    codes = _Codes(train.target, kind)
    missed, errors = np.zeros(len(PENALTIES)), np.zeros(len(PENALTIES))
    for inner, held in _folds(train, seed):
        y = torch.from_numpy(codes(held.target))
        guesses = [predict(held.features) for predict in _fit(inner.features, codes(inner.target))]
        missed += [_parts(guess, held, codes)[0].sum() for guess in guesses]
        errors += [float((guess - y).square().sum()) for guess in guesses]
    best = int(np.lexsort((errors, missed))[0])  # accuracy on few clips is a staircase: among equals the smaller error
    predict = _fit(train.features, codes(train.target), (PENALTIES[best],))[0]
    return _with_interval(predict(test.features), test, codes, seed, PENALTIES[best])


def prior_score(train: Table, test: Table, kind: Kind, *, seed: int = 0) -> Score:
    """What is reached without looking: the commonest class, or the mean."""
    codes = _Codes(train.target, kind)
    guess = torch.from_numpy(codes.mean).expand(len(test), -1)
    return _with_interval(guess, test, codes, seed, None)


class _Codes:
    """Targets as numbers [n k]: one-hot classes, or the numbers themselves; and their mean where we fit."""

    def __init__(self, target: Target, kind: Kind) -> None:
        self.classes = np.unique(target) if kind == "class" else None
        if self.classes is not None and len(self.classes) < 2:
            raise ValueError(f"all rows to train on are of one class ({self.classes[0]!r}); nothing can be read out")
        self.mean = self(target).mean(0)

    def __call__(self, target: Target) -> Float[ndarray, "n k"]:
        if self.classes is not None:
            return (target[:, None] == self.classes).astype(np.float64)
        return target.astype(np.float64).reshape(len(target), -1)


def _folds(table: Table, seed: int) -> Iterator[tuple[Table, Table]]:
    """Five times four fifths of the clips and the last one, of at most so many rows as the choice needs."""
    clips = np.unique(table.clip)
    if len(clips) < 2:
        raise ValueError(f"a readout needs at least 2 clips to train on, got {len(clips)}")
    clips = generator(seed, "readout folds").permutation(clips)
    clips = clips[: max(FOLDS, round(len(clips) * min(1, FOLD_ROWS / len(table))))]
    for held in np.array_split(clips, min(FOLDS, len(clips))):
        inner = np.setdiff1d(clips, held)
        yield (
            table.rows(np.flatnonzero(np.isin(table.clip, inner))),
            table.rows(np.flatnonzero(np.isin(table.clip, held))),
        )


class _Linear:
    """x -> (x - mean) / std @ weight + bias."""

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
) -> list[_Linear]:
    """One ridge regression for each penalty, from a single decomposition of the smaller Gram matrix, in fp64."""
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
    return [_Linear(mean, std, weight, bias) for weight in weights]


def _moments(features: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    for part in features.split(CHUNK):
        total += part.double().sum(0)
    mean, square = total / len(features), torch.zeros_like(total)
    for part in features.split(CHUNK):
        square += (part.double() - mean).square().sum(0)
    std = (square / len(features)).sqrt()
    # A feature that never changes says nothing; dividing by its rounding error would make it shout.
    return mean, torch.where(std > 1e-6 * std.max().clamp(min=1e-12), std, torch.inf)


def _parts(
    guess: Float[Tensor, "n k"], table: Table, codes: _Codes
) -> tuple[Float[ndarray, " c"], Float[ndarray, " c"]]:
    """What was missed and what there was to get, for each of c clips, summed over its rows.

    A class: misses and rows. A number: squared errors, and squared distances to the mean of the rows to fit on.
    """
    if codes.classes is not None:
        missed = (codes.classes[guess.argmax(1).numpy()] != table.target).astype(float)
        whole = np.ones_like(missed)
    else:
        y = codes(table.target)
        missed, whole = np.square(guess.numpy() - y).sum(1), np.square(y - codes.mean).sum(1)
    _, place = np.unique(table.clip, return_inverse=True)
    return np.bincount(place, missed), np.bincount(place, whole)


def _value(missed: Float[ndarray, " c"], whole: Float[ndarray, " c"]) -> float:
    """1 - missed / whole: accuracy, or R2."""
    return float(1 - missed.sum() / whole.sum()) if whole.sum() > 0 else float("nan")


def _with_interval(guess: Float[Tensor, "n k"], test: Table, codes: _Codes, seed: int, penalty: float | None) -> Score:
    missed, whole = _parts(guess, test, codes)
    clips = len(missed)
    draws = generator(seed, "readout interval").integers(0, clips, (1000, clips))
    values = [_value(missed[draw], whole[draw]) for draw in draws]
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Score(_value(missed, whole), float(low), float(high), len(test), clips, penalty)


def wilson(share: float, count: int) -> list[float]:
    """95 % interval of a share of `count` (Wilson, 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return [middle - half, middle + half]
