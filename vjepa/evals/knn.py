"""What lies near in feature space: a vote of neighbours, and a page of clips that are like a video.

    vjepa eval knn MODEL SHARDS --label shape --out knn.json
    vjepa eval knn MODEL SHARDS --query video.mp4 --out nearest.html

n clips, D channels. Features are the mean over all tokens, less the mean of the corpus, of length 1: then the product
of two is the cosine of their angle.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from vjepa.evals.clips import EvalClip, EvalClips
from vjepa.evals.embed import reduce_tokens
from vjepa.evals.features import batches
from vjepa.evals.files import FileClip, file_clips
from vjepa.evals.readout import wilson
from vjepa.output import check_free, new_file
from vjepa.release.native import VideoEncoder
from vjepa.release.read import Part, load_encoder
from vjepa.report import page, pictures
from vjepa_data.settings import BadInput
from vjepa_data.video import Refused

log = logging.getLogger(__name__)

# DINO's (arXiv:2104.14294): 20 neighbours, votes weighted by exp(cosine / 0.07).
NEIGHBOURS, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Near:
    """A corpus in feature space."""

    clips: EvalClips
    seen: tuple[tuple[str, int], ...]
    """Key and number of the video of each clip."""
    labels: tuple[Any, ...]
    features: Float[ndarray, "n D"]
    """Of length 1, about the mean."""
    mean: Float[ndarray, " D"]


def knn(
    model: Path,
    shards: Path,
    *,
    label: str,
    out: Path,
    split: str = "val",
    neighbours: int = NEIGHBOURS,
    clips_per_video: int = 1,
    max_videos: int | None = None,
    part: Part = "target",
    overwrite: bool = False,
) -> dict[str, Any]:
    """How often the nearest clips of other videos are right about a label.

    Args:
        model: a run, a checkpoint, or an export.
        shards: a corpus whose samples carry `label`.
        label: its name.
        out: where to write the result as JSON.
        split: which part of the corpus; every clip is asked about once, with all others voting.
        neighbours: how many vote.
        clips_per_video: clips of each video; those of the same video have no vote.
        max_videos: at most so many.
        part: whose features, where `model` is a run or a checkpoint.
        overwrite: replace an earlier result.

    Raises:
        BadInput: no such model, corpus, split or label; a place that is taken.
    """
    check_free(out, overwrite=overwrite)
    encoder = load_encoder(model, part)
    near = read_corpus(encoder, shards, split=split, label=label, per_video=clips_per_video, max_videos=max_videos)
    keep = np.array([n for n, value in enumerate(near.labels) if value is not None], int)
    classes, target = np.unique([str(near.labels[n]) for n in keep], return_inverse=True)
    if len(classes) < 2:
        raise BadInput(
            f"{shards}: label {label!r} takes {len(classes)} values in split {split!r}; give another --label"
        )
    video = np.array([number for _, number in near.seen])[keep]
    right = vote(near.features[keep], target, video, neighbours) == target
    result = {
        "format": 1,
        "kind": "knn",
        "model": {"path": str(model)},
        "label": label,
        "accuracy": float(right.mean()),
        "interval": wilson(float(right.mean()), len(np.unique(video))),
        "prior": float(np.bincount(target).max() / len(target)),
        "protocol": {"shards": str(shards), "split": split, "neighbours": neighbours, "clips": len(keep)},
    }
    with new_file(out, overwrite=overwrite) as beside:
        beside.write_text(json.dumps(result, indent=2) + "\n")
    return result


def vote(
    features: Float[ndarray, "n D"], target: Int[ndarray, " n"], video: Shaped[ndarray, " n"], neighbours: int
) -> Int[ndarray, " n"]:
    """What the nearest clips of other videos say of each clip; a vote weighs exp(cosine / temperature)."""
    answers = np.zeros(len(target), int)
    for start in range(0, len(target), 1024):
        rows = slice(start, start + 1024)
        likeness = features[rows] @ features.T
        likeness[video[rows, None] == video[None, :]] = -np.inf
        count = min(neighbours, len(target) - 1)
        nearest = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
        weight = np.exp(np.take_along_axis(likeness, nearest, 1) / TEMPERATURE)
        votes = np.zeros((len(likeness), target.max() + 1))
        np.add.at(votes, (np.arange(len(likeness))[:, None], target[nearest]), weight)
        answers[rows] = votes.argmax(1)
    return answers


def nearest_page(
    model: Path,
    shards: Path,
    query: Path,
    out: Path,
    *,
    split: str = "val",
    count: int = 12,
    max_videos: int | None = None,
    part: Part = "target",
    overwrite: bool = False,
) -> list[tuple[str, float]]:
    """Write a page of the clips of a corpus that are most like a video.

    Args:
        model: a run, a checkpoint, or an export.
        shards: the corpus.
        query: a video file; its middle clip is compared.
        out: the page.
        split: which part of the corpus.
        count: clips to show, one of each video at most.
        max_videos: videos to compare with, at most.
        part: whose features, where `model` is a run or a checkpoint.
        overwrite: replace an earlier page.

    Returns:
        Keys and cosines, the nearest first.

    Raises:
        BadInput: no such model, corpus or split; `query` is no video, or too short; a place that is taken.
    """
    check_free(out, overwrite=overwrite)
    encoder = load_encoder(model, part)
    try:
        (asked,) = file_clips(query, px=encoder.px, frames=encoder.frames, fps=encoder.fps)
    except Refused as refusal:
        raise BadInput(f"{query}: {refusal.reason} ({refusal.detail}); give a video that can be decoded") from None
    near = read_corpus(encoder, shards, split=split, label=None, per_video=1, max_videos=max_videos)
    feature = features_of(encoder, [asked])[0] - near.mean
    likeness = near.features @ (feature / np.linalg.norm(feature))
    order = np.argsort(-likeness, kind="stable")[:count]
    blocks = [_figure(f"{query.name} at {asked.start_s:.1f} s", "asked for", asked.frames)]
    for place in order:
        key, video = near.seen[place]
        (clip,) = near.clips.read(video)
        blocks.append(_figure(f"{key} at {clip.start_s:.1f} s", f"{likeness[place]:.3f}", clip.frames))
    text = page.render(
        "Nearest clips",
        f"{len(order)} of {len(near.seen)} clips of {shards} ({split}), by the cosine of their features",
        [],
        [page.Section("Asked for", "", blocks[0]), page.Section("Found", "", "".join(blocks[1:]))],
    )
    with new_file(out, overwrite=overwrite) as beside:
        beside.write_text(text)
    return [(near.seen[place][0], float(likeness[place])) for place in order]


def read_corpus(
    encoder: VideoEncoder, shards: Path, *, split: str, label: str | None, per_video: int, max_videos: int | None
) -> Near:
    """Encode a corpus.

    Raises:
        BadInput: no such corpus or split, or no sample with that label.
    """
    clips = EvalClips(
        shards, split=split, px=encoder.px, frames=encoder.frames, fps=encoder.fps,
        per_video=per_video, max_videos=max_videos,
    )  # fmt: skip
    features, seen, labels = [], [], []
    for group in batches(clips, 8):
        features.append(features_of(encoder, group))
        seen += [(clip.key, clip.video) for clip in group]
        labels += [clip.labels.get(label) if label else None for clip in group]
    if label and all(value is None for value in labels):
        raise BadInput(f"{shards}: no label {label!r} in split {split!r}; see its report.html for those it has")
    every = np.concatenate(features)
    mean = every.mean(0)
    every = every - mean
    return Near(clips, tuple(seen), tuple(labels), every / np.linalg.norm(every, axis=1, keepdims=True), mean)


@torch.no_grad()
def features_of(encoder: VideoEncoder, clips: Sequence[EvalClip] | Sequence[FileClip]) -> Float[ndarray, "B D"]:
    """The mean over all tokens of each clip."""
    return reduce_tokens(encoder(torch.stack([clip.frames for clip in clips])), "clip").double().numpy()


def _figure(caption: str, name: str, frames: torch.Tensor) -> str:
    shown = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    return page.strips(caption, [(name, pictures.jpeg(pictures.strip(frames.numpy()[shown], height=96)))])
