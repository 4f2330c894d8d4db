"""Classification of clips by a vote of their nearest neighbours in feature space.

    vjepa eval knn MODEL SHARDS --label shape --out knn.json

Letters: n clips, D channels.

Source: 20 neighbours, votes weighted by exp(cosine / 0.07): DINO (arXiv:2104.14294).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from vjepa.evals.base import Baselines, EvaluationContext, EvaluationSettings, Result, ScoreRow
from vjepa.evals.features import clips_for, read_features
from vjepa.evals.labels import check_classes, read_class_labels
from vjepa.evals.ridge import wilson
from vjepa.weights.world_model import WorldModel
from vjepa_data.settings import BadInput

NEIGHBOURS, TEMPERATURE = 20, 0.07

CHUNK = 1024  # clips whose cosines with all other clips are in memory together


class KnnSettings(EvaluationSettings):
    """Settings of the vote of nearest neighbours. Each clip is classified once, and all other clips may vote."""

    label: str
    """Label to predict: a word, a whole number or a boolean."""

    neighbours: int = Field(default=NEIGHBOURS, ge=1)
    """Number of neighbours that vote."""

    clips_per_video: int = Field(default=1, ge=1)
    """Clips of each video. Clips of the same video do not vote for each other."""

    baselines: bool = False
    """Evaluate an untrained encoder and pixels too."""

    def wanted_baselines(self) -> Baselines:
        return Baselines((self.seed,), pixels=True) if self.baselines else Baselines()


@dataclass(frozen=True)
class UnitFeatures:
    """Features of length 1 around the mean of a corpus, so that the product of two is the cosine of their angle."""

    features: Float[ndarray, "n D"]
    mean: Float[ndarray, " D"]

    @classmethod
    def of(cls, pooled: Float[Tensor, "n D"]) -> "UnitFeatures":
        """Subtract the mean and normalise."""
        values = pooled.double().numpy()
        mean = values.mean(0)
        values = values - mean
        return cls(values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12), mean)


def evaluate(model: WorldModel, data: Path, settings: KnnSettings, context: EvaluationContext) -> Result:
    """Measure how often the nearest clips of other videos predict a label.

    Raises:
        BadInput: the split or label is unknown, or the label has one value.
    """
    split, label = settings.split, settings.label
    classes = read_class_labels(data, split, label)
    check_classes(f"{data}, split {split!r}", label, list(classes.values()))
    form: dict[str, Any] = {"per_video": settings.clips_per_video, "max_videos": settings.max_videos}
    form["short"] = settings.short
    clips = clips_for(model, data, split=split, **form)
    read = read_features(context.encoders(model), data, clips, context, pooling="clip", tokens=False)
    keep = np.array([row for row, key in enumerate(read.keys) if key in classes], int)
    names, target = np.unique([classes[read.keys[row]] for row in keep], return_inverse=True)
    if len(names) < 2:
        raise BadInput(f"{data}: label {label!r} has {len(names)} values in split {split!r}; give another --label")
    video = read.videos[keep]
    videos = len(np.unique(video))
    shares = {}
    for name, corpus in context.track(list(read.features.items()), "vote"):
        features = UnitFeatures.of(corpus.pooled).features[keep]
        shares[name] = float((vote(features, target, video, settings.neighbours) == target).mean())
    shares["prior"] = float(np.bincount(target).max() / len(target))
    protocol = {
        "shards": str(data),
        "report": split,
        "neighbours": settings.neighbours,
        "clips_per_video": settings.clips_per_video,
        "clips": len(keep),
        "short_videos": clips.short_videos,
        "interval": "Wilson's 95 % over the videos",
        "seed": settings.seed,
    }
    rows = [ScoreRow.accuracy(label, name, share, videos) for name, share in shares.items()]
    details = {
        "label": label,
        "accuracy": shares["pretrained"],
        "interval": wilson(shares["pretrained"], videos),
        "prior": shares["prior"],
    }
    return Result(protocol, rows, details)


def vote(
    features: Float[ndarray, "n D"], target: Int[ndarray, " n"], video: Shaped[ndarray, " n"], neighbours: int
) -> Int[ndarray, " n"]:
    """Predict the class of each clip by the vote of the nearest clips of other videos.

    The weight of a vote is exp(cosine / temperature).
    """
    predicted = np.zeros(len(target), int)
    for start in range(0, len(target), CHUNK):
        rows = slice(start, start + CHUNK)
        cosines = features[rows] @ features.T
        cosines[video[rows, None] == video[None, :]] = -np.inf
        count = min(neighbours, len(target) - 1)
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weight = np.exp(np.take_along_axis(cosines, nearest, 1) / TEMPERATURE)
        votes = np.zeros((len(cosines), target.max() + 1))
        np.add.at(votes, (np.arange(len(cosines))[:, None], target[nearest]), weight)
        predicted[rows] = votes.argmax(1)
    return predicted
