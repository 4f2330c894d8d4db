"""Agency: does a film surprise the model more if it is told that other actions were taken?

    vjepa eval agency MODEL SHARDS --out agency.json      writes agency.html too

The model predicts each frame from the true frames before it and the actions between them. The surprise is the mean L1
distance between the predicted and the true latent. It is measured twice for a clip: with its own actions, and with the
same actions in a random order. A clip counts if the permuted actions surprise strictly more. The pictures are the same
both times, so that a model that ignores actions ties, and is wrong. Clips whose actions are all equal are left out.

Letters: B clips, T frames of a clip, U = T - 1 intervals, A channels of an action and perhaps a state, n clips.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from vjepa.atomic import new_file
from vjepa.evals.base import (
    RANDOM,
    EvaluationContext,
    EvaluationSettings,
    Result,
    ScoreRow,
    join_seeds,
)
from vjepa.evals.features import CorpusVideos, clips_for, fingerprint
from vjepa.evals.parts import Advance, read_arrays, write_arrays, write_parts
from vjepa.evals.untrained import untrained_model
from vjepa.viz import plots
from vjepa.weights.world_model import WorldModel
from vjepa_data import html
from vjepa_data.corpus.format import read_manifest
from vjepa_data.errors import Unreadable
from vjepa_data.evaluation.clips import EvalClip, EvalClips
from vjepa_data.html import Section
from vjepa_data.reader.signals import cut_signals
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput
from vjepa_data.signal_spec import member_of_signal, stored_name

log = logging.getLogger(__name__)

SHOWN = 3  # films on the page, of the most and of the least surprising


class AgencySettings(EvaluationSettings):
    """Settings of the test of agency."""

    action: str | None = None
    """Signal that acts between frames. The default is that of the model's training, or else `action`."""

    state: str | None = None
    """Signal of the state at each frame, for a model that reads it. The default is that of the model's training."""

    clips_per_video: int = Field(default=1, ge=1)
    """Clips of each video, evenly spaced."""

    untrained: int = Field(default=3, ge=0)
    """Number of untrained models of the same shape to compare with."""


@dataclass(frozen=True)
class ActedClip:
    """A clip with its actions, and the same actions in another order."""

    video: int
    number: int
    """Number of the clip in its video."""
    frames: UInt8[Tensor, "T P P 3"]
    actions: Float[ndarray, "U A"]
    permuted: Float[ndarray, "U A"]


@dataclass(frozen=True)
class Surprises:
    """Surprise at each step of each clip."""

    true: Float[ndarray, "n U"]
    permuted: Float[ndarray, "n U"]

    @property
    def margins(self) -> Float[ndarray, " n"]:
        """How much more the permuted actions surprise."""
        return (self.permuted - self.true).mean(1)


def evaluate(model: WorldModel, data: Path, settings: AgencySettings, context: EvaluationContext) -> Result:
    """Compare the surprise under true and under permuted actions.

    Raises:
        BadInput: the model has no dynamics predictor, or the corpus lacks the signals.
    """
    if "rollout" not in model.capabilities:
        raise BadInput("this model predicts nothing under actions; give a model of lewm or dynamics")
    videos = ActedVideos(model, data, settings)
    models = {"pretrained": model}
    device = context.world.device
    for number in range(settings.untrained):
        models[f"{RANDOM} {number}"] = untrained_model(model, settings.seed + number).to(device)
    models["random predictor"] = untrained_model(model, settings.seed, encoder=False).to(device)
    places, found = _measure(models, data, videos, settings, context)
    rows = [
        row for name, surprises in found.items() for row in score_rows(name, surprises, places[:, 0], settings.seed)
    ]
    protocol = {
        "shards": str(data),
        "report": f"{len(places)} clips of {settings.split}",
        "signals": ", ".join(videos.names),
        "interval": "Wilson's 95 % over clips, resampled videos for the ratio",
        "seed": settings.seed,
    }
    details = {"steps": {name: _by_step(surprises) for name, surprises in found.items()}}
    result = Result(protocol, join_seeds(rows), details)
    if context.out is not None and context.world.is_first:
        with new_file(context.out.with_suffix(".html"), overwrite=True) as page:
            page.write_text(_page(result, videos, places, found))
    return result


