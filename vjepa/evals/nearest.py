"""A page of the clips of a corpus that are most similar to a video.

vjepa eval knn MODEL SHARDS --query video.mp4 --out nearest.html
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vjepa.atomic import check_free, new_file
from vjepa.evals.base import open_context
from vjepa.evals.features import clips_for, encode, read_features, trained_short
from vjepa.evals.knn import UnitFeatures
from vjepa.viz import plots
from vjepa.weights.load import load_encoder
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.weights import Part
from vjepa_data import html
from vjepa_data.evaluation.clips import Short
from vjepa_data.evaluation.video_files import FileClip, FileVideos
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput


@dataclass(frozen=True)
class SimilarClip:
    """A clip of the corpus and its similarity to the query."""

    key: str
    cosine: float


def nearest_page(
    model: Path,
    shards: Path,
    query: Path,
    out: Path,
    *,
    split: str = "val",
    count: int = 12,
    max_videos: int | None = None,
    short: Short | None = None,
    part: Part = "target",
    overwrite: bool = False,
) -> list[SimilarClip]:
    """Write a page of the clips of a corpus that are most similar to a video.

    Args:
        model: a run, a checkpoint, or an export.
        shards: the corpus.
        query: a video file, whose middle clip is compared.
        out: the page.
        split: split of the corpus.
        count: clips to show, at most one per video.
        max_videos: videos to compare with. The default is all.
        short: treatment of videos shorter than a clip, by default as in the model's training.
        part: which encoder of a run or checkpoint.
        overwrite: replace an earlier page.

    Returns:
        The clips on the page, the most similar first.

    Raises:
        BadInput: the model, corpus or split is unknown, `query` is unreadable or too short, or `out` exists.
    """
    check_free(out, overwrite=overwrite)
    encoder = load_encoder(model, part)
    asked = _read_query(query, encoder, short or trained_short(encoder))
    with open_context(out) as context:
        encoder.to(context.world.device)
        clips = clips_for(encoder, shards, split=split, max_videos=max_videos, short=short)
        read = read_features({"pretrained": encoder}, shards, clips, context, pooling="clip", tokens=False)
        corpus = UnitFeatures.of(read.features["pretrained"].pooled)
        feature = encode(encoder, asked.frames[None], "clip").pooled[0].double().numpy() - corpus.mean
        cosines = corpus.features @ (feature / np.linalg.norm(feature))
        order = np.argsort(-cosines, kind="stable")[:count]
        if context.world.is_first:
            figures = [_figure(f"{query.name} at {asked.start_s:.1f} s", "query", asked.frames)]
            for row in order:
                (clip,) = clips.read(int(read.videos[row]))
                figures.append(_figure(f"{clip.key} at {clip.start_s:.1f} s", f"{cosines[row]:.3f}", clip.frames))
            text = html.render(
                "Nearest clips",
                f"{len(order)} of {len(read.keys)} clips of {shards} ({split}), by the cosine of their features",
                [],
                [html.Section("Query", "", figures[0]), html.Section("Nearest", "", "".join(figures[1:]))],
            )
            with new_file(out, overwrite=overwrite) as partial:
                partial.write_text(text)
    return [SimilarClip(read.keys[row], float(cosines[row])) for row in order]


def _read_query(query: Path, encoder: VideoEncoder, short: Short) -> FileClip:
    form: dict[str, Any] = {"px": encoder.px, "frames": encoder.frames, "fps": encoder.fps, "short": short}
    with FileVideos([query], workers=1, **form) as videos:
        (answer,) = videos.read([0])
    if isinstance(answer, Refused):
        raise BadInput(f"{query}: {answer.reason} ({answer.detail}); give a video that can be decoded")
    return answer[0]


def _figure(caption: str, name: str, frames: UInt8[Tensor, "T H W C"]) -> str:
    shown = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    return html.strips(caption, [(name, plots.jpeg(plots.strip(frames.numpy()[shown], height=96)))])
