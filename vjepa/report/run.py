"""One page about a run, in one file: curves, what it saw, what its features look like, what they are worth.

    vjepa report runs/X                 writes runs/X/report.html

The page needs nothing but itself: pictures are inside it, there is no script, and it prints. What a run cannot show
(no probe yet, shards out of reach) is left out, and the page says so.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vjepa import config
from vjepa.evals.clips import EvalClips
from vjepa.masks import sample_masks
from vjepa.model.grid import Grid
from vjepa.output import new_file
from vjepa.release.native import VideoEncoder
from vjepa.release.read import load_encoder
from vjepa.release.tensors import read_json
from vjepa.release.weights import random_encoder
from vjepa.report import page, pictures
from vjepa.report.page import Section
from vjepa.report.pictures import Curve
from vjepa.run.checkpoint import resolve
from vjepa_data.batch import Clips
from vjepa_data.loader import ClipLoader, open_plan
from vjepa_data.settings import BadInput, Loader
from vjepa_data.settings_files import flatten

log = logging.getLogger(__name__)

CLIPS = 3  # of each kind of picture
FRAMES = 8  # of a strip
STRIP_PX = 112

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
    probe: Record | None


def report(source: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the page of a run.

    Args:
        source: a run folder.
        out: file to write; by default `report.html` in the run folder, where an earlier page is replaced.
        overwrite: replace a file at `out`.

    Returns:
        Where the page is.

    Raises:
        BadInput: no run there, or the place is taken.
    """
    story = read_story(source)
    sections = [section for section in _sections(story) if section is not None]
    text = page.render(story.run.name, _subtitle(story), _facts(story), sections)
    path = out or source / "report.html"
    with new_file(path, overwrite=overwrite or out is None) as file:
        file.write_text(text)
    log.info("%s: %.1f MB", path, len(text) / 1e6)
    return path


def read_story(folder: Path) -> Story:
    """Read what a run folder holds.

    Raises:
        BadInput: it is not the folder of a run, or its files are damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise BadInput(f"{folder} is not the folder of a run: no config.yaml in it; give runs/NAME")
    run = config.load(folder / "config.yaml").settings
    environment = folder / "environment.json"
    probe = folder / "probe.json"
    return Story(
        folder,
        run,
        tuple(read_lines(folder / "metrics.jsonl")),
        tuple(read_json(environment).get("attempts", ())) if environment.is_file() else (),
        tuple(line for file in sorted(folder.glob("rejected*.jsonl")) for line in read_lines(file)),
        read_json(probe) if probe.is_file() else None,
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


def _sections(story: Story) -> Iterator[Section | None]:
    yield _learning(story)
    yield from _what_it_sees(story)
    yield from _features(story)
    if story.probe is not None:
        yield _probe(story.probe)
    else:
        yield page.note("What the features are worth", "No probe yet: vjepa eval probe RUN SHARDS --out RUN/probe.json")
    yield _health(story)
    yield _run(story)


# ---- curves


def series(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, where it was recorded."""
    pairs = [(one["step"], one[name]) for one in records if name in one]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, float), np.array([math.nan if value is None else value for value in values], float)


def _learning(story: Story) -> Section:
    if not story.records:
        return page.note("Learning", "Nothing is recorded yet.")
    marks = [float(attempt["step"]) for attempt in story.attempts[1:]]
    plots = []
    for title, names, is_log in (
        ("Loss: L1 of predicted features", {"loss/prediction": "all masks", **_mask_names(story)}, False),
        ("Explained L1: 0 is no better than the mean", {"loss/explained": ""}, False),
        ("RankMe: directions that features use", {"monitor/rankme": ""}, False),
        ("Spread of features", {"monitor/std": ""}, False),
        ("Gradient norm", {"optim/grad_norm": ""}, True),
        ("Learning rate", {"optim/lr": ""}, False),
        ("Seconds per step", _times(story), False),
        ("Clips per second", {"speed/clips_per_s": ""}, False),
    ):
        curves = [Curve(label, *series(story.records, name)) for name, label in names.items()]
        curves = [curve for curve in curves if np.isfinite(curve.y).any()]
        if curves:
            plots.append(pictures.plot(curves, title=title, marks=marks, log=is_log))
    text = (
        "The loss of an encoder that chases its own average need not fall; explained L1 and RankMe say more. "
        "A run whose features collapse has RankMe near 1."
    )
    if marks:
        text += " Dashed lines mark where a new attempt went on."
    return Section("Learning", text, f'<div class="grid">{"".join(plots)}</div>')


