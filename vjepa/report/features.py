"""Pictures of features: their three main directions as colours, compared with an untrained encoder."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from vjepa import config
from vjepa.evals.features import clips_for
from vjepa.viz import plots
from vjepa.weights.tensors import read_json
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.weights import random_encoder
from vjepa_data import html
from vjepa_data.evaluation.clips import EvalClip
from vjepa_data.evaluation.video_files import FileClip, FileVideos, find_videos
from vjepa_data.html import Section
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput

CLIPS = 3
Named = tuple[str, EvalClip | FileClip]


def features_section(encoder: VideoEncoder, clips: Sequence[Named]) -> Section:
    """Show strips of clips and of their features.

    Args:
        encoder: gives the features.
        clips: pairs of a name and a clip.
    """
    frames = torch.stack([clip.frames for _, clip in clips])
    with torch.no_grad():
        coloured = {
            "pretrained": plots.feature_colours(encoder(frames)),
            "random init": plots.feature_colours(random_encoder(encoder, 0)(frames)),
        }
    t = coloured["pretrained"].shape[1]
    shown = plots.evenly(t)
    rows = []
    for number, (name, clip) in enumerate(clips):
        tubelets = clip.frames.numpy()[:: encoder.model.tubelet_frames][:t]
        strips = [("clip", plots.jpeg(plots.strip(tubelets[shown], height=plots.STRIP_PX)))]
        for whose, colours in coloured.items():
            strips.append((whose, plots.png(plots.strip(colours[number][shown], height=plots.STRIP_PX))))
        rows.append(html.strips(f"{name} at {clip.start_s:.1f} s", strips))
    return Section(
        "Features",
        "The three main directions of the features of all tokens as red, green and blue, over time. Tokens with "
        "similar features have similar colours. The lower row shows the same encoder before training.",
        "".join(rows),
    )


def held_out_clips(run: config.Run, encoder: VideoEncoder) -> list[Named]:
    """Return a few clips that a run did not train on, if its first corpus has any.

    Raises:
        BadInput: the corpus cannot be read.
    """
    source = run.data.sources[0]
    splits = read_json(Path(source.shards) / "manifest.json").get("splits", {})
    split = next((name for name in ("val", "test") if name in splits), source.split)
    return corpus_clips(Path(source.shards), split, encoder)


def corpus_clips(shards: Path, split: str, encoder: VideoEncoder) -> list[Named]:
    """Return the first clips of a corpus.

    Raises:
        BadInput: the corpus or split is missing, or no video can be decoded.
    """
    clips = clips_for(encoder, shards, split=split, max_videos=CLIPS)
    found: list[Named] = [(clip.key, clip) for clip in islice(clips, CLIPS)]
    if not found:
        raise BadInput(f"{shards}: no video of split {split!r} can be decoded; see `vjepa verify`")
    return found


def clips_of(paths: Sequence[Path], encoder: VideoEncoder) -> list[Named]:
    """Return a few clips of files, folders of files, or a corpus.

    Raises:
        BadInput: no video is found, or none can be decoded.
    """
    corpus = next((path for path in paths if (path / "manifest.json").is_file()), None)
    if corpus is not None:
        splits = read_json(corpus / "manifest.json").get("splits", {})
        return corpus_clips(corpus, next((name for name in ("val", "test") if name in splits), "train"), encoder)
    paths = find_videos(paths)
    with FileVideos(paths, px=encoder.px, frames=encoder.frames, fps=encoder.fps, workers=1) as videos:
        found = list(islice(_decoded(paths, videos.read(range(len(paths)))), CLIPS))
    if not found:
        raise BadInput(f"none of {len(paths)} videos ({paths[0]}, ...) can be decoded; give other videos with --clips")
    return found


def _decoded(paths: Sequence[Path], answers: Iterator[list[FileClip] | Refused]) -> Iterator[Named]:
    for path, answer in zip(paths, answers, strict=True):
        if not isinstance(answer, Refused):
            yield path.name, answer[0]
