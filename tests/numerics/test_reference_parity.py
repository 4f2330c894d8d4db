"""Masks, features, training steps and run files equal facebookresearch/vjepa2, as recorded in `fixtures/`.

`benchmarks/parity_live.py` makes the recordings and compares with them. It can also compare with a clone directly.
"""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import parity_ac
import parity_live as parity
import pytest
import torch

from vjepa.config import load as load_run
from vjepa.nn.predictor import Predictor

ROOT = Path(__file__).parent.parent.parent


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "numerics" / "fixtures" / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", sorted(parity.COMPARISONS))
def test_results_equal_the_recorded_reference(name: str) -> None:
    compare, tolerance = parity.COMPARISONS[name]
    assert compare(recorded(name)) <= tolerance


def test_the_dynamics_predictor_equals_the_recorded_reference() -> None:
    assert parity_ac.compare_recorded(recorded("ac_predictor")) <= parity_ac.ALLOWED


def test_the_comparison_of_steps_detects_a_shared_mask_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has this defect: a single token for all kinds of mask."""
    forward = Predictor.forward

    def with_one_token(self: Predictor, inputs):
        return forward(self, [type(g)(g.context, g.visible, g.hidden, g.grid, mask_kind=0) for g in inputs])

    monkeypatch.setattr(Predictor, "forward", with_one_token)
    compare, tolerance = parity.COMPARISONS["reference_steps"]
    assert compare(recorded("reference_steps")) > 100 * tolerance


def test_the_comparison_of_features_detects_a_true_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "NETWORK", parity.NETWORK.model_copy(update={"rope": "interleaved"}))
    compare, tolerance = parity.COMPARISONS["reference_network"]
    assert compare(recorded("reference_network")) > 100 * tolerance


def test_projections_detect_one_wrong_number() -> None:
    values = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    wrong = values.clone()
    wrong[17, 3] += 0.1
    difference = np.abs(parity.project({"x": values}) - parity.project({"x": wrong}))
    assert difference[0, 1:].max() > 0.05


def test_the_comparison_of_settings_detects_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(name: str):
        loaded = load_run(name)
        optim = loaded.settings.optim.model_copy(update={"lr": 5.26e-4})
        return replace(loaded, settings=loaded.settings.model_copy(update={"optim": optim}))

    monkeypatch.setattr(parity, "load", changed)
    compare, _ = parity.COMPARISONS["reference_settings"]
    assert compare(recorded("reference_settings")) == len(parity.RUN_FILES)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # V-JEPA 2.1 (arXiv:2603.14482) and its configuration files of March 2026; ViT-L there is distilled.
        (
            "vjepa2_1_vitg16_256px_16f",
            {
                "steps": 135_000,
                "model.encoder.depth": 40,
                "model.predictor.depth": 24,
                "model.levels": (9, 19, 29, 39),
                "model.rope_cells": 16,
                "objective.context_weight": 0.5,
                "objective.context_ramp": (15_000, 30_000),
                "optim.start_lr": 1e-4,
                "optim.lr": 6e-4,
                "optim.warmup_steps": 12_000,
                "optim.ema": 0.99925,
                "optim.weight_decay": 0.04,
            },
        ),
        ("vjepa2_1_vitl16_256px_16f", {"model.levels": (5, 11, 17, 23), "model.predictor.depth": 24}),
        # LeVJEPA (arXiv:2608.27395) and its configuration of September 2026.
        (
            "levjepa_vitb16_224px_16f",
            {
                "batch_size": 3072,
                "data.clip.frames": 16,
                "data.clip.fps": 7.5,
                "data.crop.px": 224,
                "data.crop.scale": (0.8, 1.0),
                "model.tubelet_frames": 1,
                "model.class_token": True,
                "model.causal": True,
                "objective.local_views": 10,
                "objective.local_px": 96,
                "objective.local_scale": (0.02, 0.4),
                "objective.jitter": 0.8,
                "objective.gray": 0.2,
                "objective.projector": (2048, 256),
                "objective.weight": 0.02,
                "objective.slices": 1024,
                "objective.knots": 17,
                "optim.start_lr": 1e-4,
                "optim.lr": 4e-4,
                "optim.warmup_steps": 1200,
                "optim.betas": (0.9, 0.95),
                "optim.weight_decay": 0.04,
            },
        ),
        ("levjepa_vitl16_224px_16f", {"model.encoder.width": 1024, "model.class_token": True, "model.causal": True}),
        # I-JEPA (arXiv:2301.08243), ViT-H/14: 300 passes over 1,281,167 pictures, 40 of warm-up.
        (
            "ijepa_vith14_224px",
            {
                "steps": 187_500,  # 300 * 625; the published loop drops the rest of a pass
                "batch_size": 2048,
                "model.patch_px": 14,
                "optim.lr": 1e-3,
                "optim.ema": 0.996,
                "optim.final_ema": 1.0,
                "optim.weight_decay": 0.04,
                "optim.final_weight_decay": 0.4,
            },
        ),
    ],
)
def test_other_run_files_match_their_papers(name: str, published: dict[str, object]) -> None:
    run = load_run(name).settings
    for path, value in published.items():
        assert functools.reduce(getattr, path.split("."), run) == value, path