def _mask_names(story: Story) -> dict[str, str]:
    return {f"loss/mask_{kind}": f"mask {kind}" for kind in range(len(story.run.masks))}


def _times(story: Story) -> dict[str, str]:
    names = sorted({name for one in story.records for name in one if name.startswith("time/") and name.endswith("_s")})
    order = ["time/step_s", *(name for name in names if name not in ("time/step_s", "time/slowest_data_s"))]
    return {name: name.removeprefix("time/").removesuffix("_s") for name in order[: len(pictures.COLOURS)]}


# ---- clips, masks


def _what_it_sees(story: Story) -> Iterator[Section]:
    title = "What it sees"
    try:
        clips = training_clips(story.run, step=0)
    except BadInput as error:
        yield page.note(title, f"The clips cannot be shown from here: {error}")
        return
    blocks = [_masked_strips(story.run, one, slot) for one in clips for slot in range(len(one))][:CLIPS]
    shares = _shares(story.run, clips[0])
    yield Section(
        title,
        "Clips of the first step, cropped as the run saw them, and through each kind of mask. The encoder gets the "
        "tokens that are left in colour; the predictor guesses the features of the orange ones. " + shares,
        "".join(blocks),
    )


def training_clips(run: config.Run, *, step: int, groups: int = CLIPS) -> list[Clips]:
    """Some clips of a step exactly as training sees them, which is a function of the settings.

    Args:
        run: the run.
        step: which one.
        groups: of lanes to show, of one or a few clips each.

    Raises:
        BadInput: the corpora cannot be read.
    """
    lanes = open_plan(run.data, seed=run.seed, batch_size=run.batch_size).lanes
    loader = Loader(workers=0, decoder=run.loader.decoder)
    found = []
    for rank in range(min(groups, lanes)):
        with ClipLoader(
            run.data, loader, seed=run.seed, batch_size=run.batch_size, rank=rank, world=lanes, step=step
        ) as clips:
            found += next(clips).groups
    return found


