"""Violation of expectation: does a film that breaks a law of physics surprise the model more than a film that obeys it?

    vjepa eval surprise MODEL FOLDER --out surprise.json      writes surprise.html too

A window of a film is split in time. The model sees the first C frames and predicts the features of all later tokens.
The surprise of the window is the mean L1 distance between prediction and layer-normed features, and that of a film is
the mean, or the maximum, over its windows. A pair counts if the impossible film surprises strictly more. Ties and
NaN count as wrong.

A group of films that share their halves counts if its impossible films together surprise more than its possible films,
and half if they surprise as much. What the end of a film looks like, whatever came before, cancels out there.

Nothing is chosen on the films. The scores are those of the mean over all context lengths, and each context length is
reported beside them (`by_context`).

Letters: B windows, F frames of a film, T frames of a window, N tokens of a window, V tokens that are seen, C contexts.

Source: Garrido et al., "Intuitive physics understanding emerges from self-supervised pretraining on natural videos"
(arXiv:2502.11831). Groups are the relative error of IntPhys (arXiv:1803.07616).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from vjepa.atomic import new_file
from vjepa.evals.base import RANDOM, CommonSettings, EvaluationContext, Result, ScoreRow, join_seeds
from vjepa.evals.features import fingerprint
from vjepa.evals.parts import Advance, write_parts
from vjepa.evals.ridge import wilson
from vjepa.evals.surprise import shortcuts
from vjepa.evals.surprise.baselines import copy_last_features, oracle_surprise, pixel_baselines
from vjepa.evals.surprise.page import surprise_page
from vjepa.evals.untrained import untrained_model
from vjepa.weights.world_model import WorldModel
from vjepa_data.evaluation.violations import ViolationSet, read_films, read_violations
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput

Score = Callable[[UInt8[Tensor, "B T H W 3"], Sequence[int]], Float[ndarray, "B C"]]
"""Surprise of windows at each context length, in frames."""

THRESHOLD_QUANTILE = 0.9  # of the surprise of possible films, as published


class SurpriseSettings(CommonSettings):
    """Settings of the violation of expectation. All films of a benchmark are compared."""

    clip_frames: int | None = Field(default=None, ge=4)
    """Frames of a window. The default is that of the benchmark's authors, or else that of the model's training."""

    frame_step: int | None = Field(default=None, ge=1)
    """Show every so many frames of a film. The default is that of the benchmark's authors, or else the step that comes
    nearest to the model's frame rate."""

    context_frames: tuple[int, ...] = ()
    """Frames of a window that the model sees. The default is one to five eighths of a window."""

    slide: int = Field(default=2, ge=1)
    """Shown frames between the starts of two windows."""

    mask_kind: int = Field(default=0, ge=0)
    """Index of the model's mask token that stands for the hidden part."""

    untrained: int = Field(default=5, ge=0)
    """Number of untrained models of the same shape to compare with."""

    batch: int = Field(default=16, ge=1)
    """Windows that are computed together."""


def evaluate(model: WorldModel, data: Path, settings: SurpriseSettings, context: EvaluationContext) -> Result:
    """Compare the surprise at possible and at impossible films.

    Raises:
        BadInput: the model has no masked predictor, or the folder is not a benchmark, or its films are too short.
    """
    films = read_violations(data)
    form = {"trained_frames": model.frames, "tubelet": model.model.tubelet_frames}
    windows = Windows.choose(films, settings, **form)
    scores = _scores(model, settings, context)
    found = _measure(model, data, films, windows, scores, settings, context)
    hints = {name: found.pop(f"shortcut/{name}") for name in shortcuts.NAMES}
    names = [name for name in found if any(len(one) for one in found[name])]
    rows = [
        row
        for condition in ["all", *dict.fromkeys(film.condition for film in films.films)]
        for name in names
        for row in score_rows(films, condition, name, found[name])
    ]
    protocol = {
        "films": f"{len(films.films)} of {films.name}",
        "pairs": len(films.pairs),
        "window": windows.clip_frames,
        "frame step": windows.frame_step or f"nearest to {model.fps:g} per second",
        "contexts": list(windows.contexts),
        "slide": settings.slide,
        "interval": "Wilson's 95 % over the groups of films",
    }
    details = {
        "shortcuts": shortcuts.audit(films, hints) if films.pairs else [],
        "by_context": by_context(films, found, windows.contexts),
        "by_dose": by_dose(films, found),
        "films": film_scores(films, found),
    }
    result = Result(protocol, join_seeds(rows), details)
    if context.out is not None and context.world.is_first:
        if films.pairs:
            with new_file(context.out.with_suffix(".html"), overwrite=True) as page:
                page.write_text(surprise_page(films, result, model, windows.frame_step))
        else:
            write_submission(context.out.with_suffix(".jsonl"), films, found["pretrained"])
    return result


