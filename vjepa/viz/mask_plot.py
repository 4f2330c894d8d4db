"""A picture of the masks of a run: a few clips, and the averages over many.

    kind   | a few clips, tubelet by tubelet | chance to be hidden, over the picture | shares over time

Each kind of mask has a row for each clip length in the mixture.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from vjepa.atomic import new_file
from vjepa.config import Run
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid, clip_grid
from vjepa_data.settings import BadInput

VISIBLE, HIDDEN, NEITHER = "#2563eb", "#ea7317", "#c9cfd8"
CLIPS, TUBELETS, SLOTS = 3, 8, 240


def draw_mask_sheet(run: Run, path: Path, *, step: int = 0) -> None:
    """Draw the masks of the first slots of a step, and their averages over its first 240 slots.

    Args:
        run: settings of the run, which give the masks, the token grids and the seed.
        path: picture to write. Its suffix gives the format: `.png`, `.svg` or `.pdf`.
        step: training step.

    Raises:
        BadInput: a kind of mask does not fit a grid, or the suffix is unsupported.
    """
    form = path.suffix[1:]
    if form not in ("png", "svg", "pdf"):
        raise BadInput(f"unsupported picture format {path.suffix!r} of {path}; use .png, .svg or .pdf")
    from matplotlib.figure import Figure

    lengths = sorted({source.frames or run.data.clip.frames for source in run.data.sources})
    rows = [(kind, frames) for kind in range(len(run.objective.mask_kinds)) for frames in lengths]
    figure = Figure(figsize=(13, 0.5 + 2.6 * len(rows)), layout="constrained", dpi=110)
    grids = {frames: clip_grid(frames, run.data.crop.px, run.model) for frames in lengths}
    sizes = ", ".join(f"{frames} frames are {grid.t} x {grid.h} x {grid.w}" for frames, grid in grids.items())
    figure.suptitle(f"{run.name}, step {step}: clips of {run.data.crop.px} px, tokens of {sizes}", fontsize=10)
    panels = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for panel, (kind, frames) in zip(panels, rows, strict=True):
        states = mask_states(run, grids[frames], kind, step=step)
        title = _describe_kind(run, kind, states)
        panel.suptitle(title if len(lengths) == 1 else f"{frames} frames: {title}", fontsize=9, x=0.01, ha="left")
        left, middle, right = panel.subfigures(1, 3, width_ratios=[6.4, 2, 2.6])
        _draw_clips(left, states)
        _draw_chance(middle.subplots(), states)
        _draw_shares(right.subplots(), states)
    with new_file(path, overwrite=True) as partial:
        figure.savefig(partial, format=form, metadata={"Software": None} if form == "png" else None)


def mask_states(run: Run, grid: Grid, kind: int, *, step: int) -> UInt8[ndarray, "slots t h w"]:
    """Return the state of each token: 1 visible, 2 hidden, 0 unused."""
    slots = range(min(SLOTS, max(run.batch_size, CLIPS)))
    states = np.zeros((len(slots), grid.tokens), dtype=np.uint8)
    for mask in sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=step, slots=slots):
        if mask.kind != kind:
            continue
        for state, ids in ((1, mask.visible), (2, mask.hidden)):
            states[np.array(mask.rows)[:, None], ids.numpy()] = state
    return states.reshape(len(slots), grid.t, grid.h, grid.w)


def _describe_kind(run: Run, number: int, states: UInt8[ndarray, "slots t h w"]) -> str:
    kind = run.objective.mask_kinds[number]
    settings = ", ".join(f"{k} {v}" for k, v in kind.model_dump(exclude_none=True).items() if k != "mode")
    unused, visible, hidden = ((states == state).mean() for state in (0, 1, 2))
    text = f"masks[{number}] {kind.mode}: {settings}    visible {visible:.1%}, hidden {hidden:.1%}"
    return f"{text}, unused {unused:.1%}" if unused > 0.0005 else text


def _draw_clips(figure, states: UInt8[ndarray, "slots t h w"]) -> None:
    """Draw the tubelets of the first clips, with a row for each clip."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([NEITHER, VISIBLE, HIDDEN])
    tubelets = states.shape[1]
    shown = np.unique(np.linspace(0, tubelets - 1, min(tubelets, TUBELETS)).round().astype(int))
    for clip, boxes in enumerate(figure.subplots(CLIPS, len(shown), squeeze=False)):
        for box, tubelet in zip(boxes, shown, strict=True):
            box.set_xticks([])
            box.set_yticks([])
            if clip == 0:
                box.set_title(f"tubelet {tubelet}", fontsize=6, pad=2)
            if clip >= len(states):
                box.set_axis_off()
                continue
            box.imshow(states[clip, tubelet], cmap=colours, vmin=0, vmax=2, interpolation="nearest")


def _draw_chance(box, states: UInt8[ndarray, "slots t h w"]) -> None:
    """Draw how often each position in the picture is hidden."""
    import matplotlib as mpl

    chance = (states == 2).mean((0, 1))
    box.imshow(chance, cmap=mpl.colormaps["Oranges"], vmin=0, vmax=1, interpolation="nearest")
    box.set_title(f"hidden: {chance.min():.0%} to {chance.max():.0%}", fontsize=8)
    box.set_axis_off()


def _draw_shares(box, states: UInt8[ndarray, "slots t h w"]) -> None:
    """Draw the shares of each tubelet as stacked bars that sum to 1."""
    times = np.arange(states.shape[1])
    floor = np.zeros(len(times))
    for state, colour, name in ((1, VISIBLE, "visible"), (2, HIDDEN, "hidden"), (0, NEITHER, "unused")):
        share = (states == state).mean((0, 2, 3))
        box.bar(times, share, 0.9, bottom=floor, color=colour, label=name)
        floor += share
    box.set_xlabel("tubelet", fontsize=7)
    box.set_ylim(0, 1)
    box.tick_params(labelsize=7)
    for side in ("top", "right"):
        box.spines[side].set_visible(False)
    box.legend(fontsize=6, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
