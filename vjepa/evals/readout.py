"""What a linear readout finds in features: ridge regression, its penalty chosen on held-out clips, intervals by clip.

n rows (clips, or tokens of clips), d features, k targets. A class is read out by regression on its one-hot code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from vjepa_data.draws import generator

Kind = Literal["class", "number"]

# Penalties as a share of the number of rows, for features of variance 1: from none to nearly all.
PENALTIES = tuple(10.0**power for power in range(-5, 3))

CHUNK = 16384  # rows turned to float64 at a time


@dataclass(frozen=True)
class Table:
    """Rows of features with the target of each, and the clip that each comes from."""

    features: Float[Tensor, "n d"]
    target: Shaped[ndarray, " n"] | Float[ndarray, "n k"]
    """Class names or numbers: [n]; vectors: [n k]."""
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
    """Fit on `train`, choose the penalty on a fifth of its clips, refit on all, score on `test`.

    Args:
        train, test: rows; their clips must differ.
        kind: `class` gives accuracy; `number` gives R2, 1 - squared errors / squared distances to the mean of
            `train`, each summed over all rows and the k targets (which are of one unit).
        seed: of the resampling and of the held-out fifth.

    Raises:
        ValueError: fewer than two clips to train on, or one class only.
    """
    codes = _Codes(train.target, kind)
    inner, held = _hold_out(train, seed)
    path = _fit(inner.features, codes(inner.target))
    scores = [_value(*_parts(predict(held.features), held, codes)) for predict in path]
    best = int(np.argmax(scores))
    predict = _fit(train.features, codes(train.target), (PENALTIES[best],))[0]
    return _with_interval(predict(test.features), test, codes, seed, PENALTIES[best])


def prior_score(train: Table, test: Table, kind: Kind, *, seed: int = 0) -> Score:
    """What is reached without looking: the commonest class, or the mean."""
    codes = _Codes(train.target, kind)
    guess = torch.from_numpy(codes.mean).expand(len(test), -1)
    return _with_interval(guess, test, codes, seed, None)


class _Codes:
    """Targets as numbers [n k]: one-hot classes, or the numbers themselves; and their mean where we fit."""

    def __init__(self, target: ndarray, kind: Kind) -> None:
        self.classes = np.unique(target) if kind == "class" else None
        if self.classes is not None and len(self.classes) < 2:
            raise ValueError(f"all rows to train on are of one class ({self.classes[0]!r}); nothing can be read out")
        self.mean = self(target).mean(0)

    def __call__(self, target: ndarray) -> Float[ndarray, "n k"]:
        if self.classes is not None:
            return (target[:, None] == self.classes).astype(np.float64)
        return target.astype(np.float64).reshape(len(target), -1)


def _hold_out(table: Table, seed: int) -> tuple[Table, Table]:
    """A fifth of the clips, drawn by the seed, apart from the others."""
    clips = np.unique(table.clip)
    if len(clips) < 2:
        raise ValueError(f"a readout needs at least 2 clips to train on, got {len(clips)}")
    held = generator(seed, "readout hold out").permutation(clips)[: max(1, len(clips) // 5)]
    is_held = np.isin(table.clip, held)
    return table.rows(np.flatnonzero(~is_held)), table.rows(np.flatnonzero(is_held))


class _Linear:
    """x -> (x - mean) / std @ weight + bias."""

    def __init__(self, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.mean, self.std, self.weight, self.bias = mean, std, weight, bias

    def __call__(self, features: Tensor) -> Float[Tensor, "n k"]:
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


def _parts(guess: Tensor, table: Table, codes: _Codes) -> tuple[Float[ndarray, " c"], Float[ndarray, " c"]]:
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


def _with_interval(guess: Tensor, test: Table, codes: _Codes, seed: int, penalty: float | None) -> Score:
    missed, whole = _parts(guess, test, codes)
    clips = len(missed)
    draws = generator(seed, "readout interval").integers(0, clips, (1000, clips))
    values = [_value(missed[draw], whole[draw]) for draw in draws]
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Score(_value(missed, whole), float(low), float(high), len(test), clips, penalty)
