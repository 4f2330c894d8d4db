"""The training clips of a run, with the masks that were applied to them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from vjepa import config
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import clip_grid
from vjepa.viz import plots
from vjepa_data import html
from vjepa_data.html import Section
from vjepa_data.reader.batch import Clips
from vjepa_data.reader.loader import ClipLoader, open_plan
from vjepa_data.settings import BadInput, Loader

CLIPS = 3


def training_clips_section(run: config.Run) -> Section:
    """Show clips of the first step with their masks, or a note if the corpora cannot be read."""
    title = "Training clips"
    try:
        groups = training_clips(run, step=0)
        figures = [_masked_strips(run, clips, row) for clips in groups for row in range(len(clips))][:CLIPS]
        shares = _shares(run, groups[0])
    except BadInput as error:
        return html.note(title, f"The clips cannot be shown: {error}")
    return Section(
        title,
        "Clips of the first step, cropped as in training, and the same clips under each kind of mask. Visible tokens "
        "keep their colours. Hidden tokens are orange. " + shares,
        "".join(figures),
    )


def training_clips(run: config.Run, *, step: int, groups: int = CLIPS) -> list[Clips]:
    """Load some clips of a step exactly as training loads them.

    They are a function of the settings, so the same run always gives the same clips.

    Args:
        run: settings of the run.
        step: training step.
        groups: number of lanes to load. Each lane gives a few clips.

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


@dataclass(frozen=True)
class MaskedTokens:
    """The tokens of a clip that a kind of mask shows and hides."""

    kind: int
    """Position in `run.objective.mask_kinds`."""
    visible: Bool[np.ndarray, "t h w"]
    hidden: Bool[np.ndarray, "t h w"]


def _masks_of(run: config.Run, clips: Clips, row: int) -> list[MaskedTokens]:
    grid = clip_grid(clips.frames.shape[1], clips.frames.shape[2], run.model)
    found = []
    for mask in sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=0, slots=clips.slots[row : row + 1]):
        visible, hidden = (
            np.isin(np.arange(grid.tokens), ids).reshape(grid.t, grid.h, grid.w)
            for ids in (mask.visible[0].numpy(), mask.hidden[0].numpy())
        )
        found.append(MaskedTokens(mask.kind, visible, hidden))
    return found


def _masked_strips(run: config.Run, clips: Clips, row: int) -> str:
    frames = clips.frames[row].numpy()
    shown = plots.evenly(len(frames))
    strips = [("clip", frames[shown])]
    for mask in _masks_of(run, clips, row):
        strips.append((f"mask {mask.kind}", plots.draw_masks(frames, mask.visible, mask.hidden)[shown]))
    caption = f"{clips.keys[row]} at {clips.start_s[row]:.1f} s"
    return html.strips(
        caption, [(name, plots.jpeg(plots.strip(strip, height=plots.STRIP_PX))) for name, strip in strips]
    )


def _shares(run: config.Run, clips: Clips) -> str:
    words = [
        f"mask {mask.kind} ({run.objective.mask_kinds[mask.kind].mode}) shows {mask.visible.mean():.0%} of the tokens "
        f"and hides {mask.hidden.mean():.0%}"
        for mask in _masks_of(run, clips, 0)
    ]
    return f"In the first clip, {', '.join(words)}." if words else ""