def score_rows(name: str, surprises: Surprises, videos: Int[ndarray, " n"], seed: int) -> list[ScoreRow]:
    """Return the share of clips that permuted actions surprise more, and the ratio of the mean surprises."""
    share = float((surprises.margins > 0).mean())  # NaN is not larger
    pairs = replace(ScoreRow.accuracy("agency", name, share, len(np.unique(videos))), metric="pairs")
    _, place = np.unique(videos, return_inverse=True)
    sums = np.stack([np.bincount(place, part.mean(1)) for part in (surprises.permuted, surprises.true)], 1)
    draws = generator(seed, "agency interval").multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 1000) @ sums
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    ratio = float(sums[:, 0].sum() / sums[:, 1].sum())
    return [pairs, ScoreRow("agency", "ratio", name, ratio, float(low), float(high), len(sums))]


def _by_step(surprises: Surprises) -> dict[str, list[float]]:
    return {kind: [round(float(x), 6) for x in getattr(surprises, kind).mean(0)] for kind in ("true", "permuted")}


# ---- clips with actions


class ActedVideos:
    """Clips of a split of a corpus, with their actions."""

    def __init__(self, model: WorldModel, data: Path, settings: AgencySettings) -> None:
        """Raises:
        BadInput: the corpus lacks a signal.
        """
        trained = (model.provenance.get("settings") or {}).get("objective") or {}
        action, state = settings.action or trained.get("action") or "action", settings.state or trained.get("state")
        self.names = [action, *([state] if state else [])]
        form = {"per_video": settings.clips_per_video, "max_videos": settings.max_videos, "short": settings.short}
        self.clips: EvalClips = clips_for(model, data, split=settings.split, **form)
        self.seed, self.index = settings.seed, self.clips.index
        for name in self.names:
            if name not in self.index.signals:
                has = ", ".join(self.index.signals) or "none"
                raise BadInput(f"{data} has no signal {name!r} (it has {has}); give another --action or --state")
        self.videos = CorpusVideos.chosen(self.clips)

    def __len__(self) -> int:
        return len(self.videos.keys)

    def read(self, group: range) -> Iterator[tuple[int, list[ActedClip]]]:
        """Yield the clips of each video that have different actions. Videos that cannot be decoded are left out."""
        for number, clips in zip(group, self.videos.read(group), strict=True):
            if isinstance(clips, Unreadable):
                log.warning("%s is left out: %s", self.videos.keys[number], clips.detail)
                yield number, []
            else:
                acted = (self._with_actions(number, place, clip) for place, clip in enumerate(clips))
                yield number, [clip for clip in acted if clip is not None]

    def _with_actions(self, number: int, place: int, clip: EvalClip) -> ActedClip | None:
        members = list(dict.fromkeys(member_of_signal(stored_name(name, self.index.signals)) for name in self.names))
        sample = self.index.read(clip.video, members)
        times_s = np.array([clip.numbers]) / float(self.index.fps[clip.video])
        form = {"times_s": times_s, "fps": self.clips.rate, "flip": False}
        cut = cut_signals(self.names, sample.members, self.index, clip.video, **form)
        action, *states = (cut[name] for name in self.names)
        actions = action.values[0].reshape(len(clip.numbers) - 1, -1)
        if not all(signal.valid[0, : len(actions)].all() for signal in cut.values()) or (actions == actions[0]).all():
            return None
        draw, permuted = generator(self.seed, "permuted actions", clip.video, place), actions
        while np.array_equal(permuted, actions):
            permuted = draw.permutation(actions)
        more = [state.values[0, :-1].reshape(len(actions), -1) for state in states]
        both = (np.concatenate((part, *more), axis=1).astype(np.float32) for part in (actions, permuted))
        return ActedClip(number, place, clip.frames, *both)


# ---- surprise


