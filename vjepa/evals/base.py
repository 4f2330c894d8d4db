"""The contract of an evaluation.

A module of `vjepa.evals.registry` defines

    class MySettings(EvaluationSettings): ...
    def evaluate(model: WorldModel, data: Path, settings: MySettings, context: EvaluationContext) -> Result: ...

`vjepa.evals.shell.run_evaluation` loads the model, makes the baselines, calls `evaluate`, and writes its result:

    {"format": 1, "kind": "probe", "model": {...}, "protocol": {...}, "rows": [
        {"task": "shape", "metric": "accuracy", "features": "pretrained", "value": 0.9, "low": 0.8, "high": 0.95,
         "clips": 24}, ...]}
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import Field

from vjepa.config import Parallel
from vjepa.distributed.world import World, join
from vjepa.evals.ridge import wilson
from vjepa.progress import track
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.world_model import WorldModel
from vjepa_data.evaluation.clips import Short
from vjepa_data.settings import BadInput, Settings

FORMAT = 1

TIMEOUT_S = 86400.0
"""Ranks wait only for the last videos of the slowest rank, which may take hours."""
PATIENT = Parallel(timeout_s=TIMEOUT_S)

CACHE = ".vjepa-features"

RANDOM = "random init"
"""Name of untrained networks in result rows, followed by a number if there are several."""

T = TypeVar("T")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Baselines:
    """The encoders that a trained encoder is compared with."""

    untrained_seeds: tuple[int, ...] = ()
    """Seeds of encoders of the same shape with initial weights."""
    pixels: bool = False
    """Evaluate raw pixels as features, too."""


class CommonSettings(Settings):
    """The settings of every evaluation. Field docstrings are the help texts of the command line."""

    seed: int = Field(default=0, ge=0)
    """Seed of the evaluation."""

    def wanted_baselines(self) -> Baselines:
        """Return the baselines that the shell makes before `evaluate` is called."""
        return Baselines()


class EvaluationSettings(CommonSettings):
    """The settings of an evaluation on a corpus."""

    split: str = "val"
    """Split to report on."""

    max_videos: int | None = Field(default=None, ge=1)
    """Number of videos of each split, the first of a fixed shuffle. The default is all."""

    short: Short | None = None
    """Treatment of videos shorter than a clip: `leave_out`, or `hold` to repeat their last frame. The default is that
    of the model's training."""


@dataclass(frozen=True)
class ScoreRow:
    """A score with its interval."""

    task: str
    metric: str
    features: str
    """`pretrained`, `random init`, `pixels`, `prior`, or another name that tells columns of a table apart."""
    value: float
    low: float
    high: float
    clips: int
    """Number of independent clips or videos behind the score."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the JSON row, for instance the scores of several `seeds`."""

    @classmethod
    def accuracy(cls, task: str, features: str, share: float, videos: int) -> "ScoreRow":
        """Return a row for a share of videos, with Wilson's 95 % interval."""
        low, high = wilson(share, videos)
        return cls(task, "accuracy", features, share, low, high, videos)

    @property
    def uncertainty(self) -> str:
        """The standard deviation over seeds if there are several, otherwise the interval."""
        if seeds := self.extra.get("seeds"):
            return f"±{np.std(seeds):.3f} ({len(seeds)} seeds)"
        return f"[{self.low:.3f} {self.high:.3f}]"

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written to the result file."""
        return {name: getattr(self, name) for name in ROW_FIELDS} | dict(self.extra)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "ScoreRow":
        """Read a row of a result file."""
        extra = {name: value for name, value in row.items() if name not in ROW_FIELDS}
        return cls(**{name: row[name] for name in ROW_FIELDS}, extra=extra)


ROW_FIELDS = tuple(one.name for one in fields(ScoreRow) if one.name != "extra")


def join_seeds(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Join the rows of untrained models of several seeds for a score: their mean, and all values."""
    joined: dict[tuple[str, str, str], list[ScoreRow]] = {}
    for row in rows:
        features = RANDOM if row.features.startswith(RANDOM) else row.features
        joined.setdefault((row.task, row.metric, features), []).append(row)
    result = []
    for (_, _, features), same in joined.items():
        if features != RANDOM:
            result += same
            continue
        values = [row.value for row in same]
        bounds = {"low": min(row.low for row in same), "high": max(row.high for row in same)}
        mean = float(np.mean(values))
        result.append(replace(same[0], features=features, value=mean, extra={"seeds": values}, **bounds))
    return result


