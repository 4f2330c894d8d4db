"""A picture of actions over frames, in which an action that is a row early or late is seen.

    frame 0   frame 7   frame 15           frames of a clip, each at its place in time
       |   a0    |   a1    |               actions act between two frames: a step between the two
       |  ====   |  =====  |               change of the picture between the two frames
       s0        s1        s2              states are points at their frames

The mean change of the picture must rise and fall with the actions of the same interval. `find_lag` measures this over
frames of the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from vjepa.atomic import new_file
from vjepa.config import Run
from vjepa.viz.plots import COLOURS, FAINT, INK
from vjepa_data.corpus.index import Index
from vjepa_data.errors import BadInput
from vjepa_data.reader import show
from vjepa_data.reader.batch import Clips, Signal
from vjepa_data.settings import Clip
from vjepa_data.signal_spec import SignalSpec, stored_name

CLIPS, LAG_SLOTS, LAG_FRAMES = 3, 24, 17
MAX_COLUMNS = 8
"""Columns that are drawn of a signal."""

LAGS = (-2, -1, 0, 1, 2)
MIN_PAIRS = 8
"""Fewest intervals for a correlation."""

CLEAR = 0.3
"""Smallest correlation that is reported as a relation. Without a relation, 24 clips of 17 frames stay below 0.1."""


@dataclass(frozen=True)
class Lag:
    """How well the change of the picture follows the actions of the same, earlier and later frames."""

    correlations: dict[int, float]
    """Correlation of the change between two frames of the file with the size of the action `lag` frames later."""

    @property
    def best(self) -> int:
        """Number of frames by which the actions come late."""
        return max(self.correlations, key=lambda lag: (self.correlations[lag], -abs(lag)))

    def text(self, name: str, *, stored: str | None = None, frame_s: float | None = None) -> str:
        """Describe the result, with the setting that would mend it.

        Args:
            name: name of the signal.
            stored: the signal that it is derived from, if any, which has the setting.
            frame_s: time between frames of the file, if the signal has another rate. None for a row per frame.
        """
        unit = "row" if frame_s is None else "frame"
        found = ", ".join(f"{lag:+d}: {value:.2f}" for lag, value in self.correlations.items())
        if not self.correlations or max(self.correlations.values()) < CLEAR:
            return f"{name}: the picture does not visibly follow the actions ({found or f'too few {unit}s'})"
        by = f"correlation by {unit}s later: {found}"
        if self.best == 0:
            return f"{name}: the picture follows the actions of the same {unit} ({by})"
        apart = f"{abs(self.best)} {unit}{'s' if abs(self.best) > 1 else ''} {'later' if self.best > 0 else 'earlier'}"
        change = f"shift_rows changed by {-self.best:+d}"
        if frame_s is not None:
            change = f"shift_s changed by {-self.best * frame_s:+.4g}"
        return f"{name}: the picture follows the actions {apart} ({by}); build with signals.{stored or name}.{change}"


def picture_changes(frames: UInt8[ndarray, "B T H W C"]) -> Float[ndarray, "B U"]:
    """Return the mean absolute difference between each frame and the next, in grey levels of 255."""
    wide = frames.astype(np.int16)
    return np.abs(np.diff(wide, axis=1)).mean((2, 3, 4))


def action_sizes(values: Float[ndarray, "B U A"], combine: str) -> Float[ndarray, "B U"]:
    """Return how large each action is: its length for differences, its change for absolute commands."""
    scaled = values / np.where((std := values.std((0, 1))) > 0, std, 1)
    if combine != "sum":
        scaled = np.diff(scaled, axis=1, prepend=scaled[:, :1])
    return np.linalg.norm(scaled, axis=-1)


def find_lag(
    changes: Float[ndarray, "B U"], sizes: Float[ndarray, "B U"], valid: Bool[ndarray, "B U"] | None = None
) -> Lag:
    """Correlate changes of the picture with the sizes of actions some frames earlier and later.

    Args:
        changes, sizes: one for each interval between two frames.
        valid: false where a frame is held or the source has no action. Such intervals are left out.
    """
    count, found = changes.shape[1], {}
    if valid is None:
        valid = np.ones(changes.shape, dtype=bool)
    for lag in LAGS if count > 2 * max(LAGS) else ():
        own = slice(max(0, -lag), count - max(0, lag))
        other = slice(max(0, lag), count - max(0, -lag))
        both = valid[:, own] & valid[:, other]
        if both.sum() < MIN_PAIRS:
            continue
        x, y = changes[:, own][both], sizes[:, other][both]
        spread = x.std() * y.std()
        found[lag] = float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0
    return Lag(found)


def describe_lags(run: Run, *, step: int = 0) -> list[str]:
    """Describe for each action of a run whether the picture follows it, row by row.

    The clips are cut again with every frame of the files, so that a shift by a row is seen.
    """
    texts = []
    for source in run.data.sources:
        index = Index(source.shards, source.split, corpus=source.corpus, part_s=source.part_s)
        every = source.model_copy(update={"frames": None, "fps": None, "duration_s": None, "frame_step": 1})
        clip = Clip(frames=LAG_FRAMES, short="hold")
        data = run.data.model_copy(update={"sources": (every,), "clip": clip, "texts": ()})
        actions = [name for name in run.data.signals if index.signals[name].combine is not None]
        stacked = [(name,) for name in actions if index.signals[name].combine == "stack"]
        others = tuple(name for name in actions if (name,) not in stacked)
        for names in filter(None, (others, *stacked)):  # a stack may not fit the rate of the file
            ask = {"seed": run.seed, "batch_size": run.batch_size * LAG_SLOTS, "step": step, "slots": LAG_SLOTS}
            try:
                (clips,), _ = show.clips(data.model_copy(update={"signals": names}), **ask)
            except BadInput as error:
                texts.append(f"{names[0]}: cannot be compared with the picture frame by frame: {error}")
                continue
            texts += [_describe_lag(clips, name, index) for name in names]
    return texts


def _describe_lag(clips: Clips, name: str, index: Index) -> str:
    signal, combine = clips.signals[name], index.signals[name].combine
    assert combine is not None, f"{name} is an action"
    sizes = action_sizes(signal.values.flatten(2).numpy(), combine)
    lag = find_lag(picture_changes(clips.frames.numpy()), sizes, signal.valid.numpy())
    stored, frame_s = stored_name(name, index.signals), float(np.median(1 / index.fps))
    is_row = np.allclose(index.signal_rates[stored] * frame_s, 1, rtol=1e-3)
    return lag.text(name, stored=stored, frame_s=None if is_row else frame_s)


def draw_signal_sheet(run: Run, path: Path, *, step: int = 0) -> None:
    """Draw the first clips of a step with their signals below their frames.

    Args:
        run: settings of the run.
        path: picture to write: `.png`, `.svg` or `.pdf`.
        step: training step.

    Raises:
        BadInput: the run has no signals, or the suffix is unsupported.
    """
    form = path.suffix[1:]
    if form not in ("png", "svg", "pdf"):
        raise BadInput(f"unsupported picture format {path.suffix!r} of {path}; use .png, .svg or .pdf")
    if not run.data.signals:
        raise BadInput(f"run {run.name} reads no signals; name the signals of its corpus in data.signals")
    from matplotlib.figure import Figure

    ask = {"seed": run.seed, "batch_size": run.batch_size, "step": step, "slots": CLIPS}
    groups, specs = show.clips(run.data, **ask)
    rows = [(clips, i) for clips in groups for i in range(len(clips))][:CLIPS]
    height = 1.6 + 1.1 * (1 + len(run.data.signals))
    figure = Figure(figsize=(13, 0.4 + height * len(rows)), layout="constrained", dpi=110)
    figure.suptitle(
        _plain(f"{run.name}, step {step}: an action acts from its frame to the next"), fontsize=10, color=INK
    )
    panels = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for panel, (clips, i) in zip(panels, rows, strict=True):
        panel.suptitle(
            _plain(f"slot {clips.slots[i]}: {clips.keys[i]} from {clips.start_s[i]:.3f} s"),
            fontsize=8,
            x=0.01,
            ha="left",
        )
        _draw_clip(panel, clips, i, specs)
    with new_file(path, overwrite=True) as partial:
        figure.savefig(partial, format=form, metadata={"Software": None} if form == "png" else None)


def _draw_clip(figure, clips: Clips, i: int, specs: Mapping[str, SignalSpec]) -> None:
    """Draw the frames of a clip, the change of the picture, and each signal, on a common axis of frames."""
    frames = clips.frames[i].numpy()
    count, lines = len(frames), 1 + len(specs)
    boxes = figure.subplots(1 + lines, 1, sharex=True, height_ratios=[1.6] + [1] * lines)
    boxes[0].set_xlim(-0.55, count - 0.45)
    for k, frame in enumerate(frames):
        boxes[0].imshow(frame, extent=(k - 0.46, k + 0.46, 1, 0), aspect="auto")
    boxes[0].set_ylim(1, 0)
    boxes[0].set_yticks([])
    changes = picture_changes(frames[None])[0]
    boxes[1].bar(np.arange(count - 1), changes, 1, align="edge", color="#c9cfd8", edgecolor="white")
    boxes[1].set_ylabel("change of\nthe picture", fontsize=6, color=FAINT)
    for box, (name, spec) in zip(boxes[2:], specs.items(), strict=True):
        _draw_signal(box, name, spec, clips.signals[name], i)
        if spec.combine == "sum" and [column[-1:] for column in spec.columns[:2]] == ["x", "y"]:
            _draw_arrows(boxes[0], clips.signals[name], i)
    for box in boxes[1:]:
        box.tick_params(labelsize=6)
        for k in range(count):
            box.axvline(k, color="#e4e8ee", linewidth=0.6, zorder=0)
        for side in ("top", "right"):
            box.spines[side].set_visible(False)
    boxes[-1].set_xticks(range(count), [f"frame {k}" for k in range(count)])


def _draw_signal(box, name: str, spec: SignalSpec, signal: Signal, i: int) -> None:
    """Draw actions as steps from a frame to the next, and states as points at frames. Gaps are not valid."""
    values, columns = signal.values[i].flatten(1).numpy(), len(spec.columns)  # [n, rows * columns]
    values = np.where(signal.valid[i].numpy()[:, None], values, np.nan)
    for j, (column, unit) in enumerate(zip(spec.columns[:MAX_COLUMNS], spec.units, strict=False)):
        colour, label = COLOURS[j % len(COLOURS)], _plain(f"{column} [{unit}]" if unit else column)
        if spec.combine is None:
            box.plot(values[:, j], "o-", color=colour, markersize=3, linewidth=0.5, label=label)
        else:
            steps = values[:, j::columns].reshape(-1)  # stacked rows lie one after another
            edges = np.linspace(0, len(values), len(steps) + 1)
            box.stairs(steps, edges, baseline=None, color=colour, linewidth=1.6, label=label)
    more = f"\n(first {MAX_COLUMNS} of {columns})" if columns > MAX_COLUMNS else ""
    box.set_ylabel(f"{name}\n{spec.combine or 'at frames'}{more}", fontsize=6, color=FAINT)
    box.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1.1), labelspacing=0.2)


def _plain(text: str) -> str:
    """Return text that matplotlib draws as it is: no formula between dollar signs, no label hidden by an underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _draw_arrows(box, signal: Signal, i: int) -> None:
    """Draw the action after each frame as an arrow from its middle. Its first two columns are x and y."""
    moves = signal.values[i].flatten(1)[:, :2].numpy()
    longest = np.abs(moves).max()
    for k, (x, y) in enumerate(0.4 * moves / (longest or 1)):
        if signal.valid[i, k]:
            arrow = {"arrowstyle": "->", "color": COLOURS[1], "linewidth": 1.4}
            box.annotate("", (k + 0.92 * x, 0.5 + y), (k, 0.5), arrowprops=arrow)