@torch.no_grad()
def step_surprise(
    model: WorldModel, frames: UInt8[Tensor, "B T P P 3"], actions: Float[Tensor, "B U A"]
) -> Float[ndarray, "B U"]:
    """Return the distance of each frame's latent from its prediction, given the true frames before it."""
    device = next(model.parameters()).device
    latents, actions = model.latents(frames.to(device)), actions.to(device)
    errors = [
        (model.rollout_from(latents[:, :seen], actions[:, :seen])[:, 0] - latents[:, seen]).abs().flatten(1).mean(1)
        for seen in range(1, frames.shape[1])
    ]
    return torch.stack(errors, 1).cpu().numpy()


def _measure(
    models: Mapping[str, WorldModel],
    data: Path,
    videos: ActedVideos,
    settings: AgencySettings,
    context: EvaluationContext,
) -> tuple[Int[ndarray, "n 2"], dict[str, Surprises]]:
    """Return the video and the number of each clip, and its surprises by name. Earlier measurements are kept."""
    model = models["pretrained"]
    part = model.parts["dynamics"]
    weights = [fingerprint(model.encoder), float(sum(one.detach().double().abs().sum() for one in part.parameters()))]
    facts = [weights, read_manifest(data).hash, settings.model_dump(mode="json"), videos.names, model.frames]
    folder = context.cache / f"agency-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"

    def write(group: range, file: Path, advance: Advance) -> None:
        found: dict[str, list[ndarray]] = {}
        for _, clips in videos.read(group):
            for clip in clips:
                found.setdefault("place", []).append(np.array([[clip.video, clip.number]]))
                for name, one in models.items():
                    for kind in ("true", "permuted"):
                        actions = clip.actions if kind == "true" else clip.permuted
                        surprise = step_surprise(one, clip.frames[None], torch.from_numpy(actions)[None])
                        found.setdefault(f"{name}/{kind}", []).append(surprise)
            advance(1)
        write_arrays(file, found)

    files = write_parts(context.world, folder, len(videos), ".npz", write, text=f"watch {len(videos)} videos")
    joined = read_arrays(files)
    if not joined:
        raise BadInput(f"{data}, split {settings.split!r}: no clip has valid actions that differ; give other videos")
    return joined["place"], {name: Surprises(joined[f"{name}/true"], joined[f"{name}/permuted"]) for name in models}


# ---- page


def _page(result: Result, videos: ActedVideos, places: Int[ndarray, "n 2"], found: Mapping[str, Surprises]) -> str:
    facts = [
        (f"{metric}, {name}", f"{row.value:.2f}")
        for (_, metric), cells in result.tasks.items()
        for name, row in cells.items()
    ]
    lines = [["score", *result.columns]]
    lines += [
        [metric, *(f"{cells[name].value:.3f} <small>{cells[name].uncertainty}</small>" for name in result.columns)]
        for (_, metric), cells in result.tasks.items()
    ]
    order = np.argsort(found["pretrained"].margins, kind="stable")
    text = "Share of clips that surprise more under permuted actions, and the ratio of the mean surprises."
    sections = [
        Section("Scores", text, html.table(lines)),
        Section(
            "Most surprising", "Clips whose permuted actions surprise most.", _films(order[::-1], videos, places, found)
        ),
        Section(
            "Least surprising", "Clips whose permuted actions surprise least.", _films(order, videos, places, found)
        ),
    ]
    return html.render("Agency", str(result.protocol["report"]), facts, sections)


def _films(
    order: Int[ndarray, " n"], videos: ActedVideos, places: Int[ndarray, "n 2"], found: Mapping[str, Surprises]
) -> str:
    """Show films, and their surprise over time under true and permuted actions."""
    parts = []
    for row in order[:SHOWN].tolist():
        number, place = int(places[row, 0]), int(places[row, 1])
        for _, clips in videos.read(range(number, number + 1)):
            for clip in (clip for clip in clips if clip.number == place):
                strip = plots.strip(clip.frames[plots.evenly(len(clip.frames))].numpy(), height=64)
                parts.append(html.strips(videos.videos.keys[number], [("frames", plots.jpeg(strip))]))
        own = found["pretrained"]
        steps = np.arange(1, own.true.shape[1] + 1, dtype=float)
        curves = [plots.Curve(kind, steps, getattr(own, kind)[row].astype(float)) for kind in ("true", "permuted")]
        parts.append(plots.plot(curves, title="surprise", across="frame", size=(8.8, 1.6)))
    return "".join(parts)
