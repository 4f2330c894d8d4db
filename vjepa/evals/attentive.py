"""V-JEPA 2's attentive probe, trained over a grid of learning rates and weight decays on frozen tokens.

    vjepa eval attentive MODEL SHARDS --label shape --out probe.json

Tokens are computed once and kept beside the result, so every probe of the grid (learning rate x weight decay) sees the
same ones and a second call begins where the first stopped. Under torchrun the ranks share the videos, then the grid.
`--baselines` trains the same grid on the tokens of the encoder before it was trained, and on the pixels of each token.

Letters: B clips, N tokens of a clip, D width.

Source: V-JEPA 2 (arXiv:2506.09985), frozen evaluation: 3 self-attention blocks and 1 cross-attention block, 20 probes
of which the best on the validation set is reported; several clips (segments) of each video, several views of each clip.
Unlike there, clips are not augmented, and the best probe is chosen on videos that are not reported on; what it would
have been otherwise is given beside it.
"""

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vjepa.atomic import check_free, new_file
from vjepa.distributed.world import World, join
from vjepa.evals.embed import TOGETHER, CorpusVideos, EmbedRequest, fingerprint, write_features
from vjepa.evals.features import PixelEncoder, clips_for
from vjepa.evals.results import about_model, score_row
from vjepa.evals.ridge import wilson
from vjepa.nn.attentive_probe import AttentiveProbe, save_classifier
from vjepa.weights.load import load_encoder
from vjepa.weights.native import VideoEncoder
from vjepa.weights.tensors import read_json
from vjepa.weights.weights import Part, random_encoder
from vjepa_data.corpus.format import read_manifest
from vjepa_data.corpus.index import Index
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

RATES = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
DECAYS = (0.01, 0.1, 0.4, 0.8)

CPU = torch.device("cpu")

# The best of the grid on the very videos that are reported on: what V-JEPA 2's tables print.
MAX_OVER_HEADS = "pretrained, max over heads"


@dataclass(frozen=True)
class Recipe:
    """How the probes are trained. The defaults are V-JEPA 2's."""

    rates: tuple[float, ...] = RATES
    """Peak learning rates; cosine to 0, no warm-up."""
    decays: tuple[float, ...] = DECAYS
    """Weight decays, of every parameter, biases and norms too."""
    epochs: int = 20
    batch: int = 32
    blocks: int = 3
    """Self-attention blocks before the query."""
    heads: int | None = None
    """By default those of the encoder, which is what Hugging Face's classifier has."""

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Every learning rate with every weight decay."""
        return list(itertools.product(self.rates, self.decays))


@dataclass(frozen=True)
class EncodedClips:
    """Tokens of some clips, with the video and the class of each."""

    tokens: Float[np.ndarray, "all N D"]
    """Of these and other clips; may be mapped from a file."""
    place: Int[np.ndarray, " clips"]
    """Where the tokens of each are."""
    video: Int[np.ndarray, " clips"]
    label: Int[np.ndarray, " clips"]

    def __len__(self) -> int:
        return len(self.label)

    def read(self, rows: Int[np.ndarray, " B"]) -> Float[Tensor, "B N D"]:
        return torch.from_numpy(self.tokens[self.place[rows]]).float()


def fit_probe(
    clips: EncodedClips,
    classes: int,
    heads: int,
    recipe: Recipe,
    *,
    rate: float,
    decay: float,
    seed: int,
    device: torch.device = CPU,
) -> AttentiveProbe:
    """Train one probe: AdamW, cosine to 0, cross-entropy, the same order of clips for every probe of a seed."""
    probe = AttentiveProbe(clips.tokens.shape[-1], heads, classes, blocks=recipe.blocks, seed=seed).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=decay)
    order = generator(seed, "attentive order")
    steps = recipe.epochs * math.ceil(len(clips) / recipe.batch)
    step = 0
    for _ in range(recipe.epochs):
        shuffled = order.permutation(len(clips))
        for rows in np.split(shuffled, range(recipe.batch, len(shuffled), recipe.batch)):
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
    """Share of videos whose class is right; the probabilities of a video's clips are averaged."""
    groups = np.split(np.arange(len(clips)), range(batch, len(clips), batch))
    device = next(probe.parameters()).device
    chance = torch.cat([probe(clips.read(rows).to(device)).softmax(1).cpu() for rows in groups]).numpy()
    videos, place = np.unique(clips.video, return_inverse=True)
    total = np.zeros((len(videos), chance.shape[1]))
    np.add.at(total, place, chance)
    label = np.zeros(len(videos), int)
    label[place] = clips.label
    return float((total.argmax(1) == label).mean())


