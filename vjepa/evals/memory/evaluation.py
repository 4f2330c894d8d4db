"""Recall against delay: what features know about an object behind a curtain, just before the curtain opens.

    vjepa eval memory MODEL SHARDS --out memory.json        SHARDS: scenes of `vjepa synthesize curtain`

Videos are read as consecutive clips, from start to end. At the last clip before a curtain opens, ridge regression reads

    retention      the shape of the object behind it, one of four
    evolution      the place of an object that went on moving
    interference   the number of distractors that passed

from the memory and from features that need no training: the encoder's own (its window is a clip, which shows a curtain
alone, so it must be at chance: otherwise the scenes leak), exponential averages, raw context of as many numbers as the
memory has, and memories with random weights. Two columns bound recall: the encoder's features of a clip that shows the
object (`in sight`), and a memory of the same form that is trained with the labels (`supervised`). The gain of memory
needs no labels: 1 - error with the memory / error from the last clip alone, at openings and behind the curtain.

Letters: N clips of a video (_N: of each its own), M cells, F channels of a feature, D width of the memory, A acts.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vjepa.atomic import new_file
from vjepa.config import Model
from vjepa.evals.base import EvaluationContext, EvaluationSettings, Result, ScoreRow
from vjepa.evals.memory.page import Film, memory_page
from vjepa.evals.ridge import Kind, Table, fit_ridge
from vjepa.methods.memory.method import forecast_errors
from vjepa.nn.memory import ClipMemory, Pairs
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.evaluation.frame_stream import CorpusFrames
from vjepa_data.rng import generator

DECAYS = (0.5, 0.8, 0.95)
"""Shares of an exponential average that stay with each clip. Readouts see all three averages."""

BATCH = 64
RESAMPLED = 1000
IN_SIGHT = "in sight"
"""Name of the encoder's features of a clip that shows the object: a memory that only keeps them recalls no more."""

TAUGHT = 8
"""Videos of a step of the memory that is trained with the labels."""


class MemoryEvalSettings(EvaluationSettings):
    """Settings of the curve of recall against delay."""

    train_split: str = "train"
    """Split on which readouts are fitted."""

    seeds: int = Field(default=3, ge=1)
    """Number of random memories and of memories that are trained with the labels."""

    supervised_steps: int = Field(default=300, ge=0)
    """Steps of the memory that is trained with the labels. 0 leaves it out."""


@dataclass(frozen=True)
class Question:
    """An act of a video, at the last clip before its curtain opens."""

    video: int
    """Number of the video in its recording."""
    start: int
    """First clip that shows the object."""
    clip: int
    returned: int
    """First clip after the opening."""
    gap_s: float
    shape: str
    place: tuple[float, float]
    moves: bool
    count: int


@dataclass(frozen=True)
class Recording:
    """Pooled features of the consecutive clips of a split's videos, and the questions about them."""

    clips: Sequence[Float[Tensor, "_N M F"]]
    """Features of each video."""
    questions: Sequence[Question]
    numbers: Sequence[int] = ()
    """Number of each video in the split."""


def evaluate(model: WorldModel, data: Path, settings: MemoryEvalSettings, context: EvaluationContext) -> Result:
    """Measure recall by delay, with its baselines, and the gain of memory.

    Raises:
        BadInput: the model has no memory, or the corpus no curtains.
    """
    memory = dict(model.parts.items()).get("memory")
    if not isinstance(memory, ClipMemory):
        raise BadInput("this model has no memory; train one with objective memory, see configs/memory_curtain.yaml")
    fit, report = (
        record(model, memory.read, data, split, settings.max_videos, context)
        for split in (settings.train_split, settings.split)
    )
    rows = score_memories([memory], model.model, fit, report, settings, context)
    protocol = {
        "shards": str(data),
        "fit": settings.train_split,
        "report": settings.split,
        "clip_s": model.frames / model.fps,
        "acts": len(report.questions),
        "memory_numbers": memory.cells * memory.size.width,
        "interval": "95 % over resampled videos",
        "seed": settings.seed,
    }
    result = Result(protocol, rows, {"retention_by_gap_s": curve(rows)})
    if context.out is not None and context.world.is_first:
        films = CorpusFrames(data, split=settings.split, px=model.px, fps=model.fps)
        with new_file(context.out.with_suffix(".html"), overwrite=True) as page:
            page.write_text(memory_page(result, list(films_of(memory, report, films, model))))
    return result


