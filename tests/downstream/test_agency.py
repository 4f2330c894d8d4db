"""Agency: permuted actions surprise a model that reads them, tie for one that does not, and bad input is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vjepa.config import Run
from vjepa.evals.agency import Surprises, score_rows
from vjepa.evals.base import Result
from vjepa.evals.shell import run_evaluation
from vjepa.methods.base import create_method
from vjepa.weights.tensors import InMemory
from vjepa.weights.world_model import WorldModel
from vjepa_data.builder.shard import shard
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec
from vjepa_data.worlds.episodes import WORLDS
from vjepa_data.worlds.files import write_episodes

PX, FRAMES, FPS = 32, 5, 5


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    write_episodes(WORLDS["two_room"], folder / "in", episodes=10, seed=0, px=PX, frames=12)
    spec = Spec.model_validate(
        yaml.safe_load((folder / "in" / "spec.yaml").read_text()) | {"split": {"val_share": 0.5}}
    )
    shard([str(folder / "in")], folder / "corpus", spec=spec, workers=1)
    return folder / "corpus"


def make_model(corpus: Path) -> WorldModel:
    """Return a LeWM before training, with the scale of the corpus's actions."""
    settings = {
        "name": "tiny",
        "steps": 1,
        "batch_size": 2,
        "precision": "fp32",
        "data": {
            "sources": [{"shards": str(corpus)}],
            "clip": {"frames": FRAMES, "fps": FPS},
            "crop": {"px": PX, "scale": [1, 1], "aspect": [1, 1], "flip": 0},
            "signals": ["action"],
        },
        "model": {
            "encoder": {"name": "custom", "width": 24, "depth": 1, "heads": 2},
            "predictor": {"width": 24, "depth": 1, "heads": 2},
            **{"patch_px": 8, "tubelet_frames": 1, "rope": "sincos", "window": 3},
        },
        "objective": {"name": "lewm", "latent": [16, 8], "rollout_steps": 2, "slices": 16, "action_channels": 2},
        "optim": {"lr": 1e-3},
    }
    networks = create_method(Run.model_validate(settings)).build()
    tensors = {
        f"{name}.{path}": parameter.detach()
        for name in ("encoder", "dynamics", "dynamics.actions", "dynamics.centre")
        for path, parameter in networks[name].named_parameters()
    }
    model = Run.model_validate(settings).model
    return WorldModel(model, InMemory(tensors), px=PX, frames=FRAMES, fps=FPS, provenance={})


@pytest.fixture
def agency(rooms: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluate a model in memory: `agency(model, out=..., untrained=1)`."""

    def run(model: WorldModel, *, out: Path | None = None, **settings: Any) -> Result:
        monkeypatch.setattr("vjepa.evals.shell.load", lambda *_: model)
        return run_evaluation("agency", Path("model"), rooms, {"untrained": 0, **settings}, out=out)

    return run


def test_permuted_actions_surprise_a_model_that_knows_them(agency: Any, rooms: Path, tmp_path: Path) -> None:
    """The latent is the true position, read from the disc, which alone is red, and the prediction adds the action."""
    model = make_model(rooms)

    def rollout_from(latents: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return latents[:, -1:] + actions[:, -1:, None, None]

    def latents(frames: torch.Tensor) -> torch.Tensor:
        red, *others = frames.float().unbind(-1)
        is_disc = (red - torch.maximum(*others) - 40).clamp(min=0)
        place = (torch.arange(PX) + 0.5) / PX
        mass = is_disc.sum((2, 3)).clamp(min=1)
        x, y = ((is_disc * axis).sum((2, 3)) / mass for axis in (place, place[:, None]))
        return torch.stack((x, y), -1)[:, :, None, None]

    model.rollout_from, model.latents = rollout_from, latents  # pyright: ignore[reportAttributeAccessIssue]
    result = agency(model, out=tmp_path / "agency.json")
    assert result.columns == ["pretrained", "random predictor"]
    assert result.tasks["agency", "pairs"]["pretrained"].clips >= 3
    assert result.tasks["agency", "ratio"]["pretrained"].low > 1.3
    page = (tmp_path / "agency.html").read_text()
    assert "permuted" in page
    assert page.count("<figure>") >= 2
    assert json.loads((tmp_path / "agency.json").read_text())["kind"] == "agency"


def test_a_model_that_ignores_actions_ties(agency: Any, rooms: Path) -> None:
    model = make_model(rooms)
    model.rollout_from = lambda latents, _: latents[:, -1:]  # pyright: ignore[reportAttributeAccessIssue]
    result = agency(model)
    assert result.tasks["agency", "pairs"]["pretrained"].value == 0
    assert result.tasks["agency", "ratio"]["pretrained"].value == pytest.approx(1)


def test_untrained_models_stand_beside(agency: Any, rooms: Path) -> None:
    result = agency(make_model(rooms), untrained=2, max_videos=2)
    assert result.columns == ["pretrained", "random init", "random predictor"]
    assert len(result.tasks["agency", "pairs"]["random init"].extra["seeds"]) == 2


def test_scores_compare_means_over_a_clip() -> None:
    surprises = Surprises(np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([[1.0, 2.0], [2.0, 2.0]]))
    pairs, ratio = score_rows("x", surprises, np.array([0, 1]), 0)
    assert (pairs.value, ratio.value) == (0.5, pytest.approx(3.5 / 3))


def test_a_missing_signal_is_named(agency: Any, rooms: Path) -> None:
    with pytest.raises(BadInput, match=r"has no signal 'torque' \(it has action, state\)"):
        agency(make_model(rooms), action="torque")


def test_a_model_without_dynamics_is_named(rooms: Path, trained: Path) -> None:
    with pytest.raises(BadInput, match="predicts nothing under actions"):
        run_evaluation("agency", trained, rooms, {})
