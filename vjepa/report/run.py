"""The page of a run: curves, training clips, features, evaluations, data and attempts.

The page names missing parts, for instance clips of unreachable shards.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vjepa import config
from vjepa.checkpoints.checkpoint import resolve
from vjepa.evals.base import Result
from vjepa.evals.results import find_results
from vjepa.report.features import features_section, held_out_clips
from vjepa.report.results import results_section
from vjepa.report.training_clips import training_clips_section
from vjepa.viz import plots
from vjepa.viz.plots import Curve
from vjepa.weights.load import load_encoder
from vjepa.weights.tensors import read_json
from vjepa_data import html
from vjepa_data.config_files import flatten
from vjepa_data.html import Section
from vjepa_data.settings import BadInput

Record = dict[str, Any]


# Titles of plots. Other metrics are shown under their names.
TITLES = {
    "loss/explained": "Explained loss (0: no better than the mean)",
    "monitor/rankme": "RankMe (directions that the features use)",
    "monitor/std": "Standard deviation of the features",
    "optim/grad_norm": "Gradient norm",
    "optim/lr": "Learning rate",
    "optim/weight_decay": "Weight decay",
    "optim/ema": "Momentum of the moving average",
    "speed/clips_per_s": "Clips per second",
}
PLOTTED = ("loss/", "monitor/", "optim/")
LOGARITHMIC = ("optim/grad_norm",)
NOT_PLOTTED = ("optim/applied",)


@dataclass(frozen=True)
class RunHistory:
    """The content of a run folder."""

    folder: Path
    run: config.Run
    records: tuple[Record, ...]
    """Lines of metrics.jsonl."""
    attempts: tuple[Record, ...]
    rejected: tuple[Record, ...]
    results: tuple[Result, ...]
    """Results of evaluations."""

    @property
    def metrics(self) -> list[str]:
        """Names of all recorded metrics, in the order in which they appeared."""
        return list(dict.fromkeys(name for record in self.records for name in record))


def run_page(folder: Path) -> str:
    """Return the page of a run folder as HTML.

    Raises:
        BadInput: the folder is not a run, or its files are damaged.
    """
    history = read_history(folder)
    return html.render(history.run.name, _subtitle(history), _facts(history), list(_sections(history)))


def read_history(folder: Path) -> RunHistory:
    """Read a run folder.

    Raises:
        BadInput: the folder is not a run, or its files are damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise BadInput(f"{folder} is not a run folder: config.yaml is missing; give runs/NAME")
    run = config.load(folder / "config.yaml").settings
    environment = folder / "environment.json"
    return RunHistory(
        folder,
        run,
        tuple(read_lines(folder / "metrics.jsonl")),
        tuple(read_json(environment).get("attempts", ())) if environment.is_file() else (),
        tuple(line for file in sorted(folder.glob("rejected*.jsonl")) for line in read_lines(file)),
        tuple(find_results(folder)),
    )


def read_lines(file: Path) -> Iterator[Record]:
    """Yield the objects of a JSON-lines file. The file may be missing, and its last line may be incomplete.

    Raises:
        BadInput: a line before the last line is invalid.
    """
    if not file.is_file():
        return
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise BadInput(f"{file}: line {number} is not JSON; repair or remove the file") from None
            return
        yield value


# ---- the top of the page


def _subtitle(history: RunHistory) -> str:
    run, encoder = history.run, history.run.model.encoder
    sources = ", ".join(Path(source.shards).name or source.shards for source in run.data.sources)
    return (
        f"{encoder.name} ({encoder.width} x {encoder.depth}), {run.data.clip.frames} frames of {run.data.crop.px} px "
        f"at {run.data.clip.fps:g} per second, {run.steps:,} steps of {run.batch_size} clips, from {sources}"
    )