def score_memories(
    trained: Sequence[ClipMemory], model: Model, fit: Recording, report: Recording, settings: MemoryEvalSettings,
    context: EvaluationContext,
) -> list[ScoreRow]:  # fmt: skip
    """Return the scores of trained memories (of several seeds) and of everything that they are compared with."""
    memory = trained[0]
    device, seeds = next(memory.parameters()).device, range(settings.seed, settings.seed + settings.seeds)
    random = [ClipMemory(model, cells=memory.cells, seed=seed).to(device).requires_grad_(False) for seed in seeds]
    kinds: dict[str, list[_Reader]] = {
        "trained memory": [_states(each) for each in trained],
        "random memory": [_states(each) for each in random],
        "raw context": [_context(max(1, memory.size.width // model.encoder.width))],
        "average": [_averages],
        "window": [lambda clips: clips],
        IN_SIGHT: [lambda clips: clips],
    }
    if settings.supervised_steps:
        taught = (_train_with_labels(model, memory, fit, settings.supervised_steps, seed) for seed in seeds)
        kinds["supervised"] = [_states(each) for each in taught]
    kinds["prior"] = [lambda clips: torch.zeros(len(clips), 1, 1)]  # of a constant, the readout is the prior
    rows: list[ScoreRow] = []
    for name, readers in context.track(list(kinds.items()), "readouts"):
        seen = name == IN_SIGHT
        tables = [(_features(reader, fit, seen=seen), _features(reader, report, seen=seen)) for reader in readers]
        rows += _score(name, tables, fit.questions, report.questions, settings.seed)
    return rows + _gains(trained, report, settings.seed)


def curve(rows: Sequence[ScoreRow]) -> dict[str, dict[str, float]]:
    """Return the accuracy of retention by seconds behind the curtain, for each kind of features."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.task.startswith("retention"):
            found.setdefault(row.features, {})[f"{row.extra['gap_s']:g}"] = row.value
    return found


# ---- features and questions


_Pool = Callable[[Float[Tensor, "N t h w F"]], Float[Tensor, "N M F"]]
"""A function from the tokens of clips to their cells."""


def record(
    model: WorldModel, pool: _Pool, data: Path, split: str, max_videos: int | None, context: EvaluationContext
) -> Recording:
    """Encode all consecutive clips of a split, shared among the ranks.

    Args:
        model: the encoder.
        pool: turns tokens to cells, see `ClipMemory.read`.
        data, split: the corpus.
        max_videos: videos to read.
        context: the ranks.

    Raises:
        BadInput: the corpus has no curtains, or only short curtains.
    """
    reader = CorpusFrames(data, split=split, px=model.px, fps=model.fps)
    videos = range(len(reader.keys))[:max_videos]

    def read(video: int) -> tuple[int, np.ndarray, list[Mapping[str, Any]]] | None:
        labels = reader.index.read_labels(video)
        if "acts" not in labels:
            raise BadInput(f"{data}: {reader.keys[video]} has no acts; make curtains with `vjepa synthesize curtain`")
        try:
            frames = torch.cat(list(reader.frames(video)))
        except Unreadable:
            return None
        clips = frames[: len(frames) // model.frames * model.frames].unflatten(0, (-1, model.frames))
        fps = float(reader.index.fps[video])
        return video, _encode(model, pool, clips).numpy(), [{**act, "fps": fps} for act in labels["acts"]]

    found = [each for each in context.share(read, videos, f"encode {split}") if each is not None]
    clip_s = model.frames / model.fps
    questions = [
        question
        for video, (_, clips, acts) in enumerate(found)
        for act in acts
        if (question := _question(video, act, clip_s, len(clips))) is not None
    ]
    if not questions:
        raise BadInput(f"{data}, split {split!r}: no curtain is closed for a clip of {clip_s:g} s; add videos")
    return Recording([torch.from_numpy(clips) for _, clips, _ in found], questions, [number for number, *_ in found])


@torch.no_grad()
def _encode(model: WorldModel, pool: _Pool, clips: Tensor) -> Float[Tensor, "N M F"]:
    device = next(model.parameters()).device
    return torch.cat([pool(model.encode(part.to(device))).cpu() for part in clips.split(BATCH)])


def _question(video: int, act: Mapping[str, Any], clip_s: float, clips: int) -> Question | None:
    """Return the question about an act, or None if no clip fits behind the curtain or after its opening."""
    fps = act["fps"]
    last, returned = int(act["open"] / fps / clip_s + 1e-6) - 1, -int(-act["opened"] / fps // clip_s)
    if last * clip_s < act["closed"] / fps - 1e-6 or returned >= clips or (returned + 1) * clip_s > act["end"] / fps:
        return None
    place = (float(act["place"][0]), float(act["place"][1]))
    start = -int(-act["start"] / fps // clip_s)
    return Question(video, start, last, returned, act["gap_s"], act["shape"], place, act["moves"], act["count"])


# ---- readouts

_Reader = Callable[[Float[Tensor, "N M F"]], Float[Tensor, "N M D"]]
"""A function from the clips of a video so far to the state after each of them."""


@torch.no_grad()
def _features(reader: _Reader, recording: Recording, *, seen: bool) -> Float[Tensor, "A d"]:
    """Return features of all cells and their mean: at each question, or while its object is `seen` at the start."""
    known = [reader(clips) for clips in recording.clips]
    at = torch.stack([known[each.video][each.start if seen else each.clip] for each in recording.questions])
    return torch.cat((at.flatten(1), at.mean(1)), dim=1).float()


def _states(memory: ClipMemory) -> _Reader:
    device = next(memory.parameters()).device
    return lambda clips: memory.remember(clips[None].to(device))[0].cpu()


def _averages(clips: Float[Tensor, "N M F"]) -> Float[Tensor, "N M D"]:
    found = []
    for decay in DECAYS:
        average, each = torch.zeros_like(clips[0]), []
        for clip in clips:
            average = decay * average + (1 - decay) * clip
            each.append(average)
        found.append(torch.stack(each))
    return torch.cat(found, dim=-1)


def _context(count: int) -> _Reader:
    """Return the features of the last `count` clips."""

    def read(clips: Float[Tensor, "N M F"]) -> Float[Tensor, "N M D"]:
        padded = torch.cat((clips[:1].expand(count - 1, -1, -1), clips))
        return torch.cat([padded[shift : shift + len(clips)] for shift in range(count)], dim=-1)

    return read


def _score(
    name: str, tables: Sequence[tuple[Tensor, Tensor]], fit: Sequence[Question], report: Sequence[Question], seed: int
) -> list[ScoreRow]:
    """Return the rows of a kind of features: the mean over its seeds, by task and gap."""
    rows = []
    for task, kind, metric, value, keep in TASKS:
        chosen = np.flatnonzero([keep(question) for question in fit])
        targets = [np.array([value(question) for question in part]) for part in (fit, report)]
        videos = [np.array([question.video for question in part]) for part in (fit, report)]
        if min(len(np.unique(each[chosen], axis=0)) for each in (targets[0], videos[0])) < 2:
            continue
        readouts = [fit_ridge(Table(train, targets[0], videos[0]).rows(chosen), kind, seed=seed) for train, _ in tables]
        for gap_s in sorted({question.gap_s for question in report}):
            asked = np.flatnonzero([keep(question) and question.gap_s == gap_s for question in report])
            if not len(asked):
                continue
            scores = [
                readout(Table(test, targets[1], videos[1]).rows(asked))
                for readout, (_, test) in zip(readouts, tables, strict=True)
            ]
            value_, low, high = (
                float(np.mean([getattr(score, part) for score in scores])) for part in ("value", "low", "high")
            )
            extra: dict[str, Any] = {"gap_s": gap_s, "acts": len(asked)}
            if len(scores) > 1:
                extra["seeds"] = [score.value for score in scores]
            rows.append(ScoreRow(f"{task}, {gap_s:g} s", metric, name, value_, low, high, scores[0].clips, extra))
    return rows


TASKS: tuple[tuple[str, Kind, str, Callable[[Question], Any], Callable[[Question], bool]], ...] = (
    ("retention", "class", "accuracy", lambda question: question.shape, lambda question: True),
    ("evolution", "number", "R2", lambda question: question.place, lambda question: question.moves),
    ("interference", "number", "R2", lambda question: question.count, lambda question: True),
)


def _train_with_labels(model: Model, like: ClipMemory, fit: Recording, steps: int, seed: int) -> ClipMemory:
    """Train a memory of the same form to tell the shape at each clip, until the curtain opens again."""
    device = next(like.parameters()).device
    memory = ClipMemory(model, cells=like.cells, seed=seed).to(device)
    head = nn.Linear(memory.size.width, len(shapes := sorted({question.shape for question in fit.questions})))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    head.to(device)
    optimizer = torch.optim.AdamW([*memory.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order, asked = np.random.default_rng(seed), sorted({question.video for question in fit.questions})
    targets = [torch.full((len(clips),), -1) for clips in fit.clips]
    for question in fit.questions:
        targets[question.video][question.start : question.clip + 1] = shapes.index(question.shape)
    for _ in range(steps):
        some = order.choice(asked, min(TAUGHT, len(asked)), replace=False)
        clips, wanted = (pad_sequence([each[video] for video in some], batch_first=True, padding_value=value)
                         for each, value in ((fit.clips, 0), (targets, -1)))  # fmt: skip
        told = head(memory.remember(clips.to(device)).mean(2))
        loss = F.cross_entropy(told.flatten(0, 1), wanted.to(device).flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(memory.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return memory.requires_grad_(False)


# ---- gain


def _gains(trained: Sequence[ClipMemory], report: Recording, seed: int) -> list[ScoreRow]:
    """Return the gain of memory for clips after an opening, and for the last clip behind the curtain."""
    errors: dict[str, list[tuple[int, float, float]]] = {"openings": [], "elsewhere": []}
    for memory, (video, asked) in itertools.product(trained, _by_video(report.questions).items()):
        pairs = [("openings", question.clip, question.returned) for question in asked]
        pairs += [("elsewhere", 2 * clip - returned, clip) for _, clip, returned in pairs if 2 * clip >= returned]
        names, earlier, later = zip(*pairs, strict=True)
        found = _errors(memory, report.clips[video], earlier, later, generator(seed, "gain", video))
        for name, remembered, alone in zip(names, *found.tolist(), strict=True):
            errors[name].append((video, remembered, alone))
    return [_gain_row(f"memory gain, {name}", np.array(each), seed) for name, each in errors.items() if each]


def _by_video(questions: Sequence[Question]) -> dict[int, list[Question]]:
    return {video: list(group) for video, group in itertools.groupby(questions, key=lambda question: question.video)}


@torch.no_grad()
def _errors(
    memory: ClipMemory, clips: Float[Tensor, "N M F"], earlier: Sequence[int], later: Sequence[int],
    draw: np.random.Generator,
) -> Float[np.ndarray, "2 P"]:  # fmt: skip
    """Return the errors of predictions of later clips from earlier ones, with the memory and from one clip alone.

    The predictor sees an eighth of the cells of the later clip.
    """
    device = next(memory.parameters()).device
    order = draw.permuted(np.tile(np.arange(memory.cells), (len(later), 1)), axis=1)
    shown = torch.from_numpy(order < max(1, memory.cells // 8))
    pairs = Pairs(*(each[None].to(device) for each in (torch.tensor(earlier), torch.tensor(later), shown)))
    video = clips[None].to(device)
    return torch.cat(list(forecast_errors(memory, video, video, pairs).values())).cpu().numpy()


def _gain_row(task: str, errors: Float[np.ndarray, "A 3"], seed: int) -> ScoreRow:
    """Return 1 - summed error with the memory / without it, with its interval over resampled videos."""
    videos = np.unique(errors[:, 0])
    sums = np.stack([errors[errors[:, 0] == video][:, 1:].sum(0) for video in videos])
    again = np.random.default_rng(seed).integers(0, len(videos), (RESAMPLED, len(videos)))
    totals = sums[again].sum(1)
    low, high = np.quantile(1 - totals[:, 0] / totals[:, 1], (0.025, 0.975))
    value = 1 - sums[:, 0].sum() / sums[:, 1].sum()
    return ScoreRow(task, "gain", "trained memory", float(value), float(low), float(high), len(videos))


# ---- films


def films_of(memory: ClipMemory, report: Recording, frames: CorpusFrames, model: WorldModel) -> Iterator[Film]:
    """Yield the first act of each gap with the errors of predictions of its clips."""
    clip_s = model.frames / model.fps
    first = {question.gap_s: question for question in reversed(report.questions)}
    for gap_s, question in sorted(first.items()):
        clips, distance = report.clips[question.video], question.returned - question.clip
        later = range(max(question.start, distance), min(question.returned + distance, len(clips)))
        earlier = [clip - distance for clip in later]
        remembered, alone = _errors(memory, clips, earlier, list(later), generator(0, "film", question.video))
        number = report.numbers[question.video]
        pixels = torch.cat(list(frames.frames(number)))[later.start * model.frames : later.stop * model.frames]
        yield Film(
            f"{frames.keys[number]}: a {question.shape} that {'moves' if question.moves else 'rests'}, {gap_s:g} s "
            f"behind the curtain, {question.count} passed",
            pixels.numpy(),
            np.array(later) * clip_s,
            remembered,
            alone,
            ((question.clip + 1) * clip_s - gap_s, question.returned * clip_s),
        )
