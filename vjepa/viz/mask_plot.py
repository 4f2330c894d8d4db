"""One picture of what the masks of a run show and hide: a few clips, and the averages over many.

kind   | clips, tubelet after tubelet                | chance to be hidden, over the picture | shares over time
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from vjepa.atomic import new_file
from vjepa.config import Run
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid
from vjepa_data.settings import BadInput

VISIBLE, HIDDEN, NEITHER = "#2563eb", "#ea7317", "#c9cfd8"
CLIPS, TUBELETS, SLOTS = 3, 8, 240


def draw_mask_sheet(run: Run, path: Path, *, step: int = 0) -> None:
    """Draw the masks of the first slots of a step, and their averages over its first 240 (or as many as there are).

    Args:
        run: its masks, grid and seed.
        path: of the picture; its ending says which format, `.png`, `.svg` or `.pdf`.
        step: which step.

    Raises:
        BadInput: a kind of mask does not fit the grid, or the ending is another.
    """
    form = path.suffix[1:]
    if form not in ("png", "svg", "pdf"):
        raise BadInput(f"{path}: a picture's name ends in .png, .svg or .pdf")
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    grid = Grid.of(run.data.clip.frames, run.data.crop.px, run.data.crop.px, run.model)
    colours = ListedColormap([NEITHER, VISIBLE, HIDDEN])
    shown = np.unique(np.linspace(0, grid.t - 1, min(grid.t, TUBELETS)).round().astype(int))
    figure = Figure(figsize=(13, 0.5 + 2.6 * len(run.masks)), layout="constrained", dpi=110)
    figure.suptitle(
        f"{run.name}, step {step}: {run.data.clip.frames} frames of {run.data.crop.px} px are "
        f"{grid.t} x {grid.h} x {grid.w} tokens",
        fontsize=10,
    )
    rows = figure.subfigures(len(run.masks), 1, squeeze=False)[:, 0]
    for number, (row, kind) in enumerate(zip(rows, run.masks, strict=True)):
        states = mask_states(run, grid, number, step=step)
        settings = ", ".join(f"{k} {v}" for k, v in kind.model_dump(exclude_none=True).items() if k != "mode")
        seen, asked = ((states == state).mean() for state in (1, 2))
        text = f"masks[{number}] {kind.mode}: {settings}    visible {seen:.1%}, hidden {asked:.1%}"
        if seen + asked < 0.9995:
            text += f", used by neither {1 - seen - asked:.1%}"
        row.suptitle(text, fontsize=9, x=0.01, ha="left")
        left, middle, right = row.subfigures(1, 3, width_ratios=[6.4, 2, 2.6])
        boxes = left.subplots(CLIPS, len(shown), squeeze=False)
        for clip in range(CLIPS):
            for place, tubelet in enumerate(shown):
                box = boxes[clip, place]
                box.set_xticks([])
                box.set_yticks([])
                if clip == 0:
                    box.set_title(f"tubelet {tubelet}", fontsize=6, pad=2)
                if clip >= len(states):
                    box.set_axis_off()
                    continue
                box.imshow(states[clip, tubelet], cmap=colours, vmin=0, vmax=2, interpolation="nearest")
        box = middle.subplots()
        chance = (states == 2).mean((0, 1))
        box.imshow(chance, cmap=mpl.colormaps["Oranges"], vmin=0, vmax=1, interpolation="nearest")
        box.set_title(f"hidden: {chance.min():.0%} to {chance.max():.0%}", fontsize=8)
        box.set_axis_off()
        _draw_shares(right.subplots(), states)
    with new_file(path, overwrite=True) as beside:
        figure.savefig(beside, format=form, metadata={"Software": None} if form == "png" else None)


def mask_states(run: Run, grid: Grid, kind: int, *, step: int) -> UInt8[ndarray, "slots t h w"]:
    """What becomes of each token: 1 visible, 2 hidden, 0 neither."""
    slots = range(min(SLOTS, max(run.batch_size, CLIPS)))
    states = np.zeros((len(slots), grid.tokens), dtype=np.uint8)
    for mask in sample_masks(run.masks, grid, seed=run.seed, step=step, slots=slots):
        if mask.kind != kind:
            continue
        for state, ids in ((1, mask.visible), (2, mask.hidden)):
            states[np.array(mask.rows)[:, None], ids.numpy()] = state
    return states.reshape(len(slots), grid.t, grid.h, grid.w)


def _draw_shares(box, states: UInt8[ndarray, "slots t h w"]) -> None:
    """Bars of the shares of each tubelet, stacked to 1."""
    times = np.arange(states.shape[1])
    floor = np.zeros(len(times))
    for state, colour, name in ((1, VISIBLE, "visible"), (2, HIDDEN, "hidden"), (0, NEITHER, "neither")):
        share = (states == state).mean((0, 2, 3))
        box.bar(times, share, 0.9, bottom=floor, color=colour, label=name)
        floor += share
    box.set_xlabel("tubelet", fontsize=7)
    box.set_ylim(0, 1)
    box.tick_params(labelsize=7)
    for side in ("top", "right"):
        box.spines[side].set_visible(False)
    box.legend(fontsize=6, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
