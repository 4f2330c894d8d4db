"""Linear probes of frozen features, compared with baselines.

    vjepa eval probe MODEL SHARDS --out probe.json

Each column of the table uses the same clips, rows and ridge regression: the encoder, untrained encoders of several
seeds, raw pixels, and the prior, which ignores the features.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field

from vjepa.evals.base import Baselines, EvaluationContext, EvaluationSettings, Result, ScoreRow
from vjepa.evals.features import LabelledClips, clips_for, read_features
from vjepa.evals.labels import LabelValues, Value, read_labels, scalars
from vjepa.evals.ridge import Kind, Score, Table, prior_score, ridge_score
from vjepa.weights.world_model import WorldModel
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

# Tasks of tokens that lie on an object: name, kind, field of TokenLabels.
TOKEN_TASKS: tuple[tuple[str, Kind, str], ...] = (
    ("token shape", "class", "shape"),
    ("token centre", "number", "centre"),
    ("token velocity", "number", "velocity"),
    ("token direction", "class", "direction"),
)

# The task of a clip's features, which are pooled over space but not over time.
CLIP_VELOCITY = "clip velocity"

BUILT_IN = (CLIP_VELOCITY, *(task for task, _, _ in TOKEN_TASKS))


class ProbeSettings(EvaluationSettings):
    """Settings of the linear probes."""

    train_split: str | None = None
    """Split to fit on. The default is two thirds of the videos of `split`, and one third to report on."""

    labels: tuple[str, ...] | None = None
    """Labels to predict. The default is all predictable labels. The result says which labels are left out and why."""

    clips_per_video: int = Field(default=3, ge=1)
    """Clips of each video, evenly spaced."""

    random_seeds: int = Field(default=3, ge=0)
    """Number of untrained encoders to compare with."""

    def wanted_baselines(self) -> Baselines:
        return Baselines(tuple(self.seed + number for number in range(self.random_seeds)), pixels=True)


@dataclass(frozen=True)
class ClipSubset:
    """Some of the clips of a split."""

    clips: LabelledClips
    rows: Int[np.ndarray, " rows"]

    def keep(self, is_kept: Bool[np.ndarray, " clips"]) -> "ClipSubset":
        """Return the clips of this subset that are marked among all clips of the split."""
        return ClipSubset(self.clips, self.rows[is_kept[self.rows]])


@dataclass(frozen=True)
class FitAndReport:
    """The rows of a task and an encoder, to fit on and to report on."""

    fit: Table
    report: Table


@dataclass(frozen=True)
class ProbeTask:
    """A target to predict."""

    name: str
    kind: Kind
    tables: dict[str, FitAndReport]
    """Rows by encoder."""


def evaluate(model: WorldModel, data: Path, settings: ProbeSettings, context: EvaluationContext) -> Result:
    """Fit and score a linear probe for each label of a corpus.

    Raises:
        BadInput: a split or label is unknown, a split has too few videos, or a label asked for cannot be predicted.
    """
    split = settings.split
    train_split = None if settings.train_split == split else settings.train_split
    _check_labels(data, train_split or split, split, settings.labels)
    encoders = context.encoders(model)
    read, short_videos = {}, {}
    for name in dict.fromkeys((train_split or split, split)):
        form = {"per_video": settings.clips_per_video, "max_videos": settings.max_videos}
        clips = clips_for(model, data, split=name, short=settings.short, **form)
        short_videos[name] = clips.short_videos
        log.info("%d clips of %d videos of split %s", len(clips), clips.videos, name)
        read[name] = read_features(encoders, data, clips, context)
    if train_split:
        fit, report = (ClipSubset(read[name], np.arange(len(read[name].keys))) for name in (train_split, split))
    else:
        fit, report = _cut(read[split], split, settings.seed)
    tasks, left_out = _tasks(fit, report, settings.labels, str(data))
    for name, reason in left_out.items():
        log.warning("label %r is left out: %s", name, reason)
    rows = context.share(lambda task: _score(task, settings.seed), tasks, f"fit {len(tasks)} linear probes")
    protocol = {
        "shards": str(data),
        "fit": train_split or f"two thirds of the videos of {split}",
        "report": split if train_split else f"one third of the videos of {split}",
        "clips_per_video": settings.clips_per_video,
        "clips": {"fit": len(fit.rows), "report": len(report.rows)},
        "short_videos": short_videos,
        "readout": "ridge, penalty cross-validated by video",
        "interval": "2.5 % and 97.5 % over 1,000 resamplings of the videos",
        "random_seeds": settings.random_seeds,
        "seed": settings.seed,
    }
    return Result(protocol, [row for scores in rows for row in scores], {"left_out": left_out})


def _check_labels(data: Path, train_split: str, split: str, wanted: Sequence[str] | None) -> None:
    """Reject labels that no choice of videos makes predictable, before features are computed.

    Raises:
        BadInput: a split is missing, or a wanted label is missing or cannot be predicted.
    """
    if not wanted:
        return
    found = {name: list(map(scalars, read_labels(data, name).values())) for name in {train_split, split}}
    fit, report = found[train_split], found[split]
    for name in wanted:
        if name in BUILT_IN:
            continue
        known = {key for labels in (*fit, *report) for key in labels}
        if name not in known:
            others = ", ".join([*sorted(known), *BUILT_IN])
            raise BadInput(f"{data}: no label {name!r} with words or numbers; use {others}")
        values = LabelValues(*([labels[name] for labels in part if name in labels] for part in (fit, report)))
        if (kind := values.kind()) not in ("class", "number"):
            raise BadInput(f"{data}: label {name!r} cannot be predicted: {kind}; give other --labels, or more videos")


def _cut(clips: LabelledClips, split: str, seed: int) -> tuple[ClipSubset, ClipSubset]:
    """Cut a split by video: two thirds to fit on and one third to report on."""
    videos = generator(seed, "probe split").permutation(np.unique(clips.videos))
    if len(videos) < 6:
        raise BadInput(f"split {split!r} has {len(videos)} videos; a probe needs at least 6, give another --split")
    is_fit = np.isin(clips.videos, videos[: len(videos) * 2 // 3])
    return ClipSubset(clips, np.flatnonzero(is_fit)), ClipSubset(clips, np.flatnonzero(~is_fit))


def _tasks(
    fit: ClipSubset, report: ClipSubset, wanted: Sequence[str] | None, where: str
) -> tuple[list[ProbeTask], dict[str, str]]:
    """Return the tasks, and the reason of each label that is left out.

    Raises:
        BadInput: a wanted label cannot be predicted, or none can.
    """
    names = list(dict.fromkeys(name for part in (fit, report) for labels in part.clips.scalars for name in labels))
    has_tracks = len(fit.clips.labels.clip) > 0
    has_motion = all(np.isfinite(part.clips.velocity[part.rows]).any() for part in (fit, report))
    known = names + [CLIP_VELOCITY] * has_motion + [task for task, _, _ in TOKEN_TASKS if has_tracks]
    if not known:
        raise BadInput(f"{where}: its samples have no labels to predict; give a corpus with labels")
    if unknown := [name for name in wanted or () if name not in known]:
        raise BadInput(f"{where}: no label {unknown[0]!r}; use {', '.join(known)}")
    tasks: list[ProbeTask] = []
    left_out: dict[str, str] = {}
    for name in names:
        if not wanted or name in wanted:
            kind = _kind(fit, report, name)
            if kind in ("class", "number"):
                tasks.append(ProbeTask(name, kind, _clip_tables(fit, report, name)))
            elif wanted:
                raise BadInput(f"{where}: label {name!r} {kind}; give other --labels, or more videos")
            else:
                left_out[name] = kind
    if has_motion and (not wanted or CLIP_VELOCITY in wanted):
        tasks.append(ProbeTask(CLIP_VELOCITY, "number", _velocity_tables(fit, report)))
    for name, kind, field in TOKEN_TASKS:
        if has_tracks and (not wanted or name in wanted):
            tasks.append(ProbeTask(name, kind, _token_tables(fit, report, field)))
    if not tasks:
        reasons = "; ".join(f"{name!r} {reason}" for name, reason in list(left_out.items())[:3])
        raise BadInput(f"{where}: none of its labels ({', '.join(known)}) can be predicted: {reasons}; choose others")
    return tasks, left_out


def _kind(fit: ClipSubset, report: ClipSubset, name: str) -> Kind | str:
    """Return the kind of a label, or the reason why it cannot be predicted."""
    found = LabelValues(*(list(_values_by_video(part, name).values()) for part in (fit, report)))
    kind = found.kind()
    if kind == "class" and (unseen := found.unseen()):
        if fit.clips is not report.clips:
            return f"has class {min(unseen)!r} only in the videos to report on"
        log.info("label %r: %d videos to report on have a class that was not fitted", name, unseen.total())
    return kind if kind in ("class", "number") else f"cannot be predicted: {kind}"


def _values_by_video(part: ClipSubset, name: str) -> dict[int, Value]:
    scalars = part.clips.scalars
    return {int(part.clips.videos[row]): scalars[row][name] for row in part.rows if name in scalars[row]}


def _clip_tables(fit: ClipSubset, report: ClipSubset, name: str) -> dict[str, FitAndReport]:
    fit, report = (part.keep(np.array([name in labels for labels in part.clips.scalars])) for part in (fit, report))
    kinds = {type(part.clips.scalars[row][name]) for part in (fit, report) for row in part.rows}
    are_words = str in kinds or (bool in kinds and len(kinds) > 1)

    def target(part: ClipSubset) -> np.ndarray:
        values = [part.clips.scalars[row][name] for row in part.rows]
        return np.array(list(map(str, values)) if are_words else values)

    return _pooled_tables(fit, report, target)


def _velocity_tables(fit: ClipSubset, report: ClipSubset) -> dict[str, FitAndReport]:
    fit, report = (part.keep(np.array(np.isfinite(part.clips.velocity).all(1))) for part in (fit, report))
    return _pooled_tables(fit, report, lambda part: part.clips.velocity[part.rows])


def _pooled_tables(
    fit: ClipSubset, report: ClipSubset, target: Callable[[ClipSubset], np.ndarray]
) -> dict[str, FitAndReport]:
    """Return the pooled features and targets of the clips to fit on and to report on, by encoder."""

    def table(part: ClipSubset, encoder: str) -> Table:
        return Table(part.clips.features[encoder].pooled[part.rows], target(part), part.clips.videos[part.rows])

    return {name: FitAndReport(table(fit, name), table(report, name)) for name in fit.clips.features}


def _token_tables(fit: ClipSubset, report: ClipSubset, field: str) -> dict[str, FitAndReport]:
    """Return the features and targets of the labelled tokens, by encoder."""

    def table(part: ClipSubset, encoder: str) -> Table:
        clips, labels = part.clips, part.clips.labels
        keep = np.flatnonzero(np.isin(labels.clip, part.rows))
        return Table(clips.features[encoder].tokens, getattr(labels, field), clips.videos[labels.clip]).rows(keep)

    return {name: FitAndReport(table(fit, name), table(report, name)) for name in fit.clips.features}


def _score(task: ProbeTask, seed: int) -> list[ScoreRow]:
    scores = {name: ridge_score(one.fit, one.report, task.kind, seed=seed) for name, one in task.tables.items()}
    untrained = [score for name, score in scores.items() if name.startswith("random init")]
    pixels = task.tables["pixels"]
    columns = {"pretrained": scores["pretrained"]}
    if untrained:
        columns["random init"] = _mean(untrained)
    columns |= {"pixels": scores["pixels"], "prior": prior_score(pixels.fit, pixels.report, task.kind, seed=seed)}
    rows = []
    for name, score in columns.items():
        extra = {"rows": score.rows, "penalty": score.penalty}
        if name == "random init":
            extra["seeds"] = [one.value for one in untrained]
        metric = "accuracy" if task.kind == "class" else "R2"
        rows.append(ScoreRow(task.name, metric, name, score.value, score.low, score.high, score.clips, extra))
    return rows


def _mean(scores: Sequence[Score]) -> Score:
    """Average the scores of several seeds. The interval covers all of their intervals."""
    return Score(
        float(np.mean([score.value for score in scores])),
        min(score.low for score in scores),
        max(score.high for score in scores),
        scores[0].rows,
        scores[0].clips,
    )