def _masks(run: config.Run, clips: Clips, row: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each kind of mask: its number, and which tokens of one clip are visible and hidden, bool [t h w]."""
    _, frames, height, width, _ = clips.frames.shape
    grid = Grid.of(frames, height, width, run.model)
    for mask in sample_masks(run.masks, grid, seed=run.seed, step=0, slots=clips.slots[row : row + 1]):
        sides = []
        for ids in (mask.visible[0], mask.hidden[0]):
            side = np.zeros(grid.tokens, bool)
            side[ids.numpy()] = True
            sides.append(side.reshape(grid.t, grid.h, grid.w))
        yield mask.kind, sides[0], sides[1]


def _masked_strips(run: config.Run, clips: Clips, row: int) -> str:
    frames = clips.frames[row].numpy()
    shown = _evenly(len(frames), FRAMES)
    strips = [("clip", frames[shown])]
    for kind, visible, hidden in _masks(run, clips, row):
        strips.append((f"mask {kind}", pictures.draw_masks(frames, visible, hidden)[shown]))
    caption = f"{clips.keys[row]} at {clips.start_s[row]:.1f} s"
    return page.strips(caption, [(name, pictures.jpeg(pictures.strip(one, height=STRIP_PX))) for name, one in strips])


def _shares(run: config.Run, clips: Clips) -> str:
    words = [
        f"mask {kind} ({run.masks[kind].mode}) shows {visible.mean():.0%} and asks for {hidden.mean():.0%}"
        for kind, visible, hidden in _masks(run, clips, 0)
    ]
    return f"Of these tokens, {', '.join(words)}."


def _evenly(count: int, wanted: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(count, wanted)).round().astype(int)


# ---- features


def _features(story: Story) -> Iterator[Section]:
    title = "What its features look like"
    try:
        encoder = load_encoder(resolve(story.folder))
        clips = _held_out(story.run, encoder)
    except BadInput as error:
        yield page.note(title, f"Features cannot be shown: {error}")
        return
    frames = torch.stack([clip.frames for clip in clips])
    rows = []
    with torch.no_grad():
        coloured = {
            "pretrained": pictures.feature_colours(encoder(frames)),
            "random init": pictures.feature_colours(random_encoder(encoder, 0)(frames)),
        }
    t = coloured["pretrained"].shape[1]
    shown = _evenly(t, FRAMES)
    for number, clip in enumerate(clips):
        tubelets = clip.frames.numpy()[:: encoder.model.tubelet_frames][:t]
        strips = [("clip", pictures.jpeg(pictures.strip(tubelets[shown], height=STRIP_PX)))]
        for name, colours in coloured.items():
            strips.append((name, pictures.png(pictures.strip(colours[number][shown], height=STRIP_PX))))
        rows.append(page.strips(f"{clip.key} at {clip.start_s:.1f} s", strips))
    yield Section(
        title,
        "The three main directions of the features of all tokens, as red, green and blue, over time: tokens of one "
        "colour mean much the same to the encoder. The lower row is the same encoder before training.",
        "".join(rows),
    )


def _held_out(run: config.Run, encoder: VideoEncoder) -> list:
    """A few clips that the run did not train on, if its first corpus has any."""
    source = run.data.sources[0]
    splits = read_json(Path(source.shards) / "manifest.json").get("splits", {})
    split = next((name for name in ("val", "test") if name in splits), source.split)
    clips = EvalClips(
        Path(source.shards), split=split, px=encoder.px, frames=encoder.frames, fps=encoder.fps, max_videos=CLIPS
    )
    return list(clips)[:CLIPS]


# ---- probe


def _probe(result: Record) -> Section:
    rows = result["rows"]
    names = list(dict.fromkeys(row["features"] for row in rows))
    tasks = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    found = {(row["task"], row["features"]): row for row in rows}
    table = [["probe", "score", *names]]
    for task, metric in tasks:
        cells = [_cell(found[task, name]) for name in names]
        values = [found[task, name]["value"] for name in names]
        if values.count(max(values)) == 1:
            cells[values.index(max(values))] = f"<b>{cells[values.index(max(values))]}</b>"
        table.append([escape(task), escape(metric), *cells])
    bars = pictures.bars(
        [f"{task}\n{metric}".replace(" ", "\n") for task, metric in tasks],
        {name: [_bar(found[task, name]) for task, _ in tasks] for name in names},
        title="Linear readouts of frozen features",
    )
    protocol = result["protocol"]
    text = (
        f"{protocol['readout'].capitalize()}; fitted on {protocol['fit']} ({protocol['clips']['fit']} clips), "
        f"reported on {protocol['report']} ({protocol['clips']['report']} clips). In brackets: {protocol['interval']}; "
        "for random init, the deviation over seeds. What pixels or an untrained encoder can do was not learned."
    )
    return Section("What the features are worth", escape(text), bars + page.table(table))


def _bar(row: Record) -> tuple[float, float, float]:
    return row["value"], row["low"], row["high"]


def _cell(row: Record) -> str:
    if seeds := row.get("seeds"):
        return f"{row['value']:.3f} <small>±{np.std(seeds):.3f}, {len(seeds)} seeds</small>"
    return f"{row['value']:.3f} <small>[{row['low']:.3f}, {row['high']:.3f}]</small>"


# ---- the run itself


def _health(story: Story) -> Section:
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
    return Section("Data", text, page.table(rows))


def _run(story: Story) -> Section:
    rows = [["attempt", "from step", "when", "where", "ranks", "code"]]
    for number, one in enumerate(story.attempts, 1):
        code = one.get("code", {})
        commit = code.get("commit", "")[:10] + ("+" if code.get("dirty") == "true" else "") or code.get("root", "")
        place = f"{one.get('host', '')} {one.get('device', '')}"
        cells = (number, one["step"], one.get("time", ""), place, one.get("world", ""), commit)
        rows.append([escape(str(cell)) for cell in cells])
    settings = "\n".join(f"{name} = {value}" for name, value in flatten(story.run))
    body = page.table(rows) if len(rows) > 1 else ""
    body += f"<details><summary>All settings</summary><pre>{escape(settings)}</pre></details>"
    return Section("The run", f"In {escape(str(story.folder))}.", body)