def _facts(history: RunHistory) -> list[tuple[str, str]]:
    total = f"{history.run.steps:,}"
    if not history.records:
        return [("steps", f"0 of {total}")]
    step = f"{history.records[-1]['step']:,}"
    facts = [("steps", step if step == total else f"{step} of {total}")]
    losses = [name for name in history.metrics if name.startswith("loss/") and _stem(name) == name]
    for name, label, form in (
        *((name, name, "{:.3f}") for name in losses[:2]),
        ("monitor/rankme", "RankMe", "{:.1f}"),
        ("speed/clips_per_s", "clips per second", "{:,.0f}"),
    ):
        _, values = series(history.records, name)
        if len(values):
            facts.append((label, form.format(float(np.nanmean(values[-max(1, len(values) // 20) :])))))
    if history.attempts:
        facts.append(("attempts", str(len(history.attempts))))
    return facts


def _sections(history: RunHistory) -> Iterator[Section]:
    yield _learning(history)
    yield training_clips_section(history.run)
    yield _features(history)
    how = "No results yet. Make some with `vjepa eval probe RUN SHARDS --out RUN/probe.json`."
    yield results_section(history.results, how=how)
    yield _data(history)
    yield _attempts(history)


def _features(history: RunHistory) -> Section:
    try:
        encoder = load_encoder(resolve(history.folder))
        return features_section(encoder, held_out_clips(history.run, encoder))
    except BadInput as error:
        return html.note("Features", f"Features cannot be shown: {error}")


# ---- curves


def series(records: Sequence[Record], name: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the steps at which a metric was recorded, and its values."""
    pairs = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, float), np.array([math.nan if value is None else value for value in values], float)


def _learning(history: RunHistory) -> Section:
    if not history.records:
        return html.note("Learning", "Nothing is recorded yet.")
    marks = [float(attempt["step"]) for attempt in history.attempts[1:]]
    drawn = []
    for title, names in _plots(history.metrics).items():
        labels = [name.removeprefix(f"{_stem(name)}_").split("/")[-1] for name in names]
        curves = [Curve(label, *series(history.records, name)) for label, name in zip(labels, names, strict=True)]
        curves = [curve for curve in curves if np.isfinite(curve.y).any()]
        if curves:
            drawn.append(plots.plot(curves, title=title, marks=marks, log=names[0] in LOGARITHMIC))
    text = "A loss with a moving target need not fall. RankMe near 1 means that the features have collapsed."
    if marks:
        text += " Dashed lines mark the first step of each further attempt."
    return Section("Learning", text, f'<div class="grid">{"".join(drawn)}</div>')


def _plots(metrics: Sequence[str]) -> dict[str, list[str]]:
    """Group metrics by plot: names that differ only in a number at the end share a plot, as all times do."""
    groups: dict[str, list[str]] = {}
    for prefix in PLOTTED:
        for name in metrics:
            if name.startswith(prefix) and name not in NOT_PLOTTED:
                groups.setdefault(TITLES.get(name, _stem(name)), []).append(name)
    times = sorted(name for name in metrics if re.fullmatch(r"time/(?!step_s|slowest_data_s).*_s", name))
    groups["Seconds per step"] = ["time/step_s", *times][: len(plots.COLOURS)]
    groups[TITLES["speed/clips_per_s"]] = ["speed/clips_per_s"]
    return groups


def _stem(name: str) -> str:
    """Return a metric's name without a number at its end: `loss/mask` for `loss/mask_1`."""
    return re.sub(r"_\d+$", "", name)


# ---- the run itself


def _data(history: RunHistory) -> Section:
    rows = [["source", "requested share", "realized share", "rejected"]]
    total = sum(source.weight for source in history.run.data.sources)
    for number, source in enumerate(history.run.data.sources):
        _, shares = series(history.records, f"data/source_{number}_share")
        realized = f"{np.nanmean(shares):.1%}" if len(shares) else "not recorded"
        bad = sum(reject.get("source") == number for reject in history.rejected)
        rows.append([escape(f"{source.shards} ({source.split})"), f"{source.weight / total:.1%}", realized, f"{bad:,}"])
    reasons: dict[str, int] = {}
    for reject in history.rejected:
        reasons[reject.get("reason", "?")] = reasons.get(reject.get("reason", "?"), 0) + 1
    why = "; ".join(f"{escape(reason)}: {count:,}" for reason, count in sorted(reasons.items(), key=lambda x: -x[1]))
    text = f"Rejected and replaced: {why}." if why else "No sample was rejected."
    return Section("Data", text, html.table(rows))


def _attempts(history: RunHistory) -> Section:
    rows = [["attempt", "from step", "when", "where", "ranks", "code"]]
    for number, attempt in enumerate(history.attempts, 1):
        code = attempt.get("code", {})
        commit = code.get("commit", "")[:10] + ("+" if code.get("dirty") == "true" else "") or code.get("root", "")
        machine = f"{attempt.get('host', '')} {attempt.get('device', '')}"
        cells = (number, attempt["step"], attempt.get("time", ""), machine, attempt.get("world", ""), commit)
        rows.append([escape(str(cell)) for cell in cells])
    settings = "\n".join(f"{name} = {value}" for name, value in flatten(history.run))
    body = _timeline(history) + (html.table(rows) if len(rows) > 1 else "")
    body += f"<details><summary>All settings</summary><pre>{escape(settings)}</pre></details>"
    return Section("The run", f"In {escape(str(history.folder))}.", body)


def _timeline(history: RunHistory) -> str:
    """Plot steps over time since the first attempt, with a dashed line at the start of each further attempt."""
    try:
        starts = [time.mktime(time.strptime(attempt["time"], "%Y-%m-%dT%H:%M:%S%z")) for attempt in history.attempts]
    except (KeyError, ValueError):
        return ""
    pairs = [(record["time"], record["step"]) for record in history.records if "time" in record]
    if not starts or not pairs:
        return ""
    seconds, steps = np.array(pairs, float).T
    edges = [-math.inf, *starts[1:], math.inf]
    unit, name = (3600, "hours") if max(seconds[-1], starts[-1]) - starts[0] > 7200 else (60, "minutes")
    curves = []
    for number in range(len(starts)):
        within = (seconds >= edges[number]) & (seconds < edges[number + 1])
        if within.any():
            curves.append(Curve(f"attempt {number + 1}", (seconds[within] - starts[0]) / unit, steps[within]))
    return plots.plot(
        curves[-len(plots.COLOURS) :],
        title="Steps over time",
        marks=[(start - starts[0]) / unit for start in starts[1:]],
        across=f"{name} since the start of the first attempt",
        size=(8.9, 2.2),
    )
