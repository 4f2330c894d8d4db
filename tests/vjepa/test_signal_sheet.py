"""The picture of actions over frames shows an action that is a row early or late."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from vjepa.config import Run
from vjepa.viz.signal_plot import Lag, action_sizes, describe_lags, draw_signal_sheet, find_lag, picture_changes
from vjepa_data.builder.shard import shard
from vjepa_data.errors import BadInput
from vjepa_data.settings import Clip
from vjepa_data.spec import Spec
from vjepa_data.worlds.episodes import WORLDS, simulate
from vjepa_data.worlds.files import write_episodes

CROP = {"px": 64, "scale": (1, 1), "aspect": (1, 1), "flip": 0}


def episodes(count: int, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    world = WORLDS["two_room"]
    found = simulate(world, policy="wander", layout="fixed", seed=0, episodes=range(count), frames=frames)
    pictures = [world.render(s, np.tile(p, (frames, 1)), 48) for s, p in zip(found.states, found.layouts, strict=True)]
    return np.stack(pictures), found.actions, found.states


@pytest.mark.parametrize("late", [-1, 0, 1])
@pytest.mark.parametrize("combine", ["sum", "last"])
def test_actions_that_are_a_row_off_are_found(late: int, combine: str):
    """Row t + late holds the action after frame t, as a difference or as the commanded position."""
    frames, actions, states = episodes(24, 20)
    values = actions if combine == "sum" else states[:, :-1] + actions
    cut = slice(1, -1)
    changes = picture_changes(frames)[:, cut]
    found = find_lag(changes, action_sizes(np.roll(values, late, axis=1)[:, cut], combine))
    assert found.best == late
    text = found.text("action")
    assert ("of the same row" in text) == (late == 0)
    assert (f"shift_rows changed by {-late:+d}" in text) == (late != 0)


def test_unrelated_actions_are_reported_as_unrelated():
    frames, _, _ = episodes(8, 20)
    noise = np.random.default_rng(0).normal(size=(8, 19, 2))
    assert "does not visibly follow" in find_lag(picture_changes(frames), action_sizes(noise, "sum")).text("action")
    assert "too few rows" in Lag({}).text("action")


def test_held_frames_say_nothing_about_the_actions():
    """Half of each clip repeats its last frame: no change, and no action."""
    frames, actions, _ = episodes(12, 20)
    noise = np.random.default_rng(0).normal(size=actions.shape)
    frames, noise[:, 10:] = np.concatenate((frames[:, :11], frames[:, 10:11].repeat(9, 1)), axis=1), 0
    valid = np.repeat([np.arange(19) < 10], 12, axis=0)
    changes, sizes = picture_changes(frames), action_sizes(noise, "sum")
    assert "follows the actions" in find_lag(changes, sizes).text("action")
    assert "does not visibly follow" in find_lag(changes, sizes, valid).text("action")


def test_a_signal_of_another_rate_is_shifted_in_seconds():
    text = Lag({0: 0.1, 1: 0.9}).text("move", stored="pose", frame_s=1 / 30)
    assert "the picture follows the actions 1 frame later" in text
    assert "signals.pose.shift_s changed by -0.03333" in text


def make_run(corpus: Path | str = "none", **data) -> Run:
    values = {"sources": [{"shards": str(corpus)}], "clip": {"frames": 6, "fps": 5}, "crop": CROP, **data}
    optim, model = {"lr": 1e-3}, {"encoder": "vit_tiny"}
    return Run.model_validate(
        {"name": "sheet", "steps": 1, "batch_size": 8, "data": values, "model": model, "optim": optim}
    )


def test_the_sheet_draws_frames_and_signals(tmp_path: Path):
    write_episodes(WORLDS["two_room"], tmp_path / "in", episodes=3, seed=0, px=64, frames=20)
    spec = yaml.safe_load((tmp_path / "in" / "spec.yaml").read_text())
    spec["signals"]["action"]["shift_rows"] = 1  # one row late
    shard([str(tmp_path / "in")], tmp_path / "corpus", spec=Spec.model_validate(spec), workers=1)
    run = make_run(tmp_path / "corpus", signals=["action", "state"])
    draw_signal_sheet(run, tmp_path / "sheet.png")
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert picture.shape[0] > 500
    assert (np.abs(picture.astype(int) - (180, 50, 50)).sum(-1) < 60).any()  # the red disc
    (text,) = describe_lags(run)
    assert "1 row later" in text
    assert "shift_rows changed by -1" in text


def test_a_run_without_signals_has_no_sheet(tmp_path: Path):
    with pytest.raises(BadInput, match=r"reads no signals; name the signals of its corpus in data\.signals"):
        draw_signal_sheet(make_run(), tmp_path / "sheet.png")
    with pytest.raises(BadInput, match=r"unsupported picture format"):
        draw_signal_sheet(make_run(), tmp_path / "sheet.jpg")


def test_odd_signals_are_drawn_and_compared(tmp_path: Path):
    """Rates that are not the video's, names with signs, columns without units, more columns than are drawn."""
    world, folder = WORLDS["two_room"], tmp_path / "in"
    write_episodes(world, folder, episodes=2, seed=0, px=64, frames=20)
    rng = np.random.default_rng(0)
    for video in folder.glob("*.mp4"):
        np.save(video.with_suffix(".fast.npy"), rng.normal(size=(84, 1)).astype(np.float32))
        np.save(video.with_suffix(".slow.npy"), rng.normal(size=(7, 9)).astype(np.float32))
    values = yaml.safe_load((folder / "spec.yaml").read_text())
    values["signals"] = {
        "action": values["signals"]["action"],
        "fast": {"columns": ["_$a"], "units": [""], "kind": "action", "combine": "stack", "rate_hz": 42},
        "slow": {"columns": [f"${i}$" for i in range(9)], "units": [""] * 9, "kind": "state", "rate_hz": 3},
    }
    shard([str(folder)], tmp_path / "corpus", spec=Spec.model_validate(values), workers=1)
    run = make_run(tmp_path / "corpus", signals=["action", "fast", "slow"])
    run = run.model_copy(update={"data": run.data.model_copy(update={"clip": Clip(frames=3, fps=2)})})
    draw_signal_sheet(run, tmp_path / "sheet.svg")
    drawn = (tmp_path / "sheet.svg").read_text()
    assert "[]" not in drawn
    assert "first 8 of 9" in drawn
    action, fast = describe_lags(run)
    assert "of the same row" in action
    assert fast.startswith("fast: cannot be compared with the picture frame by frame")
    assert "4.2 rows between two frames" in fast