# ---- what is scored


@dataclass(frozen=True)
class Windows:
    """The form of the windows that films are cut into."""

    clip_frames: int
    frame_step: int | None
    contexts: Sequence[int]
    slide: int

    @classmethod
    def choose(cls, films: ViolationSet, settings: SurpriseSettings, *, trained_frames: int, tubelet: int) -> "Windows":
        """Choose from the settings, the benchmark's publication and the model's training, in this order.

        Raises:
            BadInput: the window or a context is not made of whole tubelets.
        """
        frames = settings.clip_frames or films.clip_frames or trained_frames
        if frames % tubelet:
            raise BadInput(f"clip_frames ({frames}) must be a multiple of the model's tubelet ({tubelet} frames)")
        eighths = [tubelet * max(1, round(frames * eighth / 8 / tubelet)) for eighth in range(1, 6)]
        contexts = settings.context_frames or tuple(sorted({one for one in eighths if one < frames}))
        wrong = [one for one in contexts if one % tubelet or not 0 < one < frames]
        if wrong or not contexts:
            raise BadInput(
                f"context_frames ({', '.join(map(str, wrong))}) must be multiples of {tubelet} below {frames}"
            )
        return cls(frames, settings.frame_step or films.frame_step, contexts, settings.slide)

    def cut(self, film: UInt8[ndarray, "F H W 3"]) -> UInt8[Tensor, "B T H W 3"]:
        """Return all windows of a film. A film that is too short has none."""
        starts = range(0, len(film) - self.clip_frames + 1, self.slide)
        shape = (0, self.clip_frames, *film.shape[1:])
        cut = [film[start : start + self.clip_frames] for start in starts]
        return torch.from_numpy(np.stack(cut) if cut else np.empty(shape, np.uint8))


def masked_surprise(model: WorldModel, mask_kind: int) -> Score:
    """Return the surprise of a masked predictor that is shown the first frames of a window."""

    def score(frames: UInt8[Tensor, "B T H W 3"], contexts: Sequence[int]) -> Float[ndarray, "B C"]:
        targets = model.targets(frames).flatten(1, 3)
        grid, tubelet = model.encoder.grid(frames), model.model.tubelet_frames
        tokens = torch.arange(grid.tokens, device=frames.device).expand(len(frames), -1)
        columns = []
        for context in contexts:
            seen = context // tubelet * grid.h * grid.w
            predicted = model.predict(frames, tokens[:, :seen], tokens[:, seen:], mask_kind=mask_kind)
            columns.append((predicted.float() - targets[:, seen:]).abs().mean((1, 2)))
        return torch.stack(columns, 1).cpu().numpy()

    return score


def _scores(model: WorldModel, settings: SurpriseSettings, context: EvaluationContext) -> dict[str, Score]:
    if "predict" not in model.capabilities:
        raise BadInput(
            "this model has no masked predictor, and so no expectation; give one of vjepa2 or vjepa2_1, "
            "or `vjepa eval agency` for a model that predicts under actions"
        )
    device = context.world.device
    random = [untrained_model(model, settings.seed + number).to(device) for number in range(settings.untrained)]
    half = untrained_model(model, settings.seed, encoder=False).to(device)
    return {
        "pretrained": masked_surprise(model, settings.mask_kind),
        **{f"{RANDOM} {number}": masked_surprise(one, settings.mask_kind) for number, one in enumerate(random)},
        "random predictor": masked_surprise(half, settings.mask_kind),
        "copy features": lambda frames, contexts: copy_last_features(model, frames, contexts),
        **pixel_baselines(),
    }


