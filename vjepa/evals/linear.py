"""What frozen features are worth: linear readouts beside what they must beat.

    vjepa eval probe MODEL SHARDS --out probe.json

The same clips, the same rows and the same ridge regression for each line of the table: the encoder, the encoder
before it was trained (several seeds), raw pixels, and the answer given without looking.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from vjepa.atomic import check_free, new_file
from vjepa.evals.features import EncoderReader, PixelReader, ReadClips, Reader, clips_for, read_features
from vjepa.evals.results import about_model
from vjepa.evals.ridge import Kind, Score, Table, prior_score, ridge_score
from vjepa.weights.load import load_encoder
from vjepa.weights.native import VideoEncoder
from vjepa.weights.weights import Part, random_encoder
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

# Questions to a token that lies on an object: name, kind, field of TokenLabels.
TOKEN_TASKS: tuple[tuple[str, Kind, str], ...] = (
    ("token shape", "class", "shape"),
    ("token centre", "number", "centre"),
    ("token velocity", "number", "velocity"),
    ("token direction", "class", "direction"),
)

# And to a clip's features, pooled over space but not over time.
CLIP_VELOCITY = "clip velocity"

MAX_CLASSES = 1000


def probe(
    model: Path,
    shards: Path,
    *,
    out: Path | None = None,
    split: str = "val",
    train_split: str | None = None,
    labels: Sequence[str] | None = None,
    clips_per_video: int = 3,
    max_videos: int | None = None,
    random_seeds: int = 3,
    part: Part = "target",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Probe a model with the labels of a corpus.

    Args:
        model: a run, a checkpoint, or an export.
        shards: a corpus whose samples carry labels.
        out: where to write the result as JSON; nowhere by default.
        split: the split to report on.
        train_split: the split to fit on; by default, or if it is `split`, that is cut in two by video, two thirds to
            fit and one to report, so that no video was seen in pretraining.
        labels: which labels to read out; by default all.
        clips_per_video: clips of each video, evenly spaced.
        max_videos: of each split, the first ones of a fixed shuffle.
        random_seeds: untrained encoders to compare with.
        part: whose features, where `model` is a run or a checkpoint.
        seed: of the cut, of the readouts and of their intervals.
        overwrite: replace an earlier result.

    Returns:
        What was written: `{"format", "model", "protocol", "rows": [...]}`; see `vjepa.evals.results`.

    Raises:
        BadInput: no such model or corpus, an empty split, no such label, labels that differ between the splits.
    """
    train_split = None if train_split == split else train_split
    if out is not None:
        check_free(out, overwrite=overwrite)
    encoder = load_encoder(model, part)
    readers = _readers(encoder, random_seeds, seed)
    seen = {}
    for name in dict.fromkeys((train_split or split, split)):
        clips = clips_for(encoder, shards, split=name, per_video=clips_per_video, max_videos=max_videos)
        log.info("%s: %d clips of %d videos of split %s", model, len(clips), clips.videos, name)
        seen[name] = read_features(readers, clips, encoder.model)
    train, test = _sides(seen, train_split, split, seed)
    rows = [
        row
        for task, kind, tables in _tasks(train, test, labels, str(shards))
        for row in _rows(task, kind, tables, seed)
    ]
    result = {
        "format": 1,
        "kind": "probe",
        "model": about_model(model, encoder),
        "protocol": {
            "shards": str(shards),
            "fit": train_split or f"two thirds of the videos of {split}",
            "report": split if train_split else f"one third of the videos of {split}",
            "clips_per_video": clips_per_video,
            "clips": {"fit": len(train[1]), "report": len(test[1])},
            "readout": "ridge, penalty cross-validated by video",
            "interval": "2.5 % and 97.5 % over 1,000 resamplings of the videos",
            "random_seeds": random_seeds,
            "seed": seed,
        },
        "rows": rows,
    }
    if out is not None:
        with new_file(out, overwrite=overwrite) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _readers(encoder: VideoEncoder, random_seeds: int, seed: int) -> dict[str, Reader]:
    """The encoder, and what it must beat: itself before training, and pixels."""
    untrained = {
        f"random init {number}": EncoderReader(random_encoder(encoder, seed + number)) for number in range(random_seeds)
    }
    return {"pretrained": EncoderReader(encoder), **untrained, "pixels": PixelReader(encoder.model)}


Side = tuple[ReadClips, Int[np.ndarray, " _rows"]]  # clips, and which of them


