"""A picture of actions over frames, in which an action that is a row early or late is seen.

    frame 0   frame 7   frame 15           frames of a clip, each at its place in time
       |   a0    |   a1    |               actions act between two frames: a step between the two
       |  ====   |  =====  |               change of the picture between the two frames
       s0        s1        s2              states are points at their frames

The mean change of the picture must rise and fall with the actions of the same interval. `find_lag` measures this over
source rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from vjepa.atomic import new_file
from vjepa.config import Run
from vjepa.viz.plots import COLOURS, FAINT, INK
from vjepa_data.errors import BadInput
from vjepa_data.reader import show
from vjepa_data.reader.batch import Clips, Signal
from vjepa_data.settings import Clip
from vjepa_data.signal_spec import SignalSpec

CLIPS, LAG_SLOTS, LAG_FRAMES = 3, 24, 17
MAX_COLUMNS = 8
"""Columns that are drawn of a signal."""

LAGS = (-2, -1, 0, 1, 2)
CLEAR = 0.3
"""Smallest correlation that is reported as a relation. Without a relation, 24 clips of 17 frames stay below 0.1."""


@dataclass(frozen=True)
class Lag:
    """How well the change of the picture follows the actions of the same, earlier and later rows."""

    correlations: dict[int, float]
    """Correlation of the change between two source frames with the size of the action `lag` rows later."""

    @property
    def best(self) -> int:
        """Number of rows by which the actions come late."""
        return max(self.correlations, key=lambda lag: (self.correlations[lag], -abs(lag)))

    def text(self, name: str) -> str:
        """Describe the result, with the setting that would mend it."""
        found = ", ".join(f"{lag:+d}: {value:.2f}" for lag, value in self.correlations.items())
        if not self.correlations or max(self.correlations.values()) < CLEAR:
            return f"{name}: the picture does not visibly follow the actions ({found or 'too few rows'})"
        if self.best == 0:
            return f"{name}: the picture follows the actions of the same row (correlation by rows later: {found})"
        rows = f"{abs(self.best)} row{'s' if abs(self.best) > 1 else ''} {'later' if self.best > 0 else 'earlier'}"
        return (
            f"{name}: the picture follows the actions {rows} "
            f"(correlation by rows later: {found}); build with signals.{name}.shift_rows changed by {-self.best:+d}"
        )


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


def find_lag(changes: Float[ndarray, "B U"], sizes: Float[ndarray, "B U"]) -> Lag:
    """Correlate changes of the picture with the sizes of actions some rows earlier and later."""
    count, found = changes.shape[1], {}
    for lag in LAGS if count > 2 * max(LAGS) else ():
        own = slice(max(0, -lag), count - max(0, lag))
        other = slice(max(0, lag), count - max(0, -lag))
        x, y = changes[:, own].ravel(), sizes[:, other].ravel()
        spread = x.std() * y.std()
        found[lag] = float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0
    return Lag(found)


def describe_lags(run: Run, *, step: int = 0) -> list[str]:
    """Describe for each action of a run whether the picture follows it, row by row.

    The clips are cut again with every frame of the files, so that a shift by a row is seen.
    """
    texts = []
    for source in run.data.sources:
        every = source.model_copy(update={"frames": None, "fps": None, "duration_s": None, "frame_step": 1})
        clip = Clip(frames=LAG_FRAMES, short="hold")
        data = run.data.model_copy(update={"sources": (every,), "clip": clip, "texts": ()})
        ask = {"seed": run.seed, "batch_size": run.batch_size * LAG_SLOTS, "step": step, "slots": LAG_SLOTS}
        (clips,), specs = show.clips(data, **ask)
        changes = picture_changes(clips.frames.numpy())
        for name, spec in specs.items():
            if spec.combine is not None:
                sizes = action_sizes(clips.signals[name].values.flatten(2).numpy(), spec.combine)
                texts.append(find_lag(changes, sizes).text(name))
    return texts


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
    figure.suptitle(f"{run.name}, step {step}: an action acts from its frame to the next", fontsize=10, color=INK)
    panels = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for panel, (clips, i) in zip(panels, rows, strict=True):
        panel.suptitle(
            f"slot {clips.slots[i]}: {clips.keys[i]} from {clips.start_s[i]:.3f} s", fontsize=8, x=0.01, ha="left"
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
        if spec.combine == "sum" and [column[-1] for column in spec.columns[:2]] == ["x", "y"]:
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
        colour, label = COLOURS[j % len(COLOURS)], f"{column} [{unit}]"
        if spec.combine is None:
            box.plot(values[:, j], "o-", color=colour, markersize=3, linewidth=0.5, label=label)
        else:
            steps = values[:, j::columns].reshape(-1)  # stacked rows lie one after another
            edges = np.linspace(0, len(values), len(steps) + 1)
            box.stairs(steps, edges, baseline=None, color=colour, linewidth=1.6, label=label)
    more = f"\n(first {MAX_COLUMNS} of {columns})" if columns > MAX_COLUMNS else ""
    box.set_ylabel(f"{name}\n{spec.combine or 'at frames'}{more}", fontsize=6, color=FAINT)
    box.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1.1), labelspacing=0.2)


def _draw_arrows(box, signal: Signal, i: int) -> None:
    """Draw the action after each frame as an arrow from its middle. Its first two columns are x and y."""
    moves = signal.values[i].flatten(1)[:, :2].numpy()
    longest = np.abs(moves).max()
    for k, (x, y) in enumerate(0.4 * moves / (longest or 1)):
        if signal.valid[i, k]:
            arrow = {"arrowstyle": "->", "color": COLOURS[1], "linewidth": 1.4}
            box.annotate("", (k + 0.92 * x, 0.5 + y), (k, 0.5), arrowprops=arrow)