def _measure(
    model: WorldModel,
    data: Path,
    films: ViolationSet,
    windows: Windows,
    scores: Mapping[str, Score],
    settings: SurpriseSettings,
    context: EvaluationContext,
) -> dict[str, list[Float[ndarray, "B C"]]]:
    """Return the surprise of each window of each film, by the name of the score. Earlier measurements are kept."""
    predictor = model.predictor
    assert predictor is not None
    facts = [[film.name, film.first, _file_facts(film.path)] for film in films.films]
    form = settings.model_dump(mode="json") | {"clip": [windows.clip_frames, windows.frame_step, *windows.contexts]}
    weights = [
        fingerprint(model.encoder),
        float(sum(one.detach().double().abs().sum() for one in predictor.parameters())),
    ]
    name = hashlib.sha256(json.dumps([facts, form, weights]).encode()).hexdigest()[:24]

    @torch.no_grad()
    def write(group: range, file: Path, advance: Advance) -> None:
        arrays: dict[str, ndarray] = {}
        wanted = [films.films[number] for number in group]
        decoded = read_films(wanted, px=model.px, fps=model.fps, frame_step=windows.frame_step)
        for number, frames in zip(group, decoded, strict=True):
            if isinstance(frames, Refused):
                raise BadInput(f"{films.films[number].path}: {frames}; the benchmark needs all of its films")
            clips = windows.cut(frames)
            if not len(clips):
                raise BadInput(
                    f"{films.films[number].path}: {len(frames)} frames are shown, and a window has "
                    f"{windows.clip_frames}; give a smaller --frame-step or --clip-frames"
                )
            for key, score in scores.items():
                batches = [
                    score(batch.to(context.world.device), windows.contexts) for batch in clips.split(settings.batch)
                ]
                arrays[f"{number}/{key}"] = np.concatenate(batches).astype(np.float32)
            film = films.films[number]
            for key, value in shortcuts.features(frames, film.path, number).items():
                arrays[f"{number}/shortcut/{key}"] = value
            truth = oracle_surprise(film.path, frames, windows.frame_step)
            if truth is not None:
                arrays[f"{number}/oracle"] = np.full((1, len(windows.contexts)), truth, np.float32)
            advance(1)
        with open(file, "wb") as sink:
            np.savez(sink, **arrays)  # pyright: ignore[reportArgumentType]

    text = f"watch {len(films.films)} films of {films.name}"
    files = write_parts(context.world, context.cache / f"surprise-{name}", len(films.films), ".npz", write, text=text)
    loaded: dict[str, ndarray] = {}
    for file in files:
        with np.load(file) as arrays:
            loaded |= dict(arrays)
    none = np.empty((0, len(windows.contexts)), np.float32)
    names = (*scores, "oracle", *(f"shortcut/{key}" for key in shortcuts.NAMES))
    return {key: [loaded.get(f"{number}/{key}", none) for number in range(len(films.films))] for key in names}


