"""Statistics of a signal's columns over the train split: measured while shards are written, kept in the manifest.

A shard's commit record holds moments of its rows in float64. They are merged in the order of the shards, so the
manifest has the same bytes however often the build was interrupted.

Source of the merge: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances
(1979).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

STATISTICS_SPLIT = "train"
"""The split that is measured."""


@dataclass(frozen=True)
class SignalStatistics:
    """Statistics of the stored rows of a signal, with a number per column. An overlap of two clips counts twice."""

    rows: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]

    def of_intervals(self, *, combine: str | None, rows_per_interval: float) -> "SignalStatistics":
        """Return the scale of the rows of a clip, which are combined over the interval between two frames.

        A sum of n rows has n times their mean. Its standard deviation is n times theirs if neighbouring rows are alike,
        as actions usually are, and less otherwise. This method assumes n times. Other combinations keep the scale of a
        row.
        """
        if combine != "sum":
            return self
        mean, std, low, high = (
            tuple(rows_per_interval * x for x in each) for each in (self.mean, self.std, self.min, self.max)
        )
        return SignalStatistics(self.rows, mean, std, low, high)


def measure(rows: Float[np.ndarray, "N A"]) -> dict[str, Any]:
    """Return the moments of rows, in a form that fits into JSON."""
    wide = rows.astype(np.float64)
    mean = wide.mean(axis=0)
    return {
        "rows": len(rows),
        "mean": mean.tolist(),
        "m2": np.square(wide - mean).sum(axis=0).tolist(),
        "min": wide.min(axis=0).tolist(),
        "max": wide.max(axis=0).tolist(),
    }


def merge(first: Mapping[str, Any] | None, second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the moments of the rows of both. None stands for no rows."""
    if first is None:
        return dict(second)
    a, b = first["rows"], second["rows"]
    mean_a, mean_b, m2_a, m2_b = (np.array(each[name]) for name in ("mean", "m2") for each in (first, second))
    apart = mean_b - mean_a
    return {
        "rows": a + b,
        "mean": (mean_a + apart * (b / (a + b))).tolist(),
        "m2": (m2_a + m2_b + np.square(apart) * (a * b / (a + b))).tolist(),
        "min": np.minimum(first["min"], second["min"]).tolist(),
        "max": np.maximum(first["max"], second["max"]).tolist(),
    }


def finish(moments: Mapping[str, Any]) -> dict[str, Any]:
    """Convert moments to the entry of the manifest, with the standard deviation of the population."""
    std = [math.sqrt(max(0.0, m2) / moments["rows"]) for m2 in moments["m2"]]
    return {"rows": moments["rows"], "mean": moments["mean"], "std": std, "min": moments["min"], "max": moments["max"]}


def merge_records(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the statistics of each signal, if any, over the commit records of the train split.

    Records of an earlier version have no moments. A corpus with such a record has no statistics.
    """
    merged: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["split"] != STATISTICS_SPLIT:
            continue
        if "signals" not in record:
            return {}
        for name, moments in record["signals"].items():
            merged[name] = merge(merged.get(name), moments)
    return {name: finish(moments) for name, moments in sorted(merged.items())}


def read_statistics(values: Mapping[str, Any]) -> dict[str, SignalStatistics]:
    """Read the statistics of a manifest."""
    return {
        name: SignalStatistics(entry["rows"], *(tuple(entry[key]) for key in ("mean", "std", "min", "max")))
        for name, entry in values.items()
    }


def pool(parts: Sequence[SignalStatistics]) -> SignalStatistics:
    """Return the statistics over several corpora, each row of any of them counted once."""
    merged: dict[str, Any] | None = None
    for part in parts:
        m2 = [part.rows * std**2 for std in part.std]
        merged = merge(merged, {"rows": part.rows, "mean": part.mean, "m2": m2, "min": part.min, "max": part.max})
    assert merged is not None, "no corpus"
    return read_statistics({"": finish(merged)})[""]
