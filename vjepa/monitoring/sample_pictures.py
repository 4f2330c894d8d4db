"""Pictures of training: a clip, the clip through each kind of mask, and its features as colours.

pictures/step_00005000.jpg        frames | through mask 0 | through mask 1 | features, as colours
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import nn

from vjepa.config import Run
from vjepa.methods.masking import sample_masks
from vjepa.nn.encoder import View, normalise
from vjepa.nn.grid import clip_grid
from vjepa.viz.plots import draw_masks, feature_colours, resize, stack, strip
from vjepa_data.reader.loader import Batch

HEIGHT = 96


@torch.no_grad()
def draw(encoder: nn.Module, batch: Batch, run: Run, device: torch.device) -> UInt8[ndarray, "H W 3"]:
    """Draw the first clip of a batch. All ranks must call it together, since the encoder's weights are sharded.

    Args:
        encoder: takes a list of views, as `vjepa.nn.encoder.Encoder`.
        batch: this rank's clips.
        run: the run, for its masks.
        device: device of the encoder.
    """
    clips = batch.groups[-1]  # the longest
    frames = clips.frames[:1]
    grid = clip_grid(frames.shape[1], frames.shape[2], run.model)
    if frames.shape[1] == 1 and not run.model.still_tokens:
        frames = frames.expand(-1, run.model.tubelet_frames, -1, -1, -1)
    features = encoder([View(normalise(frames.to(device)))])[0]
    colours = feature_colours(features.float().cpu().unflatten(1, (grid.t, grid.h, grid.w)))[0]
    pixels = frames[0].cpu().numpy()
    rows = [pixels]
    for mask in sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=batch.step, slots=clips.slots[:1]):
        visible, hidden = (np.isin(np.arange(grid.tokens), ids[0]) for ids in (mask.visible, mask.hidden))
        shape = (grid.t, grid.h, grid.w)
        rows.append(draw_masks(pixels, visible.reshape(shape), hidden.reshape(shape)))
    rows.append(np.stack([resize(each, pixels.shape[1]) for each in colours.repeat(len(pixels) // grid.t, axis=0)]))
    return stack([strip(row, height=HEIGHT) for row in rows])


def write(picture: UInt8[ndarray, "H W 3"], folder: Path, step: int) -> Path:
    """Write a picture to the run folder."""
    file = folder / "pictures" / f"step_{step:08d}.jpg"
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(picture).save(file, quality=90)
    return file
