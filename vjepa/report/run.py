"""The page of a run: curves, what it saw, what its features look like, what they are worth, what happened to it.

What a run cannot show (no probe yet, shards out of reach) is left out, and the page says so.
"""

import json
import math
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


@dataclass(frozen=True)
class Story:
    """What a run folder tells."""

    folder: Path
    run: config.Run
    records: tuple[Record, ...]
    """Lines of metrics.jsonl."""
    attempts: tuple[Record, ...]
    rejected: tuple[Record, ...]
    results: tuple[Result, ...]
    """Of evaluations."""


def run_page(folder: Path) -> str:
    """The page of a run folder, as HTML.

    Raises:
        BadInput: it is not the folder of a run, or its files are damaged.
    """
    story = read_story(folder)
    return html.render(story.run.name, _subtitle(story), _facts(story), list(_sections(story)))


def read_story(folder: Path) -> Story:
    """Read what a run folder holds.

    Raises:
        BadInput: it is not the folder of a run, or its files are damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise BadInput(f"{folder} is not the folder of a run: no config.yaml in it; give runs/NAME")
    run = config.load(folder / "config.yaml").settings
    environment = folder / "environment.json"
    return Story(
        folder,
        run,
        tuple(read_lines(folder / "metrics.jsonl")),
        tuple(read_json(environment).get("attempts", ())) if environment.is_file() else (),
        tuple(line for file in sorted(folder.glob("rejected*.jsonl")) for line in read_lines(file)),
        tuple(find_results(folder)),
    )


def read_lines(file: Path) -> Iterator[Record]:
    """The objects of a JSON-lines file that may be missing, or torn in its last line.

    Raises:
        BadInput: a line before the last one is no JSON object.
    """
    if not file.is_file():
        return
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise BadInput(f"{file}: line {number} is not JSON; the file is damaged, mend or remove it") from None
            return
        yield value


# ---- the top of the page


def _subtitle(story: Story) -> str:
    run, encoder = story.run, story.run.model.encoder
    sources = ", ".join(Path(source.shards).name or source.shards for source in run.data.sources)
    return (
        f"{encoder.name} ({encoder.width} x {encoder.depth}), {run.data.clip.frames} frames of {run.data.crop.px} px "
        f"at {run.data.clip.fps:g} per second, {run.steps:,} steps of {run.batch_size} clips, from {sources}"
    )


def _facts(story: Story) -> list[tuple[str, str]]:
    if not story.records:
        return [("steps made", f"0 of {story.run.steps:,}")]
    step = story.records[-1]["step"]
    facts = [("steps made", f"{step:,}" if step == story.run.steps else f"{step:,} of {story.run.steps:,}")]
    for name, label, form in (
        ("loss/explained", "explained L1", "{:.3f}"),
        ("loss/prediction", "loss", "{:.3f}"),
        ("monitor/rankme", "RankMe", "{:.1f}"),
        ("speed/clips_per_s", "clips per second", "{:,.0f}"),
    ):
        _, values = series(story.records, name)
        if len(values):
            facts.append((label, form.format(float(np.nanmean(values[-max(1, len(values) // 20) :])))))
    if story.attempts:
        facts.append(("attempts", str(len(story.attempts))))
    return facts


def _sections(story: Story) -> Iterator[Section]:
    yield _learning(story)
    yield training_clips_section(story.run)
    yield _features(story)
    yield results_section(story.results, how="No probe yet: vjepa eval probe RUN SHARDS --out RUN/probe.json")
    yield _data(story)
    yield _attempts(story)


def _features(story: Story) -> Section:
    try:
        encoder = load_encoder(resolve(story.folder))
        return features_section(encoder, held_out_clips(story.run, encoder))
    except BadInput as error:
        return html.note("What its features look like", f"Features cannot be shown: {error}")


# ---- curves


def series(records: Sequence[Record], name: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Steps and values of one metric, where it was recorded."""
    pairs = [(one["step"], one[name]) for one in records if name in one]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, float), np.array([math.nan if value is None else value for value in values], float)


