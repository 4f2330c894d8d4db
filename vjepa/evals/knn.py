"""What lies near in feature space: a vote of neighbours, and a page of clips that are like a video.

    vjepa eval knn MODEL SHARDS --label shape --out knn.json
    vjepa eval knn MODEL SHARDS --query video.mp4 --out nearest.html

n clips, D channels. Features are the mean over all tokens, less the mean of the corpus, of length 1: then the product
of two is the cosine of their angle.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from numpy import ndarray
from torch import Tensor

from vjepa.atomic import check_free, new_file
from vjepa.evals.embed import reduce_tokens
from vjepa.evals.features import EncoderReader, PixelReader, Reader, batches, clips_for
from vjepa.evals.results import about_model, score_row
from vjepa.evals.ridge import wilson
from vjepa.viz import plots
from vjepa.weights.load import load_encoder
from vjepa.weights.weights import Part, random_encoder
from vjepa_data import html
from vjepa_data.evaluation.clips import EvalClips
from vjepa_data.evaluation.video_files import FileVideos
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

# DINO's (arXiv:2104.14294): 20 neighbours, votes weighted by exp(cosine / 0.07).
NEIGHBOURS, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Neighbourhood:
    """A corpus in feature space."""

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
    baselines: bool = False,
    part: Part = "target",
    seed: int = 0,
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
        baselines: ask the neighbours in the features of the encoder before training, and in pixels, too.
        part: whose features, where `model` is a run or a checkpoint.
        seed: of the encoder before training.
        overwrite: replace an earlier result.

    Raises:
        BadInput: no such model, corpus, split or label; a place that is taken.
    """
    check_free(out, overwrite=overwrite)
    encoder = load_encoder(model, part)
    readers: dict[str, Reader] = {"pretrained": _Mean(encoder)}
    if baselines:
        readers |= {"random init": _Mean(random_encoder(encoder, seed)), "pixels": PixelReader(encoder.model)}
    clips = clips_for(encoder, shards, split=split, per_video=clips_per_video, max_videos=max_videos)
    near = read_corpus(readers, clips, label=label)
    labels = near["pretrained"].labels
    keep = np.array([n for n, value in enumerate(labels) if value is not None], int)
    classes, target = np.unique([str(labels[n]) for n in keep], return_inverse=True)
    if len(classes) < 2:
        raise BadInput(
            f"{shards}: label {label!r} takes {len(classes)} values in split {split!r}; give another --label"
        )
    video = np.array([number for _, number in near["pretrained"].seen])[keep]
    videos = len(np.unique(video))
    shares = {
        name: float((vote(one.features[keep], target, video, neighbours) == target).mean())
        for name, one in near.items()
    }
    shares["prior"] = float(np.bincount(target).max() / len(target))
    result = {
        "format": 1,
        "kind": "knn",
        "model": about_model(model, encoder),
        "label": label,
        "accuracy": shares["pretrained"],
        "interval": wilson(shares["pretrained"], videos),
        "prior": shares["prior"],
        "protocol": {
            "shards": str(shards),
            "report": split,
            "neighbours": neighbours,
            "clips_per_video": clips_per_video,
            "clips": len(keep),
            "interval": "Wilson's 95 % over the videos",
            "seed": seed,
        },
        "rows": [
            score_row(label, name, share, *wilson(share, videos), videos=videos) for name, share in shares.items()
        ],
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
    with FileVideos([query], px=encoder.px, frames=encoder.frames, fps=encoder.fps, workers=1) as videos:
        (answer,) = videos.read([0])
    if isinstance(answer, Refused):
        raise BadInput(f"{query}: {answer.reason} ({answer.detail}); give a video that can be decoded")
    (asked,) = answer
    clips = clips_for(encoder, shards, split=split, max_videos=max_videos)
    near = read_corpus({"pretrained": _Mean(encoder)}, clips, label=None)["pretrained"]
    feature = _Mean(encoder)(asked.frames[None])[1][0].double().numpy() - near.mean
    likeness = near.features @ (feature / np.linalg.norm(feature))
    order = np.argsort(-likeness, kind="stable")[:count]
    blocks = [_figure(f"{query.name} at {asked.start_s:.1f} s", "asked for", asked.frames)]
    for place in order:
        key, video = near.seen[place]
        (clip,) = clips.read(video)
        blocks.append(_figure(f"{key} at {clip.start_s:.1f} s", f"{likeness[place]:.3f}", clip.frames))
    text = html.render(
        "Nearest clips",
        f"{len(order)} of {len(near.seen)} clips of {shards} ({split}), by the cosine of their features",
        [],
        [html.Section("Asked for", "", blocks[0]), html.Section("Found", "", "".join(blocks[1:]))],
    )
    with new_file(out, overwrite=overwrite) as beside:
        beside.write_text(text)
    return [(near.seen[place][0], float(likeness[place])) for place in order]


def read_corpus(readers: Mapping[str, Reader], clips: EvalClips, *, label: str | None) -> dict[str, Neighbourhood]:
    """Where the clips of a corpus lie for each reader; each clip is decoded once.

    Raises:
        BadInput: no sample has that label.
    """
    features: dict[str, list[ndarray]] = {name: [] for name in readers}
    seen, labels = [], []
    for group in batches(clips, 8):
        frames = torch.stack([clip.frames for clip in group])
        for name, reader in readers.items():
            features[name].append(reader(frames)[1].double().numpy())
        seen += [(clip.key, clip.video) for clip in group]
        labels += [clip.labels.get(label) if label else None for clip in group]
    if label and all(value is None for value in labels):
        raise BadInput(
            f"no label {label!r} on any of {len(seen)} clips; see the report.html of the corpus for its labels"
        )
    return {name: _centred(np.concatenate(parts), tuple(seen), tuple(labels)) for name, parts in features.items()}


def _centred(every: Float[ndarray, "n D"], seen: tuple[tuple[str, int], ...], labels: tuple[Any, ...]) -> Neighbourhood:
    mean = every.mean(0)
    every = every - mean
    return Neighbourhood(seen, labels, every / np.linalg.norm(every, axis=1, keepdims=True).clip(1e-12), mean)


class _Mean(EncoderReader):
    """A clip is the mean of all its tokens."""

    @torch.no_grad()
    def __call__(self, frames: UInt8[Tensor, "B T H W C"]) -> tuple[Float[Tensor, "B t h w D"], Float[Tensor, "B D"]]:
        tokens = self.encoder(frames.to(self.device)).cpu()
        return tokens, reduce_tokens(tokens, "clip")


def _figure(caption: str, name: str, frames: UInt8[Tensor, "T H W C"]) -> str:
    shown = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    return html.strips(caption, [(name, plots.jpeg(plots.strip(frames.numpy()[shown], height=96)))])
