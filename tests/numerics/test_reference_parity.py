"""Masks, features and three training steps equal what facebookresearch/vjepa2 computed, as recorded in `fixtures/`.

Recorded and compared by `benchmarks/parity_live.py`, which also compares with a clone, live.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vjepa.model.predictor import Predictor

ROOT = Path(__file__).parent.parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_live", ROOT / "benchmarks" / "parity_live.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


parity = load()


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "numerics" / "fixtures" / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", sorted(parity.COMPARISONS))
def test_we_compute_what_the_reference_computed(name: str) -> None:
    compare, tolerance = parity.COMPARISONS[name]
    assert compare(recorded(name)) <= tolerance


def test_the_recording_of_steps_would_notice_a_mask_token_that_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's own defect: one token for all kinds of mask."""
    forward = Predictor.forward

    def with_one_token(self: Predictor, guesses):
        return forward(self, [type(g)(g.context, g.visible, g.hidden, g.grid, token=0) for g in guesses])

    monkeypatch.setattr(Predictor, "forward", with_one_token)
    compare, tolerance = parity.COMPARISONS["reference_steps"]
    assert compare(recorded("reference_steps")) > 100 * tolerance


def test_the_recording_of_features_would_notice_a_true_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "NETWORK", parity.NETWORK.model_copy(update={"rope": "interleaved"}))
    compare, tolerance = parity.COMPARISONS["reference_network"]
    assert compare(recorded("reference_network")) > 100 * tolerance


def test_projections_notice_one_wrong_number() -> None:
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    wrong = values.clone()
    wrong[17, 3] += 0.1
    difference = np.abs(parity.project({"x": values}) - parity.project({"x": wrong}))
    assert difference[0, 1:].max() > 0.05