def _sides(seen: Mapping[str, ReadClips], train_split: str | None, split: str, seed: int) -> tuple[Side, Side]:
    if train_split:
        one, other = seen[train_split], seen[split]
        return (one, np.arange(len(one.keys))), (other, np.arange(len(other.keys)))
    every = seen[split]
    videos = generator(seed, "probe split").permutation(np.unique(every.videos))
    if len(videos) < 6:
        raise BadInput(f"split {split!r} has {len(videos)} videos; a probe needs 6 at least, give another --split")
    is_fit = np.isin(every.videos, videos[: len(videos) * 2 // 3])
    return (every, np.flatnonzero(is_fit)), (every, np.flatnonzero(~is_fit))


# A task's tables for each reader, to fit and to report.
Tables = dict[str, tuple[Table, Table]]


def _tasks(train: Side, test: Side, wanted: Sequence[str] | None, where: str) -> list[tuple[str, Kind, Tables]]:
    names = list(dict.fromkeys(name for labels in train[0].scalars for name in labels))
    has_tracks = len(train[0].labels.clip) > 0
    has_motion = all(np.isfinite(seen.velocity[rows]).any() for seen, rows in (train, test))
    known = names + [CLIP_VELOCITY] * has_motion + [task for task, _, _ in TOKEN_TASKS if has_tracks]
    if not known:
        raise BadInput(f"{where}: its samples carry no labels; there is nothing to probe")
    if unknown := [name for name in wanted or () if name not in known]:
        raise BadInput(f"{where}: no label {unknown[0]!r}; it has {', '.join(known)}")
    tasks = []
    for name in names:
        if (not wanted or name in wanted) and (kind := _kind(train, name)):
            tasks.append((name, kind, _clip_tables(train, test, name, where)))
    if has_motion and (not wanted or CLIP_VELOCITY in wanted):
        tasks.append((CLIP_VELOCITY, "number", _velocity_tables(train, test)))
    for name, kind, field in TOKEN_TASKS:
        if has_tracks and (not wanted or name in wanted):
            tasks.append((name, kind, _token_tables(train, test, field)))
    if not tasks:
        raise BadInput(f"{where}: none of its labels ({', '.join(known)}) takes two values or more; give other shards")
    for name, kind, tables in tasks:
        if kind == "class" and train[0] is not test[0]:
            fit, report = next(iter(tables.values()))
            if strange := sorted(set(report.target.tolist()) - set(fit.target.tolist())):
                raise BadInput(f"label {name!r} has {strange[0]!r} to report on, which is not among those to fit on")
    return tasks


def _kind(side: Side, name: str) -> Kind | None:
    """Words, truths and whole numbers are classes; a label that is always the same, or never, cannot be read out."""
    seen, rows = side
    values = {seen.scalars[row][name] for row in rows if name in seen.scalars[row]}
    if any(isinstance(value, float) for value in values):
        return "number" if len(values) > 1 else None
    return "class" if 1 < len(values) <= min(MAX_CLASSES, len(rows) // 2) else None


def _clip_tables(train: Side, test: Side, name: str, where: str) -> Tables:
    sides = []
    for seen, rows in (train, test):
        rows = np.array([row for row in rows if name in seen.scalars[row]], int)
        if not len(rows):
            raise BadInput(f"{where}: label {name!r} is on no clip to report on")
        sides.append((seen, rows, np.array([seen.scalars[row][name] for row in rows])))
    return _pooled_tables(sides)


def _velocity_tables(train: Side, test: Side) -> Tables:
    known = [(seen, rows[np.isfinite(seen.velocity[rows]).all(1)]) for seen, rows in (train, test)]
    return _pooled_tables([(seen, rows, seen.velocity[rows]) for seen, rows in known])


def _pooled_tables(
    sides: Sequence[tuple[ReadClips, Int[np.ndarray, " _rows"], Shaped[np.ndarray, "_rows ..."]]],
) -> Tables:
    """Of a side to fit and one to report: the clips, which of them, and their targets."""
    return {
        reader: tuple(
            Table(seen.features[reader].pooled[rows], target, seen.videos[rows]) for seen, rows, target in sides
        )
        for reader in sides[0][0].features
    }  # type: ignore[return-value]


def _token_tables(train: Side, test: Side, field: str) -> Tables:
    def side(seen: ReadClips, rows: Int[np.ndarray, " rows"], reader: str) -> Table:
        keep = np.flatnonzero(np.isin(seen.labels.clip, rows))
        videos = seen.videos[seen.labels.clip]
        return Table(seen.features[reader].tokens, getattr(seen.labels, field), videos).rows(keep)

    return {reader: (side(*train, reader), side(*test, reader)) for reader in train[0].features}


def _rows(task: str, kind: Kind, tables: Tables, seed: int) -> list[dict[str, Any]]:
    metric = "accuracy" if kind == "class" else "R2"
    scores = {reader: ridge_score(*pair, kind, seed=seed) for reader, pair in tables.items()}
    prior = prior_score(*tables["pixels"], kind, seed=seed)
    random = [score for reader, score in scores.items() if reader.startswith("random init")]
    lines = [("pretrained", scores["pretrained"])]
    if random:
        lines.append(("random init", _mean(random)))
    lines += [("pixels", scores["pixels"]), ("prior", prior)]
    return [
        {
            "task": task,
            "metric": metric,
            "features": name,
            **asdict(score),
            **({"seeds": [one.value for one in random]} if name == "random init" else {}),
        }
        for name, score in lines
    ]


def _mean(scores: Sequence[Score]) -> Score:
    """Mean over seeds; its interval reaches from the lowest to the highest of theirs."""
    return Score(
        float(np.mean([score.value for score in scores])),
        min(score.low for score in scores),
        max(score.high for score in scores),
        scores[0].rows,
        scores[0].clips,
    )
