"""V-JEPA 2's attentive probe, trained on frozen tokens over a grid of learning rates and weight decays.

    vjepa eval attentive MODEL SHARDS --label shape --out probe.json

Tokens are computed once and cached, so all probes of the grid and a second call share them. Under torchrun the
ranks share first the videos, then the grid. `--baselines` trains the same grid on the tokens of an untrained encoder
and on the pixels of each token.

Letters: B clips, N tokens of a clip, D width.

Source: V-JEPA 2 (arXiv:2506.09985), frozen evaluation: 3 self-attention blocks and 1 cross-attention block, 20 probes
of which the best on the validation set is reported, several clips (segments) of each video, several views of each clip.
There are two differences. Clips are not augmented. The best probe is selected on videos that are not reported on, and
the score that the paper's selection would give is reported next to it.
"""

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from vjepa.atomic import check_free, new_file
from vjepa.evals.base import Baselines, EvaluationContext, EvaluationSettings, Result, ScoreRow
from vjepa.evals.embed import EmbedRequest, embed_parts
from vjepa.evals.features import CorpusVideos, clips_for, fingerprint
from vjepa.evals.labels import check_classes, read_class_labels
from vjepa.evals.ridge import wilson
from vjepa.nn.attentive_probe import AttentiveProbe, save_classifier
from vjepa.weights.tensors import read_json
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.world_model import WorldModel
from vjepa_data.corpus.format import read_manifest
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

CPU = torch.device("cpu")

# The score of the probe that is best on the reported videos themselves, as V-JEPA 2's tables print it.
MAX_OVER_HEADS = "pretrained, max over heads"

MIN_VIDEOS = 12


class AttentiveSettings(EvaluationSettings):
    """Settings of the attentive probe. The defaults of its training are V-JEPA 2's."""

    label: str
    """Label to predict: a word, a whole number or a boolean."""

    train_split: str | None = None
    """Split to fit on, with a fifth of its videos to select on. The default cuts `split` into a half to fit on, a sixth
    to select on and a third to report on."""

    clips_per_video: int = Field(default=2, ge=1)
    """Clips (segments) of each video, evenly spaced. Their probabilities are averaged."""

    views: int = Field(default=1, ge=1)
    """Views of each clip: 1 is the whole frame, more are squares of it. Their probabilities are averaged."""

    baselines: bool = False
    """Evaluate an untrained encoder and pixels too."""

    rates: tuple[PositiveFloat, ...] = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
    """Peak learning rates of the grid. They decay to 0 by a cosine without warm-up."""

    decays: tuple[float, ...] = (0.01, 0.1, 0.4, 0.8)
    """Weight decays of the grid, for all parameters including biases and norms."""

    epochs: PositiveInt = 20
    """Epochs of each probe."""

    batch: PositiveInt = 32
    """Clips per training step of a probe."""

    blocks: int = Field(default=3, ge=0)
    """Self-attention blocks before the query."""

    heads: PositiveInt | None = None
    """Attention heads of the probe. The default is the number in the encoder, as Hugging Face's classifier requires."""

    def wanted_baselines(self) -> Baselines:
        return Baselines((self.seed,), pixels=True) if self.baselines else Baselines()

    @property
    def grid(self) -> list[tuple[float, float]]:
        """All pairs of a learning rate and a weight decay."""
        return list(itertools.product(self.rates, self.decays))


@dataclass(frozen=True)
class EncodedClips:
    """Tokens of some clips, with the video and the class of each clip."""

    tokens: Float[np.ndarray, "all N D"]
    """Tokens of these and other clips, which may be mapped from a file."""
    place: Int[np.ndarray, " clips"]
    """Row of each clip in `tokens`."""
    video: Int[np.ndarray, " clips"]
    label: Int[np.ndarray, " clips"]

    def __len__(self) -> int:
        return len(self.label)

    def read(self, rows: Int[np.ndarray, " B"]) -> Float[Tensor, "B N D"]:
        """Return the tokens of some clips."""
        return torch.from_numpy(self.tokens[self.place[rows]]).float()


@dataclass(frozen=True)
class EncodedSplits:
    """The clips to fit, to select and to report on."""

    fit: EncodedClips
    choose: EncodedClips
    report: EncodedClips


@dataclass(frozen=True)
class GridScore:
    """Accuracies of a probe of the grid."""

    choose: float
    report: float