def _learning(story: Story) -> Section:
    if not story.records:
        return html.note("Learning", "Nothing is recorded yet.")
    marks = [float(attempt["step"]) for attempt in story.attempts[1:]]
    drawn = []
    for title, names, is_log in (
        ("Loss: L1 of predicted features", {"loss/prediction": "all masks", **_mask_names(story)}, False),
        ("Explained L1: 0 is no better than the mean", {"loss/explained": ""}, False),
        ("RankMe: directions that features use", {"monitor/rankme": ""}, False),
        ("Spread of features", {"monitor/std": ""}, False),
        ("Gradient norm", {"optim/grad_norm": ""}, True),
        ("Learning rate", {"optim/lr": ""}, False),
        ("Weight decay", {"optim/weight_decay": ""}, False),
        ("Rate of the target's moving average", {"optim/ema": ""}, False),
        ("Seconds per step", _times(story), False),
        ("Clips per second", {"speed/clips_per_s": ""}, False),
    ):
        curves = [Curve(label, *series(story.records, name)) for name, label in names.items()]
        curves = [curve for curve in curves if np.isfinite(curve.y).any()]
        if curves:
            drawn.append(plots.plot(curves, title=title, marks=marks, log=is_log))
    text = (
        "The loss of an encoder that chases its own average need not fall; explained L1 and RankMe say more. "
        "A run whose features collapse has RankMe near 1."
    )
    if marks:
        text += " Dashed lines mark where a new attempt went on."
    return Section("Learning", text, f'<div class="grid">{"".join(drawn)}</div>')


def _mask_names(story: Story) -> dict[str, str]:
    return {f"loss/mask_{kind}": f"mask {kind}" for kind in range(len(story.run.objective.mask_kinds))}


def _times(story: Story) -> dict[str, str]:
    names = sorted({name for one in story.records for name in one if name.startswith("time/") and name.endswith("_s")})
    order = ["time/step_s", *(name for name in names if name not in ("time/step_s", "time/slowest_data_s"))]
    return {name: name.removeprefix("time/").removesuffix("_s") for name in order[: len(plots.COLOURS)]}


# ---- the run itself


def _data(story: Story) -> Section:
    rows = [["source", "asked", "seen", "rejected"]]
    total = sum(source.weight for source in story.run.data.sources)
    for number, source in enumerate(story.run.data.sources):
        _, shares = series(story.records, f"data/source_{number}_share")
        seen = f"{np.nanmean(shares):.1%}" if len(shares) else "not recorded"
        bad = sum(one.get("source") == number for one in story.rejected)
        rows.append([escape(f"{source.shards} ({source.split})"), f"{source.weight / total:.1%}", seen, f"{bad:,}"])
    reasons: dict[str, int] = {}
    for one in story.rejected:
        reasons[one.get("reason", "?")] = reasons.get(one.get("reason", "?"), 0) + 1
    why = "; ".join(f"{escape(reason)}: {count:,}" for reason, count in sorted(reasons.items(), key=lambda x: -x[1]))
    text = f"Rejected and replaced: {why}." if why else "No sample was rejected."
    return Section("Data", text, html.table(rows))


def _attempts(story: Story) -> Section:
    rows = [["attempt", "from step", "when", "where", "ranks", "code"]]
    for number, one in enumerate(story.attempts, 1):
        code = one.get("code", {})
        commit = code.get("commit", "")[:10] + ("+" if code.get("dirty") == "true" else "") or code.get("root", "")
        place = f"{one.get('host', '')} {one.get('device', '')}"
        cells = (number, one["step"], one.get("time", ""), place, one.get("world", ""), commit)
        rows.append([escape(str(cell)) for cell in cells])
    settings = "\n".join(f"{name} = {value}" for name, value in flatten(story.run))
    body = _timeline(story) + (html.table(rows) if len(rows) > 1 else "")
    body += f"<details><summary>All settings</summary><pre>{escape(settings)}</pre></details>"
    return Section("The run", f"In {escape(str(story.folder))}.", body)


def _timeline(story: Story) -> str:
    """Steps over hours since the first attempt, a dashed line where each further attempt began."""
    try:
        starts = [time.mktime(time.strptime(one["time"], "%Y-%m-%dT%H:%M:%S%z")) for one in story.attempts]
    except (KeyError, ValueError):
        return ""
    pairs = [(one["time"], one["step"]) for one in story.records if "time" in one]
    if not starts or not pairs:
        return ""
    seconds, steps = np.array(pairs, float).T
    edges = [-math.inf, *starts[1:], math.inf]
    unit, name = (3600, "hours") if max(seconds[-1], starts[-1]) - starts[0] > 7200 else (60, "minutes")
    curves = []
    for number in range(len(starts)):
        mine = (seconds >= edges[number]) & (seconds < edges[number + 1])
        if mine.any():
            curves.append(Curve(f"attempt {number + 1}", (seconds[mine] - starts[0]) / unit, steps[mine]))
    return plots.plot(
        curves[-len(plots.COLOURS) :],
        title="Steps made over time",
        marks=[(start - starts[0]) / unit for start in starts[1:]],
        across=f"{name} since the first attempt began",
        size=(8.9, 2.2),
    )
