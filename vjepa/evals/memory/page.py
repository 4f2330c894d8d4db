"""The page of recall against delay: curves, tables, and films with the error of predictions with and without memory.

Letters: F frames, P height and width in pixels, N clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from vjepa.evals.base import Result
from vjepa.viz import plots
from vjepa.viz.plots import Curve
from vjepa_data import html
from vjepa_data.html import Section

CURVES = ("trained memory", "average", "in sight", "supervised", "window")
"""Features whose curves are drawn. All of them are in the table."""

STRIP_FRAMES = 16
STRIP_PX = 54


@dataclass(frozen=True)
class Film:
    """An act, and how well its clips were predicted."""

    caption: str
    frames: UInt8[ndarray, "F P P 3"]
    seconds: Float[ndarray, " N"]
    """Start of each predicted clip in the video."""
    remembered: Float[ndarray, " N"]
    """Error of the prediction with the memory."""
    alone: Float[ndarray, " N"]
    """Error of the prediction from the newest clip alone."""
    curtain: tuple[float, float]
    """Seconds of the first clip behind the curtain, and of the first after it."""


def memory_page(result: Result, films: Sequence[Film]) -> str:
    """Return the page of a result, as HTML."""
    gains = {task.removeprefix("memory gain, "): row for (task, _), cells in result.tasks.items()
             for name, row in cells.items() if task.startswith("memory gain")}  # fmt: skip
    facts = [(f"memory gain, {name}", f"{row.value:.1%}") for name, row in gains.items()]
    curves = result.details["retention_by_gap_s"]
    facts += [(f"{name}, {gap} s", f"{value:.0%}") for name, values in curves.items() if name == "trained memory"
              for gap, value in values.items()]  # fmt: skip
    sections = [
        _section(result, "retention", "accuracy", RETENTION),
        _section(result, "evolution", "R2", EVOLUTION),
        _section(result, "interference", "R2", INTERFERENCE),
        Section("Memory gain", GAIN, html.table([["clips", "gain", "videos"], *(
            [escape(name), f"{row.value:.3f} <small>{row.uncertainty}</small>", str(row.clips)]
            for name, row in gains.items()
        )])),
        Section("Films", FILMS, "".join(map(_film, films))),
    ]  # fmt: skip
    return html.render("Recall against delay", f"{result.protocol['shards']}", facts, sections)


RETENTION = (
    "Accuracy of a linear readout of the shape behind the curtain, one of four, at the last clip before the curtain "
    "opens. The window is the encoder's own clip, which shows the curtain alone. In sight is a clip that shows the "
    "object. The band is the 95 % interval of the trained memory over resampled videos."
)
EVOLUTION = "R2 of the place of an object that goes on moving behind the curtain. Zero is a prediction of the mean."
INTERFERENCE = "R2 of the number of objects that passed in front of the curtain."
GAIN = (
    "1 - error of predictions with the memory / error from the newest clip alone. Openings are the first clips after "
    "an opening, predicted from the last clip behind the curtain. Elsewhere are clips behind the curtain, as far apart."
)
FILMS = (
    "An act for each delay, and the error of the prediction of each clip from a few clips before. Dashed lines are the "
    "first clip behind the curtain and the first after it. A memory helps where its curve is the lower one."
)


def _section(result: Result, task: str, metric: str, text: str) -> Section:
    """Return the curve and the table of a task over delay."""
    found = {
        float(name.removeprefix(f"{task}, ").removesuffix(" s")): cells
        for (name, _), cells in result.tasks.items()
        if name.startswith(f"{task}, ")
    }
    if not found:
        return html.note(task.capitalize(), "The corpus has too few acts for this task.")
    gaps = sorted(found)
    columns = [name for name in result.columns if any(name in cells for cells in found.values())]
    lines = [["seconds", *map(escape, columns), "acts"]]
    for gap in gaps:
        cells = [found[gap].get(name) for name in columns]
        acts = next(cell.extra["acts"] for cell in cells if cell is not None)
        texts = ["" if cell is None else f"{cell.value:.2f} <small>{cell.uncertainty}</small>" for cell in cells]
        lines.append([f"{gap:g}", *texts, str(acts)])
    curves = []
    for name in (name for name in CURVES if name in columns):
        rows = [found[gap][name] for gap in gaps]
        band = np.array([(row.low, row.high) for row in rows]).T if name == CURVES[0] else None
        curves.append(Curve(name, np.array(gaps), np.array([row.value for row in rows]), band))
    svg = plots.plot(curves, title=f"{task}, {metric}", across="seconds behind the curtain", size=(8.8, 2.8))
    return Section(task.capitalize(), text, svg + html.table(lines))


def _film(film: Film) -> str:
    shown = np.linspace(0, len(film.frames) - 1, min(STRIP_FRAMES, len(film.frames))).round().astype(int)
    picture = plots.jpeg(plots.strip(film.frames[shown], height=STRIP_PX))
    curves = [
        Curve("with the memory", film.seconds, film.remembered),
        Curve("from the newest clip alone", film.seconds, film.alone),
    ]
    error = plots.plot(curves, title="error", across="seconds", marks=film.curtain, size=(8.8, 1.7))
    return (
        f'<figure><figcaption>{escape(film.caption)}</figcaption><div class="wide">'
        f'<img src="{picture}" alt="{escape(film.caption)}"></div>{error}</figure>'
    )
