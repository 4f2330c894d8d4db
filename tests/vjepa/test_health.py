import json
import math
from pathlib import Path
from typing import Any

import pytest

from vjepa.config import Health
from vjepa.monitoring.health import Collapsed, HealthMonitor, Unhealthy, read_history


def record(step: int, loss: float = 0.7, applied: float = 1.0, **more: float) -> dict[str, Any]:
    return {"step": step, "loss/total": loss, "optim/applied": applied, "optim/grad_norm": 1.0, **more}


def a_nurse(**settings: Any) -> tuple[HealthMonitor, list[str]]:
    alerts: list[str] = []
    return HealthMonitor(Health(**settings), lambda title, text: alerts.append(f"{title}: {text}")), alerts


def test_a_skipped_step_is_an_alert_and_three_in_a_row_end_the_run() -> None:
    nurse, alerts = a_nurse(max_skipped_in_a_row=3)
    nurse.check([record(1), record(2, applied=0.0), record(3), record(4, applied=0.0), record(5, applied=0.0)])
    assert [alert.split(":")[1] for alert in alerts] == [" step 2", " step 4"]
    with pytest.raises(Unhealthy, match="step 6 is the last of 3 bad ones in a row"):
        nurse.check([record(6, applied=0.0)])


def test_a_spike_is_measured_against_the_median_if_enabled() -> None:
    steady = [record(step) for step in range(1, 60)]
    spike = [record(step, loss=2.0) for step in range(60, 63)]
    a_nurse()[0].check([*steady, *spike])
    nurse, _ = a_nurse(max_loss_ratio=2.0)
    with pytest.raises(Unhealthy, match=r"loss 2 is 2\.9 times the usual 0\.7"):
        nurse.check([*steady, *spike])
    slow, _ = a_nurse(max_loss_ratio=2.0)
    slow.check([record(step, loss=0.3 + 0.01 * step) for step in range(1, 200)])  # a healthy loss may rise


def test_a_collapse_is_told_once_and_stops_by_setting() -> None:
    falling = [record(step, **{"monitor/rankme": value}) for step, value in ((100, 20.0), (200, 4.0), (300, 4.0))]
    nurse, alerts = a_nurse(collapse_share=0.25)
    nurse.check(falling)
    assert len(alerts) == 1
    assert "monitor/rankme fell to 4, from 20" in alerts[0]
    strict, _ = a_nurse(collapse_share=0.25, on_collapse="stop")
    with pytest.raises(Collapsed, match="monitor/rankme"):
        strict.check(falling)


def test_a_non_finite_monitor_is_not_a_collapse() -> None:
    nurse, alerts = a_nurse(on_collapse="stop")
    nurse.check([record(step, **{"monitor/std": value}) for step, value in ((100, 1.0), (200, math.nan), (300, 0.9))])
    assert not alerts


def test_a_collapse_across_a_restart_rolls_back_to_before_it(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    healthy = [record(step, **({"monitor/rankme": 20.0} if step == 1 else {})) for step in range(1, 401)]
    file.write_text("".join(json.dumps(one) + "\n" for one in healthy))
    past = read_history(file)
    assert len(past) == 201  # the last losses, and the one monitor long before
    nurse, _ = a_nurse(on_collapse="roll_back", max_loss_ratio=2.0)
    nurse.restore(past)
    nurse.check([record(450, **{"monitor/rankme": 10.0}), record(451)])
    with pytest.raises(Unhealthy, match="monitor/rankme fell to 3, from 20") as caught:
        nurse.check([record(500, **{"monitor/rankme": 3.0})])
    assert (caught.value.healthy, caught.value.last) == (450, 500)
    with pytest.raises(Unhealthy, match="times the usual") as caught:
        nurse.check([record(step, loss=9.0) for step in range(501, 510)])
    assert (caught.value.healthy, caught.value.last) == (500, 503)