def fit_probe(
    clips: EncodedClips,
    classes: int,
    heads: int,
    settings: AttentiveSettings,
    *,
    rate: float,
    decay: float,
    device: torch.device = CPU,
) -> AttentiveProbe:
    """Train a probe with AdamW, a cosine to 0 and cross-entropy. All probes of a seed see the same order of clips."""
    probe = AttentiveProbe(clips.tokens.shape[-1], heads, classes, blocks=settings.blocks, seed=settings.seed)
    optimizer = torch.optim.AdamW(probe.to(device).parameters(), lr=rate, weight_decay=decay)
    order = generator(settings.seed, "attentive order")
    steps = settings.epochs * math.ceil(len(clips) / settings.batch)
    step = 0
    for _ in range(settings.epochs):
        shuffled = order.permutation(len(clips))
        for rows in np.split(shuffled, range(settings.batch, len(shuffled), settings.batch)):
            rows = np.sort(rows)  # a mapped file is read in its order
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = probe(clips.read(rows).to(device))
            F.cross_entropy(logits, torch.from_numpy(clips.label[rows]).to(device)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return probe.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(probe: AttentiveProbe, clips: EncodedClips, *, batch: int = 64) -> float:
    """Return the share of videos that are classified correctly by the mean probability over their clips."""
    groups = np.split(np.arange(len(clips)), range(batch, len(clips), batch))
    device = next(probe.parameters()).device
    probabilities = torch.cat([probe(clips.read(rows).to(device)).softmax(1).cpu() for rows in groups]).numpy()
    videos, place = np.unique(clips.video, return_inverse=True)
    total = np.zeros((len(videos), probabilities.shape[1]))
    np.add.at(total, place, probabilities)
    label = np.zeros(len(videos), int)
    label[place] = clips.label
    return float((total.argmax(1) == label).mean())


@dataclass(frozen=True)
class FittedGrid:
    """The scores of all probes of a grid, and the weights of the selected probe."""

    scores: list[GridScore]
    """Scores of each point of the grid."""
    best: int
    """Number of the selected point."""
    probe: Mapping[str, Tensor] | None
    """Weights of the selected probe on the CPU of the rank that trained it, None on other ranks."""


def fit_grid(
    splits: EncodedSplits, classes: int, heads: int, settings: AttentiveSettings, context: EvaluationContext, name: str
) -> FittedGrid:
    """Train a probe for each point of the grid, shared among the ranks.

    A rank keeps only the best of its probes and sends none, because a probe of a ViT-g has 100 million parameters.
    """
    world = context.world
    own: dict[int, GridScore] = {}
    kept: dict[str, Tensor] = {}
    numbers = range(world.rank, len(settings.grid), world.size)
    for number in context.track(numbers, f"{name}: fit {len(numbers)} probes"):
        rate, decay = settings.grid[number]
        probe = fit_probe(splits.fit, classes, heads, settings, rate=rate, decay=decay, device=world.device)
        own[number] = score = GridScore(accuracy(probe, splits.choose), accuracy(probe, splits.report))
        log.info("rate %g decay %g: accuracy %.3f to select, %.3f to report", rate, decay, score.choose, score.report)
        if _best(own) == number:
            kept = {name: tensor.cpu() for name, tensor in probe.state_dict().items()}
    scores = {number: score for found in world.gather(own) for number, score in found.items()}
    best = _best(scores)
    return FittedGrid([scores[number] for number in sorted(scores)], best, kept if best in own else None)


def _best(scores: Mapping[int, GridScore]) -> int:
    """Return the number of the best probe on the videos to select on, the first of several."""
    return max(scores, key=lambda number: (scores[number].choose, -number))


def evaluate(model: WorldModel, data: Path, settings: AttentiveSettings, context: EvaluationContext) -> Result:
    """Train the grid of probes and report the accuracy of the selected probe.

    The selected probe is written next to the result with the suffix `.safetensors`.

    Raises:
        BadInput: the split or label is unknown, there are too few videos, a reported class was not fitted, or the
            file of the probe exists.
    """
    file = None if context.out is None else context.out.with_suffix(".safetensors")
    if file is not None:
        check_free(file, overwrite=context.overwrite)
    cut = cut_videos(data, settings)
    heads = settings.heads or model.model.encoder.heads
    found: dict[str, dict[str, Any]] = {}
    probe: Mapping[str, Tensor] | None = None
    for name, encoder in context.encoders(model).items():
        splits = _encode(encoder, data, cut, settings, context)
        fitting_heads = math.gcd(heads, encoder.width)  # the width of pixels differs
        fitted = fit_grid(splits, len(cut.classes), fitting_heads, settings, context, name)
        found[name] = _findings(fitted, settings.grid, cut.classes, splits)
        if name == "pretrained":
            probe = fitted.probe
    if probe is not None and file is not None:
        with new_file(file, overwrite=context.overwrite) as partial:
            save_classifier(partial, probe, cut.classes, heads)
    baselines = {name: findings for name, findings in found.items() if name != "pretrained"}
    details = {"label": settings.label, **found["pretrained"], "baselines": baselines}
    return Result(_protocol(data, settings, cut, heads), _rows(settings.label, found), details)


# ---- the videos of each split


@dataclass(frozen=True)
class VideoSubset:
    """Some labelled videos of a split."""

    split: str
    classes: Mapping[str, int]
    """Class number of each video by key, -1 for a class that was not fitted."""


@dataclass(frozen=True)
class VideoCut:
    """The videos to fit on, to select on and to report on."""

    classes: list[str]
    fit: VideoSubset
    choose: VideoSubset
    report: VideoSubset

    @property
    def subsets(self) -> dict[str, VideoSubset]:
        return {"fit": self.fit, "choose": self.choose, "report": self.report}


def cut_videos(shards: Path, settings: AttentiveSettings) -> VideoCut:
    """Cut the labelled videos of a corpus.

    Raises:
        BadInput: the split or label is unknown, there are too few videos, or a reported class was not fitted.
    """
    split, label = settings.split, settings.label
    train_split = None if settings.train_split == split else settings.train_split
    labels = read_class_labels(shards, split, label)
    keys = _shuffled(labels, settings)
    if train_split:
        train_labels = read_class_labels(shards, train_split, label)
        train_keys = _shuffled(train_labels, settings)
        fifth = max(1, len(train_keys) // 5)
        fit, choose, report = train_keys[fifth:], train_keys[:fifth], keys
        check_classes(f"{shards}, split {train_split!r}", label, [train_labels[key] for key in train_keys])
        labels = {**train_labels, **labels}
    else:
        if len(keys) < MIN_VIDEOS:
            raise BadInput(
                f"split {split!r} has {len(keys)} labelled videos; the probe needs at least {MIN_VIDEOS}. Give another "
                "--split or a --train-split."
            )
        check_classes(f"{shards}, split {split!r}", label, [labels[key] for key in keys])
        half, two_thirds = len(keys) // 2, len(keys) * 2 // 3
        fit, choose, report = keys[:half], keys[half:two_thirds], keys[two_thirds:]
    classes = sorted({labels[key] for key in fit})
    if train_split and (unseen := sorted({labels[key] for key in report} - set(classes))):
        raise BadInput(f"label {label!r} has class {unseen[0]!r} only in the videos to report on; give more videos")
    if len(classes) < 2:
        raise BadInput(f"{shards}: all videos to fit on have the same {label!r} ({classes[0]!r}); give another label")
    number = {name: i for i, name in enumerate(classes)}

    def subset(split: str, keys: Sequence[str]) -> VideoSubset:
        return VideoSubset(split, {key: number.get(labels[key], -1) for key in keys})

    source = train_split or split
    return VideoCut(classes, subset(source, fit), subset(source, choose), subset(split, report))


def _shuffled(labels: Mapping[str, str], settings: AttentiveSettings) -> list[str]:
    """Return the keys of a split in a fixed random order, at most `max_videos` of them."""
    return generator(settings.seed, "attentive cut").permutation(sorted(labels)).tolist()[: settings.max_videos]


def _encode(
    encoder: VideoEncoder, shards: Path, cut: VideoCut, settings: AttentiveSettings, context: EvaluationContext
) -> EncodedSplits:
    """Compute the tokens of all clips once, by all ranks together, and map them from files in the cache."""
    subsets = cut.subsets
    files = {}
    for split in dict.fromkeys(subset.split for subset in subsets.values()):
        keys = {key for subset in subsets.values() if subset.split == split for key in subset.classes}
        files[split] = _encode_split(encoder, shards, split, keys if settings.max_videos else None, settings, context)
    return EncodedSplits(**{name: _select(files[subset.split], subset) for name, subset in subsets.items()})


def _encode_split(
    encoder: VideoEncoder,
    shards: Path,
    split: str,
    keys: Set[str] | None,
    settings: AttentiveSettings,
    context: EvaluationContext,
) -> Path:
    """Return the file with the tokens of some videos of a split, or all, named by everything that decides them."""
    form: dict[str, Any] = {"per_video": settings.clips_per_video, "views": settings.views}
    clips = clips_for(encoder, shards, split=split, short=settings.short, **form)
    index = clips.index
    videos = CorpusVideos(clips, [n for n in range(len(index)) if keys is None or index.key(n) in keys])
    sizes = [clips.px, clips.frames, clips.rate, *form.values(), *(["hold"] if clips.short == "hold" else [])]
    facts = json.dumps([fingerprint(encoder), read_manifest(shards).hash, split, sizes, videos.keys])
    out = context.cache / f"{split}-tokens-{hashlib.sha256(facts.encode()).hexdigest()[:24]}.npy"
    world = context.world
    if not world.first(out.exists):
        request = EmbedRequest(videos, "token", "", settings.clips_per_video, settings.views)
        parts = embed_parts(world, encoder, request, out)
        world.first(lambda: None if out.exists() else parts.write(out))  # another evaluation may have been faster
    return out


def _select(tokens_file: Path, subset: VideoSubset) -> EncodedClips:
    """Map the tokens of a split and select the clips of some of its videos."""
    rows = [row for row in read_json(tokens_file.with_suffix(".json"))["rows"] if "error" not in row]
    tokens = np.load(tokens_file, mmap_mode="r")
    number = {key: i for i, key in enumerate(subset.classes)}
    classes = list(subset.classes.values())
    place = np.array([i for i, row in enumerate(rows) if row["key"] in number], int)
    video = np.array([number[rows[i]["key"]] for i in place], int)
    if not len(place):
        raise BadInput(f"no labelled video of split {subset.split!r} can be decoded; see `vjepa verify`")
    label = np.array([classes[i] for i in video], int)
    return EncodedClips(tokens.reshape(len(tokens), -1, tokens.shape[-1]), place, video, label)


# ---- the result


def _findings(
    fitted: FittedGrid, grid: Sequence[tuple[float, float]], classes: Sequence[str], splits: EncodedSplits
) -> dict[str, Any]:
    """Return the accuracy of the selected probe, the scores of the grid, and the accuracy of the commonest class."""
    best = fitted.scores[fitted.best]
    report = splits.report
    _, first = np.unique(report.video, return_index=True)
    commonest = np.bincount(splits.fit.label, minlength=len(classes)).argmax()
    points = [{"rate": rate, "decay": decay} for rate, decay in grid]
    return {
        "classes": list(classes),
        "videos": len(first),
        "chosen": {"number": fitted.best, **points[fitted.best]},
        "accuracy": best.report,
        "interval": wilson(best.report, len(first)),
        "prior": float((report.label[first] == commonest).mean()),
        "accuracy_if_chosen_on_what_is_reported": max(score.report for score in fitted.scores),
        "grid": [{**point, **asdict(score)} for point, score in zip(points, fitted.scores, strict=True)],
    }


def _protocol(shards: Path, settings: AttentiveSettings, cut: VideoCut, heads: int) -> dict[str, Any]:
    """Describe how the score was measured."""
    split = settings.split
    has_train_split = cut.fit.split != split
    return {
        "shards": str(shards),
        "fit": cut.fit.split if has_train_split else f"half of the videos of {split}",
        "report": split if has_train_split else f"a third of the videos of {split}",
        "videos": {name: len(subset.classes) for name, subset in cut.subsets.items()},
        "clips_per_video": settings.clips_per_video,
        "views": settings.views,
        "blocks": settings.blocks,
        "heads": heads,
        "epochs": settings.epochs,
        "interval": "Wilson's 95 % over the videos",
        "seed": settings.seed,
    }


def _rows(label: str, found: Mapping[str, Mapping[str, Any]]) -> list[ScoreRow]:
    """Return the rows: the selected probe of each encoder, the paper's selection, and the prior."""
    pretrained = found["pretrained"]
    shares = {name: findings["accuracy"] for name, findings in found.items()}
    shares |= {MAX_OVER_HEADS: pretrained["accuracy_if_chosen_on_what_is_reported"], "prior": pretrained["prior"]}
    return [
        ScoreRow.accuracy(label, name, share, found.get(name, pretrained)["videos"]) for name, share in shares.items()
    ]