@dataclass(frozen=True)
class Result:
    """The scores of an evaluation and how they were measured."""

    protocol: Mapping[str, Any]
    """Conditions of the measurement, by name. Pages and model cards print it as a sentence."""
    rows: Sequence[ScoreRow]
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further top-level entries of the JSON file."""
    kind: str = ""
    """Name of the evaluation, which the shell fills in."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Path, part, run and step of the model, which the shell fills in."""

    @property
    def columns(self) -> list[str]:
        """Names of the features, in the order of the rows."""
        return list(dict.fromkeys(row.features for row in self.rows))

    @property
    def tasks(self) -> dict[tuple[str, str], dict[str, ScoreRow]]:
        """The rows by (task, metric), then by features."""
        cells: dict[tuple[str, str], dict[str, ScoreRow]] = {}
        for row in self.rows:
            cells.setdefault((row.task, row.metric), {})[row.features] = row
        return cells

    def value(self, task: str, features: str) -> float:
        """Return the score of a task for a kind of features."""
        return next(row.value for row in self.rows if (row.task, row.features) == (task, features))

    def to_json(self) -> dict[str, Any]:
        """Return the content of the result file."""
        rows = [row.to_json() for row in self.rows]
        head = {"format": FORMAT, "kind": self.kind, "model": dict(self.model)}
        return {**head, **self.details, "protocol": dict(self.protocol), "rows": rows}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Result":
        """Read the content of a result file.

        Raises:
            BadInput: an entry is missing.
        """
        try:
            rows = [ScoreRow.from_json(row) for row in content["rows"]]
            known = {"format", "kind", "model", "protocol", "rows"}
            details = {name: value for name, value in content.items() if name not in known}
            return cls(content["protocol"], rows, details, content["kind"], content.get("model", {}))
        except (KeyError, TypeError) as error:
            raise BadInput(f"invalid evaluation result: {error} is missing; run `vjepa eval` again") from None


@dataclass(frozen=True)
class EvaluationContext:
    """The surroundings of an evaluation: its processes, its cache, its baselines and its progress."""

    world: World
    """All ranks of the evaluation. `evaluate` runs on each of them and returns the same result."""
    cache: Path
    """Folder for intermediate results, shared by all evaluations whose results are in the same folder."""
    out: Path | None = None
    """The result file, if it is written. Further files of the evaluation are named after it."""
    overwrite: bool = False
    """Replace files of an earlier result."""
    untrained: Sequence[VideoEncoder] = ()
    """An encoder for each seed of `Baselines.untrained_seeds`."""
    pixels: VideoEncoder | None = None
    """Raw pixels behind the interface of an encoder, if `Baselines.pixels`."""

    def encoders(self, model: WorldModel) -> dict[str, VideoEncoder]:
        """Return the encoder of the model and its baselines under the names that result rows use."""
        found = {"pretrained": model.encoder}
        for number, encoder in enumerate(self.untrained):
            found[RANDOM if len(self.untrained) == 1 else f"{RANDOM} {number}"] = encoder
        return found | ({"pixels": self.pixels} if self.pixels is not None else {})

    def track(self, items: Sequence[T], text: str) -> Iterable[T]:
        """Yield the items and show progress on the first rank."""
        return track(items, text, len(items), show=self.world.is_first)

    def share(self, function: Callable[[T], Answer], items: Sequence[T], text: str) -> list[Answer]:
        """Call a function for each item, shared among the ranks, and return all answers in order."""
        own = range(self.world.rank, len(items), self.world.size)
        answers = {number: function(items[number]) for number in self.track(own, text)}
        every = {number: answer for found in self.world.gather(answers) for number, answer in found.items()}
        return [every[number] for number in range(len(items))]


@contextmanager
def open_context(out: Path | None, *, overwrite: bool = False) -> Iterator[EvaluationContext]:
    """Join the ranks and open the feature cache: in the folder of `out`, or temporary if nothing is written."""
    with join(PATIENT) as world:
        if out is not None:
            yield EvaluationContext(world, out.absolute().parent / CACHE, out, overwrite)
            return
        folder = tempfile.TemporaryDirectory(prefix="vjepa-eval-") if world.is_first else None
        try:
            yield EvaluationContext(world, Path(world.gather(folder and folder.name)[0] or ""))
        finally:
            if folder is not None:
                folder.cleanup()