def _file_facts(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


# ---- scores


def film_surprise(windows: Float[ndarray, "B C"], how: str) -> Float[ndarray, " C"]:
    """Return the surprise of a film at each context length: the mean or the maximum over its windows."""
    return windows.mean(0) if how == "mean" else windows.max(0)


def score_rows(
    films: ViolationSet, condition: str, name: str, windows: Sequence[Float[ndarray, "B C"]]
) -> list[ScoreRow]:
    """Return the scores of a condition for a kind of surprise.

    `pairs` is the pair accuracy of the mean over windows and contexts, and `groups` that of groups with
    several pairs. For all conditions together there are also the pair accuracy of the maximum over windows, the area
    under the curve, and the accuracy of a threshold for single films.
    """
    pairs = pairs_of(films, condition)
    if not pairs:
        return []
    groups = len({films.films[pair[0]].group for pair in pairs})
    values = {how: np.array([film_surprise(one, how).mean() for one in windows]) for how in ("mean", "max")}
    rows = [
        replace(ScoreRow.accuracy(condition, name, pair_accuracy(surprise, pairs), groups), metric=metric)
        for metric, surprise in {"pairs": values["mean"], "pairs, max": values["max"]}.items()
    ]
    if groups < len(pairs):
        share = group_accuracy(values["mean"], films, pairs)
        rows.insert(1, replace(ScoreRow.accuracy(condition, name, share, groups), metric="groups"))
    if condition != "all":
        return rows[:-1]
    used = sorted({film for pair in pairs for film in pair})
    labels = np.array([not films.films[film].possible for film in used])
    surprise = values["max"][used]
    rows.append(ScoreRow(condition, "AUROC", name, *auroc(surprise, labels), len(used)))
    threshold = np.quantile(surprise[~labels], THRESHOLD_QUANTILE) if np.isfinite(surprise).all() else np.inf
    single = ScoreRow.accuracy(condition, name, float(((surprise > threshold) == labels).mean()), len(used))
    return [*rows, replace(single, metric="single films")]


def pairs_of(films: ViolationSet, condition: str) -> list[tuple[int, int]]:
    """Return the pairs of a condition, or of `all`."""
    return [pair for pair in films.pairs if condition in ("all", films.films[pair[0]].condition)]


def pair_accuracy(surprise: Float[ndarray, " n"], pairs: Sequence[tuple[int, int]]) -> float:
    """Return the share of pairs whose impossible film surprises strictly more."""
    return float(np.mean([surprise[impossible] > surprise[possible] for possible, impossible in pairs]))


def group_accuracy(surprise: Float[ndarray, " n"], films: ViolationSet, pairs: Sequence[tuple[int, int]]) -> float:
    """Return the share of groups whose impossible films together surprise more than their possible films.

    Ties count half: a score without expectations ties in each group of ours, whose halves are equal. NaN is wrong.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for pair in pairs:
        groups.setdefault(films.films[pair[0]].group, []).append(pair)
    possible, impossible = (
        np.array([sum(float(surprise[pair[side]]) for pair in group) for group in groups.values()]) for side in (0, 1)
    )
    return float(np.mean(shortcuts.exceeds(impossible, possible)))


def auroc(values: Float[ndarray, " n"], labels: ndarray) -> tuple[float, float, float]:
    """Return the area under the curve of surprise against being impossible, and its 95 % interval.

    Ties count half, and NaN as the least surprise of impossible and the most of possible films.
    The interval is that of Hanley and McNeil (1982).
    """
    values = np.where(np.isfinite(values), values, np.where(labels, -np.inf, np.inf))
    positive, negative = values[labels], values[~labels]
    area = float((positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean())
    spread = area * (1 - area) + (len(positive) - 1) * (area / (2 - area) - area**2)
    spread += (len(negative) - 1) * (2 * area**2 / (1 + area) - area**2)
    half = 1.96 * float(np.sqrt(max(0.0, spread) / (len(positive) * len(negative))))
    return area, max(0.0, area - half), min(1.0, area + half)


def by_context(
    films: ViolationSet, found: Mapping[str, Sequence[Float[ndarray, "B C"]]], contexts: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the accuracy of pairs and of groups at each context length, for the mean and the maximum over windows."""
    rows = []
    for name, windows in found.items():
        if not any(len(one) for one in windows):
            continue
        for how in ("mean", "max"):
            surprise = np.stack([film_surprise(one, how) for one in windows])
            for condition in ("all", *dict.fromkeys(film.condition for film in films.films)):
                if pairs := pairs_of(films, condition):
                    rows += [
                        {"features": name, "condition": condition, "windows": how, "context_frames": frames}
                        | {"accuracy": pair_accuracy(values, pairs), "groups": group_accuracy(values, films, pairs)}
                        | {"pairs": len(pairs)}
                        for frames, values in zip(contexts, surprise.T, strict=True)
                    ]
    return rows


def by_dose(films: ViolationSet, found: Mapping[str, Sequence[Float[ndarray, "B C"]]]) -> list[dict[str, Any]]:
    """Return the accuracy of pairs and of groups (mean over windows and contexts) by condition and time of hiding."""
    rows = []
    for name, windows in found.items():
        if not any(len(one) for one in windows):
            continue
        values = np.array([film_surprise(one, "mean").mean() for one in windows])
        cells: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for pair in films.pairs:
            film = films.films[pair[0]]
            if film.dose is not None:
                cells.setdefault((film.condition, film.dose), []).append(pair)
        for (condition, dose), pairs in sorted(cells.items()):
            share = pair_accuracy(values, pairs)
            low, high = wilson(share, len(pairs) // 2 or 1)
            rows.append(
                {"features": name, "condition": condition, "hidden_frames": dose, "accuracy": share, "low": low}
                | {"high": high, "groups": group_accuracy(values, films, pairs), "pairs": len(pairs)}
            )
    return rows


def film_scores(films: ViolationSet, found: Mapping[str, Sequence[Float[ndarray, "B C"]]]) -> list[dict[str, Any]]:
    """Return the surprise of the trained model at each film, over its windows: the mean over contexts."""
    return [
        {
            **{"film": film.name, "condition": film.condition, "group": film.group, "possible": film.possible},
            "surprise": [round(float(value), 6) for value in surprise.mean(1)],
        }
        for film, surprise in zip(films.films, found["pretrained"], strict=True)
    ]


def write_submission(file: Path, films: ViolationSet, windows: Sequence[Float[ndarray, "B C"]]) -> None:
    """Write answers for a split whose truth is secret: of each scene, the less surprising half is called possible.

    Without scenes, it is the less surprising half of all films. The lines follow the IntPhys 2 leader board.
    """
    values = np.array([film_surprise(one, "mean").mean() for one in windows])
    scenes: dict[str, list[int]] = {}
    for place, film in enumerate(films.films):
        scenes.setdefault(film.group, []).append(place)
    if all(len(places) == 1 for places in scenes.values()):
        scenes = {"": list(range(len(films.films)))}
    possible: set[int] = set()
    for places in scenes.values():
        possible |= set(sorted(places, key=lambda place: values[place])[: len(places) // 2])
    lines = []
    for place, film in enumerate(films.films):
        answer = {"row_id": film.name.removesuffix(".mp4"), "model_answer": int(place in possible)}
        lines.append(json.dumps({"data_name": "intphys2", "task": "HeldOut"} | answer) + "\n")
    file.write_text("".join(lines))
