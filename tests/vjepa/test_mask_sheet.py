"""The picture of a run's masks shows the masks that training uses."""

from pathlib import Path

import numpy as np
from PIL import Image

from vjepa.config import Run
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid, clip_grid
from vjepa.viz.mask_plot import draw_mask_sheet, mask_states


def run(*masks: dict[str, object], sources: tuple[dict[str, object], ...] = ({"shards": "none"},)) -> Run:
    return Run.model_validate(
        {
            "name": "sheet",
            "steps": 1,
            "batch_size": 8,
            "data": {"sources": sources, "clip": {"frames": 8}, "crop": {"px": 64}},
            "model": {"encoder": "vit_tiny"},
            "masks": masks,
            "optim": {"lr": 1e-3},
        }
    )


REFERENCE = {"mode": "reference", "blocks": 2, "spatial_scale": [0.15, 0.15], "batch": 4}


def test_states_are_those_of_the_masks() -> None:
    settings = run(REFERENCE, {"mode": "causal", "visible_tubelets": 1})
    grid = Grid(4, 4, 4)
    states = mask_states(settings, grid, 0, step=3).reshape(8, -1)
    for mask in sample_masks(settings.objective.mask_kinds, grid, seed=0, step=3, slots=range(8)):
        if mask.kind == 0:
            for row, visible, hidden in zip(mask.rows, mask.visible, mask.hidden, strict=True):
                assert np.flatnonzero(states[row] == 1).tolist() == visible.tolist()
                assert np.flatnonzero(states[row] == 2).tolist() == hidden.tolist()
    future = mask_states(settings, grid, 1, step=3)
    assert (future[:, 0] == 1).all()
    assert (future[:, 1:] == 2).all()


def test_the_picture_shows_visible_hidden_and_unused_tokens(tmp_path: Path) -> None:
    draw_mask_sheet(run(REFERENCE), tmp_path / "masks.png")
    colours = {tuple(pixel) for pixel in np.asarray(Image.open(tmp_path / "masks.png").convert("RGB")).reshape(-1, 3)}
    assert {(0x25, 0x63, 0xEB), (0xEA, 0x73, 0x17), (0xC9, 0xCF, 0xD8)} <= colours


def test_a_still_image_fills_a_tubelet_of_the_grid() -> None:
    settings = run(REFERENCE)
    assert settings.model.tubelet_frames == 2
    assert clip_grid(1, 64, settings.model) == clip_grid(2, 64, settings.model) == Grid(1, 4, 4)
    assert clip_grid(1, 64, settings.model.model_copy(update={"still_tokens": True})) == Grid(1, 4, 4)


def test_each_clip_length_of_a_mixture_is_drawn(tmp_path: Path) -> None:
    """A source of still images, which fill a tubelet, has a row of its own."""
    sources: tuple[dict[str, object], ...] = ({"shards": "videos"}, {"shards": "images", "frames": 1})
    balanced = {"mode": "balanced", "blocks": 2, "block_share": 0.2}
    draw_mask_sheet(run(balanced), tmp_path / "videos.png")
    draw_mask_sheet(run(balanced, sources=sources), tmp_path / "both.png")
    heights = [np.asarray(Image.open(tmp_path / name)).shape[0] for name in ("videos.png", "both.png")]
    assert heights[1] > 1.7 * heights[0]
