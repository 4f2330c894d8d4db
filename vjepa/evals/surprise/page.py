"""The page of a violation of expectation: accuracy by condition, and films with their surprise over time.

Letters: F frames, P height and width in pixels.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from vjepa.evals.base import Result
from vjepa.viz import plots
from vjepa.weights.world_model import WorldModel
from vjepa_data import html
from vjepa_data.evaluation.violations import ViolationSet, read_films
from vjepa_data.html import Section
from vjepa_data.media.video import Refused

SHOWN_PAIRS = 3  # of the best, and of the worst


def surprise_page(films: ViolationSet, result: Result, model: WorldModel, frame_step: int | None) -> str:
    """Return the page of a result, as HTML.

    Args:
        films: the films that were compared.
        result: scores, and the surprise of each film over its windows.
        model: the model, for the size in which films are shown.
        frame_step: every so many frames are shown.
    """
    scores = result.details["films"]
    margin = [float(np.mean(scores[bad]["surprise"]) - np.mean(scores[good]["surprise"])) for good, bad in films.pairs]
    order = np.argsort(margin, kind="stable")
    best, worst = order[::-1][:SHOWN_PAIRS], order[:SHOWN_PAIRS]
    overall = result.tasks["all", "pairs"]
    facts = [
        (f"of {len(films.pairs)} pairs right", f"{overall['pretrained'].value:.0%}"),
        *((name, f"{overall[name].value:.0%}") for name in ("random init", "copy pixels", "oracle") if name in overall),
    ]
    sections = [
        Section("Pairs by condition", _explanation(result), _by_condition(result, "pairs")),
        *([Section("Groups by condition", GROUPS, groups)] if (groups := _by_condition(result, "groups")) else []),
        *_doses(result.details["by_dose"]),
        Section("Shortcuts", SHORTCUTS, _shortcuts(result.details["shortcuts"])),
        Section("Most surprising", BEST, _pairs(films, best, scores, model, frame_step)),
        Section("Least surprising", WORST, _pairs(films, worst, scores, model, frame_step)),
    ]
    return html.render("Violation of expectation", f"{result.protocol['films']}", facts, sections)


SHORTCUTS = "Accuracy of a logistic regression without any sequence of events, on scenes left out. The band is chance."
GROUPS = (
    "Share of groups whose impossible films together surprise more than their possible films. The films of a group "
    "have the same halves, so that what a half looks like cancels out."
)
BEST = "The pairs whose impossible film surprised the model most, compared with the possible film."
WORST = "The pairs whose impossible film surprised the model least, compared with the possible film."


def _explanation(result: Result) -> str:
    return escape(
        "Share of pairs in which the film that breaks a law surprises more than the one that obeys it; chance is one "
        f"half. Intervals: {result.protocol['interval']}."
    )


def _by_condition(result: Result, metric: str) -> str:
    rows = [task for task, of in result.tasks if of == metric]
    if not rows:
        return ""
    columns = result.columns
    lines = [["condition", *map(escape, columns)]]
    for task in rows:
        cells = result.tasks[task, metric]
        lines.append(
            [escape(task), *(f"{cells[name].value:.2f} <small>{cells[name].uncertainty}</small>" for name in columns)]
        )
    shown = [name for name in ("pretrained", "random init", "copy pixels", "copy features") if name in columns]
    series = {
        name: [(cell.value, cell.low, cell.high) for cell in (result.tasks[task, metric][name] for task in rows)]
        for name in shown
    }
    return plots.bars(rows, series, title=f"accuracy of {metric}") + html.table(lines)


def _doses(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    own = [row for row in rows if row["features"] == "pretrained"]
    if not own:
        return []
    doses = sorted({row["hidden_frames"] for row in own})
    curves = []
    for condition in dict.fromkeys(row["condition"] for row in own):
        found = {row["hidden_frames"]: row["accuracy"] for row in own if row["condition"] == condition}
        y = np.array([found.get(dose, np.nan) for dose in doses])
        curves.append(plots.Curve(condition, np.array(doses, float), y))
    halves = [curves[: len(plots.COLOURS)], curves[len(plots.COLOURS) :]]
    pictures = [plots.plot(part, title="pair accuracy", across="frames behind the screen") for part in halves if part]
    text = "Pair accuracy of the trained model against the time for which the violation is hidden."
    return [Section("Time of hiding", text, f'<div class="grid">{"".join(pictures)}</div>')]


def _shortcuts(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [["statistic", "accuracy", "band", ""]]
    for row in rows:
        verdict = "chance" if row["is_chance"] else "<b>a shortcut</b>"
        lines.append([row["statistic"], f"{row['accuracy']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", verdict])
    return html.table(lines)


def _pairs(
    films: ViolationSet,
    chosen: Sequence[int] | ndarray,
    scores: Sequence[Mapping[str, Any]],
    model: WorldModel,
    frame_step: int | None,
) -> str:
    """Show pairs: the frames of both films, and the surprise of their windows."""
    pairs = [films.pairs[int(pair)] for pair in chosen]
    wanted = [films.films[place] for pair in pairs for place in pair]
    frames = list(read_films(wanted, px=model.px, fps=model.fps, frame_step=frame_step))
    parts = []
    for number, (good, bad) in enumerate(pairs):
        film = films.films[bad]
        rows = [
            (name, _strip(shown))
            for name, shown in zip(("obeys", "breaks"), frames[2 * number : 2 * number + 2], strict=True)
            if not isinstance(shown, Refused)
        ]
        curves = [
            plots.Curve(name, np.arange(len(values), dtype=float), np.array(values))
            for name, values in (("obeys", scores[good]["surprise"]), ("breaks", scores[bad]["surprise"]))
        ]
        dose = "" if film.dose is None else f", hidden for {film.dose} frames"
        parts.append(html.strips(f"{film.condition}{dose}: {film.name}", rows))
        parts.append(plots.plot(curves, title="surprise", across="window", size=(8.8, 1.6)))
    return "".join(parts)


def _strip(frames: UInt8[ndarray, "F P P 3"]) -> str:
    shown = np.linspace(0, len(frames) - 1, min(14, len(frames))).round().astype(int)
    return plots.jpeg(plots.strip(frames[shown], height=64))
