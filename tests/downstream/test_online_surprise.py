"""Surprise during training measures what `vjepa eval surprise` would."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vjepa
from vjepa.config import OnlineSurprise, Parallel, Run
from vjepa.distributed.world import join
from vjepa.evals.surprise.evaluation import masked_surprise, score_rows
from vjepa.methods.base import create_method
from vjepa.monitoring.online_surprise import SEED, SurpriseRunner
from vjepa_data.errors import BadInput
from vjepa_data.evaluation.violations import draw_violations, read_films, read_violations
from vjepa_data.synthetic.violations import LAWS, write_violations

PX, FRAMES, FPS = 32, 4, 8.0
SETTINGS = OnlineSurprise(every_steps=3, quadruplets=len(LAWS))


@pytest.fixture
def run(trained: Path) -> Run:
    """Return the settings of the trained run, whose clips have `FRAMES` frames of `PX` pixels at `FPS`."""
    (state,) = trained.glob("checkpoints/*/state.json")
    return Run.model_validate(json.loads(state.read_text())["settings"])


def test_surprise_in_training_is_that_of_the_saved_model(trained: Path, run: Run):
    model, networks = vjepa.load(trained), create_method(run).build()
    networks["target"].load_state_dict(model.encoder.encoder.state_dict())
    networks["predictor"].load_state_dict(model.parts["predictor"].state_dict())
    with join(Parallel()) as world:
        runner = SurpriseRunner(SETTINGS, run, world, networks)
        found = runner.measure()
        assert runner.measure() == found
    assert [step for step in range(1, 7) if runner.is_due(step)] == [3, 6]
    score = masked_surprise(model, 0)
    films, shown = draw_violations(SEED, len(LAWS), px=PX, fps=FPS)
    windows = []
    for frames in shown:
        cut = torch.from_numpy(frames).unfold(0, FRAMES, 2).movedim(-1, 1).contiguous()
        windows.append(score(cut, [2]))
    rows = {law: {row.metric: row.value for row in score_rows(films, law, "pretrained", windows)} for law in LAWS}
    overall = {row.metric: row.value for row in score_rows(films, "all", "pretrained", windows)}
    expected = {"pairs": overall["pairs"], "groups": overall["groups"]} | {law: rows[law]["groups"] for law in LAWS}
    assert found == {f"surprise/{name}": value for name, value in expected.items()}


def test_drawn_films_are_those_that_are_written(tmp_path: Path):
    write_violations(tmp_path, quadruplets=1, seed=5)
    written, (drawn, shown) = read_violations(tmp_path), draw_violations(5, 1, px=32, fps=FPS)
    assert drawn.pairs == written.pairs
    assert [film.condition for film in drawn.films] == [film.condition for film in written.films]
    read = list(read_films(written.films, px=32, fps=FPS, frame_step=None, workers=1))
    for ours, theirs in zip(shown, read, strict=True):
        assert isinstance(theirs, np.ndarray)
        assert np.abs(ours.astype(int) - theirs).mean() < 4


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data.clip.frames": 200}, "films of 24 frames at 8 per second, and a clip has 200"),
        ({"objective": {"name": "levjepa"}}, "masked predictor, which objective levjepa does not train"),
    ],
)
def test_a_run_without_expectations_is_refused(change: dict[str, object], error: str, run: Run):
    content = run.model_dump(mode="json")
    for name, value in change.items():
        *path, last = name.split(".")
        place = content
        for key in path:
            place = place[key]
        place[last] = value
    other = Run.model_validate(content)
    with join(Parallel()) as world, pytest.raises(BadInput, match=error):
        SurpriseRunner(SETTINGS, other, world, create_method(other).build())