@dataclass(frozen=True)
class Fitted:
    """The probes of a grid, of which one is kept."""

    scores: list[Mapping[str, float]]
    """For each point of the grid the accuracy on all sides but `fit`."""
    best: int
    """The point that is chosen."""
    probe: Mapping[str, Tensor] | None
    """Weights of its probe, on the CPU of the rank that trained it; None on the others."""


def fit_grid(
    sides: Mapping[str, EncodedClips], classes: int, heads: int, recipe: Recipe, world: World, *, seed: int
) -> Fitted:
    """Train a probe for each point of the grid, shared out among the ranks.

    A rank keeps the best of its probes only, and sends none: a ViT-g's has 100 million parameters.
    """
    mine: dict[int, Mapping[str, float]] = {}
    kept: dict[str, Tensor] = {}
    for number in range(world.rank, len(recipe.grid), world.size):
        rate, decay = recipe.grid[number]
        probe = fit_probe(sides["fit"], classes, heads, recipe, rate=rate, decay=decay, seed=seed, device=world.device)
        mine[number] = {side: accuracy(probe, clips) for side, clips in sides.items() if side != "fit"}
        scores = ", ".join(f"{score:.3f} on videos to {side}" for side, score in mine[number].items())
        log.info("rate %g decay %g: %s", rate, decay, scores)
        if _best(mine) == number:
            kept = {name: tensor.cpu() for name, tensor in probe.state_dict().items()}
    every = {number: scores for share in world.gather(mine) for number, scores in share.items()}
    best = _best(every)
    return Fitted([every[number] for number in sorted(every)], best, kept if best in mine else None)


def _best(scores: Mapping[int, Mapping[str, float]]) -> int:
    """The first of those that are best on the videos to choose on."""
    return max(scores, key=lambda number: (scores[number]["choose"], -number))


