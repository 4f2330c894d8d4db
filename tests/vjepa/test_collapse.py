"""Every method collapses without its safeguard, and the monitors detect it. With the safeguard they stay silent."""

from typing import Any

import pytest
from drifting_shapes import OBJECTIVES, learn, toy_run

from vjepa.config import Health
from vjepa.methods.base import Loss
from vjepa.monitoring.collapse import monitor
from vjepa.monitoring.health import Collapsed, HealthMonitor

EVERY_STEPS = 10


def is_collapse_seen(losses: list[Loss]) -> bool:
    """Return whether the spread of features, as a run monitors it, falls below a quarter of its first value."""
    health = HealthMonitor(Health(on_collapse="stop"), alert=lambda title, text: None)
    for step in range(EVERY_STEPS, len(losses) + 1, EVERY_STEPS):
        std = monitor(losses[step - 1].features, lambda x: x)["std"].item()
        record = {"step": step, "loss/total": losses[step - 1].value.detach().item(), "optim/applied": 1.0}
        try:
            health.check([{**record, "monitor/std": std}])
        except Collapsed:
            return True
    return False


def changed(name: str, *, steps: int, **objective: Any) -> dict[str, Any]:
    settings = {**OBJECTIVES[name], "steps": steps}
    return {**settings, "objective": {**settings["objective"], **objective}} if objective else settings


@pytest.mark.parametrize("name", ["vjepa2", "vjepa2_1", "stills"])
def test_features_collapse_with_gradients_through_the_target(name: str) -> None:
    run = toy_run(**changed(name, steps=60))
    safe, collapsed = learn(run), learn(run, stop_gradient=False)
    assert not is_collapse_seen(safe)
    assert is_collapse_seen(collapsed)
    assert collapsed[-1].value.detach() < 0.2 * collapsed[0].value.detach()  # while the loss looks splendid


def test_a_target_that_does_not_lag_behind_collapses() -> None:
    """Two seeds of three do. `stills` does in one of two, and `vjepa2_1` not within 200 steps (docs/objectives.md)."""
    safe, collapsed = (learn(toy_run(**changed("vjepa2", steps=100), optim={"ema": ema})) for ema in (0.99, 0.0))
    assert not is_collapse_seen(safe)
    assert is_collapse_seen(collapsed)
    assert collapsed[-1].value.detach() < 0.5 * collapsed[0].value.detach()


@pytest.mark.parametrize(("regularizer", "weight"), [("sigreg", 0.2), ("vicreg", 1.0), ("barlow", 0.05)])
def test_features_of_views_collapse_without_a_regularizer(regularizer: str, weight: float) -> None:
    safe, collapsed = (
        learn(toy_run(**changed("levjepa", steps=60, regularizer=regularizer, weight=weight)))
        for weight in (weight, 0.0)
    )
    assert not is_collapse_seen(safe)
    assert is_collapse_seen(collapsed)
    assert collapsed[-1].value.detach() < 0.2 * collapsed[0].value.detach()
