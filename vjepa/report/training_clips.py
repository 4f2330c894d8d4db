"""The clips of a run as training saw them, and through each kind of mask."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from vjepa import config
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid
from vjepa.viz import plots
from vjepa_data import html
from vjepa_data.html import Section
from vjepa_data.reader.batch import Clips
from vjepa_data.reader.loader import ClipLoader, open_plan
from vjepa_data.settings import BadInput, Loader

CLIPS = 3


def training_clips_section(run: config.Run) -> Section:
    """Clips of the first step with their masks; a note where the corpora cannot be read."""
    title = "What it sees"
    try:
        clips = training_clips(run, step=0)
    except BadInput as error:
        return html.note(title, f"The clips cannot be shown from here: {error}")
    blocks = [_masked_strips(run, one, slot) for one in clips for slot in range(len(one))][:CLIPS]
    shares = _shares(run, clips[0])
    return Section(
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
    plan = open_plan(run.data, seed=run.seed, batch_size=run.batch_size)
    loader = Loader(workers=0, decoder=run.loader.decoder)
    found = []
    for rank in range(min(groups, plan.lanes)):
        with ClipLoader(
            run.data,
            loader,
            seed=run.seed,
            batch_size=run.batch_size,
            rank=rank,
            world=plan.lanes,
            step=step,
            plan=plan,
        ) as clips:
            found += next(clips).groups
    return found


def _masks(
    run: config.Run, clips: Clips, row: int
) -> Iterator[tuple[int, Bool[np.ndarray, "t h w"], Bool[np.ndarray, "t h w"]]]:
    """For each kind of mask: its number, and which tokens of one clip are visible and hidden."""
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
    shown = plots.evenly(len(frames))
    strips = [("clip", frames[shown])]
    for kind, visible, hidden in _masks(run, clips, row):
        strips.append((f"mask {kind}", plots.draw_masks(frames, visible, hidden)[shown]))
    caption = f"{clips.keys[row]} at {clips.start_s[row]:.1f} s"
    return html.strips(caption, [(name, plots.jpeg(plots.strip(one, height=plots.STRIP_PX))) for name, one in strips])


def _shares(run: config.Run, clips: Clips) -> str:
    words = [
        f"mask {kind} ({run.masks[kind].mode}) shows {visible.mean():.0%} and asks for {hidden.mean():.0%}"
        for kind, visible, hidden in _masks(run, clips, 0)
    ]
    return f"Of these tokens, {', '.join(words)}."