def attentive(
    model: Path,
    shards: Path,
    *,
    label: str,
    out: Path,
    split: str = "val",
    train_split: str | None = None,
    clips_per_video: int = 2,
    views: int = 1,
    baselines: bool = False,
    recipe: Recipe = Recipe(),
    part: Part = "target",
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the grid of probes, choose one, report it.

    Args:
        model: a run, a checkpoint, or an export.
        shards: a corpus whose samples carry `label`.
        label: the name of the label: a word, a whole number or a truth.
        out: where to write the result as JSON; the chosen probe goes beside it as `.safetensors`.
        split: the split to report on.
        train_split: the split to fit on, a fifth of whose videos choose the probe; by default, or if it is `split`,
            that is cut by video: half to fit, a sixth to choose, a third to report.
        clips_per_video: clips (segments) of each video, evenly spaced, their votes averaged.
        views: of each clip, whose votes are averaged too: 1 is the whole frame, more are squares of it.
        baselines: probe the encoder as it was before training, and pixels, too.
        recipe: how the probes are trained.
        part: whose features.
        seed: of the cut, of the first weights, of the order.
        overwrite: replace an earlier result.

    Returns:
        What was written.

    Raises:
        BadInput: no such model, corpus, split or label; a class to report on that was not fitted.
    """
    check_free(out, overwrite=overwrite)
    train_split = None if train_split == split else train_split
    asked = ProbeTask(shards, label, split, train_split, clips_per_video, views, seed)
    encoder = load_encoder(model, part)
    encoders = {"pretrained": encoder}
    if baselines:
        encoders |= {"random init": random_encoder(encoder, seed), "pixels": PixelEncoder(encoder)}
    heads = recipe.heads or encoder.model.encoder.heads
    cut = _cut(asked)
    found: dict[str, dict[str, Any]] = {}
    chosen: dict[str, Mapping[str, Tensor] | None] = {}
    with join(TOGETHER) as world:
        for name, one in encoders.items():
            sides = _load(out, str(model), one.to(world.device), asked, cut, world)
            log.info("%s: %d probes", name, len(recipe.grid))
            fits = math.gcd(heads, one.width)  # pixels have a width of their own
            fitted = fit_grid(sides, len(cut.classes), fits, recipe, world, seed=seed)
            found[name], chosen[name] = _findings(fitted, recipe.grid, cut.classes, sides), fitted.probe
        result = {
            "format": 1,
            "kind": "attentive",
            "model": about_model(model, encoder),
            "label": label,
            **found["pretrained"],
            "baselines": {name: one for name, one in found.items() if name != "pretrained"},
            "protocol": _protocol(asked, cut, recipe, heads),
            "rows": _rows(label, found),
        }
        if chosen["pretrained"] is not None:
            with new_file(out.with_suffix(".safetensors"), overwrite=overwrite) as beside:
                save_classifier(beside, chosen["pretrained"], cut.classes, heads)
        world.gather(None)  # the probe is there before a result speaks of it
        if world.is_first:
            with new_file(out, overwrite=overwrite) as beside:
                beside.write_text(json.dumps(result, indent=2) + "\n")
    return result


# ---- which videos


@dataclass(frozen=True)
class ProbeTask:
    """What is asked of frozen features, and of which clips."""

    shards: Path
    label: str
    split: str
    """To report on."""
    train_split: str | None
    """To fit and choose on; None if `split` is cut for that too."""
    clips_per_video: int
    views: int
    seed: int


@dataclass(frozen=True)
class Splits:
    """Which videos fit, choose and report; keys of each, with their classes."""

    classes: list[str]
    sides: Mapping[str, tuple[str, Mapping[str, int]]]
    """For each side its split, and the class of each key."""


def _cut(asked: ProbeTask) -> Splits:
    shards, split, train_split, label, seed = asked.shards, asked.split, asked.train_split, asked.label, asked.seed
    report = _labels(shards, split, label)
    keys = generator(seed, "attentive cut").permutation(sorted(report)).tolist()
    if train_split:
        fit = _labels(shards, train_split, label)
        order = generator(seed, "attentive cut").permutation(sorted(fit)).tolist()
        choose, rest = order[: max(1, len(order) // 5)], order[max(1, len(order) // 5) :]
        named = {"fit": (train_split, rest), "choose": (train_split, choose), "report": (split, keys)}
        labels = {**fit, **report}
    else:
        if len(keys) < 12:
            raise BadInput(f"split {split!r} has {len(keys)} labelled videos; the probe needs 12 at least")
        a, b = len(keys) // 2, len(keys) * 2 // 3
        named = {"fit": (split, keys[:a]), "choose": (split, keys[a:b]), "report": (split, keys[b:])}
        labels = report
    classes = sorted({labels[key] for key in named["fit"][1]})
    if strange := sorted({labels[key] for key in named["report"][1]} - set(classes)) if train_split else []:
        raise BadInput(f"label {label!r} has {strange[0]!r} to report on, which is not among those to fit on")
    if len(classes) < 2:
        raise BadInput(f"{shards}: all videos to fit on have the same {label!r} ({classes[0]!r}); give another label")
    number = {name: i for i, name in enumerate(classes)}
    return Splits(
        classes,
        {side: (of, {key: number.get(labels[key], -1) for key in chosen}) for side, (of, chosen) in named.items()},
    )


def _labels(shards: Path, split: str, label: str) -> dict[str, str]:
    """The label of each sample that has it, as a word."""
    index = Index(shards, split)
    found: dict[str, str] = {}
    names: set[str] = set()
    for number in range(len(index)):
        sample = index.read(number)
        labels = sample.labels
        names |= labels.keys()
        if isinstance(labels.get(label), str | bool | int):
            found[sample.key] = str(labels[label])
    if not found:
        raise BadInput(
            f"{shards}: no class called {label!r} in split {split!r}; it has {', '.join(sorted(names)) or 'none'}"
        )
    return found


def _load(
    out: Path, model: str, encoder: VideoEncoder, asked: ProbeTask, cut: Splits, world: World
) -> dict[str, EncodedClips]:
    """The tokens of all clips, computed once by all ranks together and mapped from files beside the result."""
    # Named by all that decides the tokens, so that those of another model or corpus are never taken for these.
    many = f"{asked.clips_per_video}x{asked.views}"
    what = f"{fingerprint(encoder)}-{read_manifest(asked.shards).hash[:16]}-{many}"
    cache = out.with_name(f".{out.stem}.tokens") / what
    for split in dict.fromkeys(of for of, _ in cut.sides.values()):
        if not world.first((cache / f"{split}.npy").exists):
            of = {"per_video": asked.clips_per_video, "views": asked.views}
            clips = clips_for(encoder, asked.shards, split=split, **of)
            job = EmbedRequest(CorpusVideos(clips), "token", model, asked.clips_per_video, asked.views)
            write_features(world, encoder, job, cache / f"{split}.npy")
    sides = {}
    for side, (split, classes) in cut.sides.items():
        rows = [row for row in read_json(cache / f"{split}.json")["rows"] if "error" not in row]
        if not rows:
            raise BadInput(f"{asked.shards}: no video of split {split!r} could be decoded; see `vjepa verify`")
        tokens = np.load(cache / f"{split}.npy", mmap_mode="r")
        keys = list(classes)
        place = {key: number for number, key in enumerate(keys)}
        keep = np.array([number for number, row in enumerate(rows) if row["key"] in place], int)
        video = np.array([place[rows[number]["key"]] for number in keep], int)
        label = np.array([classes[keys[one]] for one in video], int)
        sides[side] = EncodedClips(tokens.reshape(len(tokens), -1, tokens.shape[-1]), keep, video, label)
    return sides


# ---- what is reported


def _findings(
    fitted: Fitted,
    grid: Sequence[tuple[float, float]],
    classes: Sequence[str],
    sides: Mapping[str, EncodedClips],
) -> dict[str, Any]:
    """What the chosen probe is worth, beside all others of the grid and the answer given without looking."""
    scores, best = fitted.scores, fitted.best
    report = sides["report"]
    _, first = np.unique(report.video, return_index=True)
    commonest = np.bincount(sides["fit"].label, minlength=len(classes)).argmax()
    return {
        "classes": list(classes),
        "videos": len(first),
        "chosen": {"number": best, "rate": grid[best][0], "decay": grid[best][1]},
        "accuracy": scores[best]["report"],
        "interval": wilson(scores[best]["report"], len(first)),
        "prior": float((report.label[first] == commonest).mean()),
        "accuracy_if_chosen_on_what_is_reported": max(one["report"] for one in scores),
        "grid": [{"rate": rate, "decay": decay, **one} for (rate, decay), one in zip(grid, scores, strict=True)],
    }


def _protocol(asked: ProbeTask, cut: Splits, recipe: Recipe, heads: int) -> dict[str, Any]:
    """How it was measured."""
    return {
        "shards": str(asked.shards),
        "fit": asked.train_split or f"half of the videos of {asked.split}",
        "report": asked.split if asked.train_split else f"a third of the videos of {asked.split}",
        "videos": {side: len(keys) for side, (_, keys) in cut.sides.items()},
        "clips_per_video": asked.clips_per_video,
        "views": asked.views,
        "blocks": recipe.blocks,
        "heads": heads,
        "epochs": recipe.epochs,
        "interval": "Wilson's 95 % over the videos",
        "seed": asked.seed,
    }


def _rows(label: str, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the table: each encoder's chosen probe, what the paper's choice would have given, and the prior."""
    rows = [
        score_row(label, name, one["accuracy"], *one["interval"], videos=one["videos"]) for name, one in found.items()
    ]
    ours = found["pretrained"]
    best = ours["accuracy_if_chosen_on_what_is_reported"]
    rows.append(score_row(label, MAX_OVER_HEADS, best, *wilson(best, ours["videos"]), videos=ours["videos"]))
    rows.append(score_row(label, "prior", ours["prior"], *wilson(ours["prior"], ours["videos"]), videos=ours["videos"]))
    return rows
