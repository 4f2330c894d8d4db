import pytest

from vjepa.config import Optim, Run, load
from vjepa.engine.schedule import rates_at
from vjepa_data.settings import Crop, Data, Source


def run_of(steps: int, **optim: object) -> Run:
    return Run(
        name="schedule",
        steps=steps,
        batch_size=1,
        data=Data(sources=(Source(shards="nowhere"),), crop=Crop(px=32)),
        model={"encoder": "vit_tiny"},  # pyright: ignore[reportArgumentType]
        optim=Optim.model_validate({"lr": 1.0, **optim}),
    )


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_learning_rate_reaches_each_of_its_three_numbers(decay: str) -> None:
    run = run_of(101, start_lr=0.1, final_lr=0.01, warmup_steps=20, decay=decay)
    assert rates_at(0, run).lr == pytest.approx(0.1)
    assert rates_at(10, run).lr == pytest.approx(0.55)
    assert rates_at(20, run).lr == pytest.approx(1.0)
    assert rates_at(60, run).lr == pytest.approx(0.505)  # halfway down, both shapes meet
    assert rates_at(100, run).lr == pytest.approx(0.01)


def test_cosine_lingers_at_both_ends_and_linear_does_not() -> None:
    cosine = run_of(101, decay="cosine")
    linear = run_of(101, decay="linear")
    assert rates_at(25, cosine).lr == pytest.approx(0.853553, abs=1e-6)  # (1 + cos(pi / 4)) / 2
    assert rates_at(25, linear).lr == pytest.approx(0.75)


def test_a_constant_rate_stays_at_its_peak_after_the_warm_up() -> None:
    run = run_of(50, start_lr=0.0, warmup_steps=5, decay="constant", final_lr=0.3)
    assert [rates_at(step, run).lr for step in (0, 5, 49)] == [0.0, 1.0, 1.0]


def test_weight_decay_and_ema_are_constant_by_default() -> None:
    still = run_of(11, weight_decay=0.04, ema=0.99925)
    assert {(rates_at(s, still).weight_decay, rates_at(s, still).ema) for s in range(11)} == {(0.04, 0.99925)}
    moving = run_of(11, weight_decay=0.04, final_weight_decay=0.4, ema=0.998, final_ema=1.0)
    assert rates_at(0, moving).weight_decay == pytest.approx(0.04)
    assert rates_at(5, moving).weight_decay == pytest.approx(0.22)
    assert rates_at(5, moving).ema == pytest.approx(0.999)
    assert rates_at(10, moving).weight_decay == pytest.approx(0.4)
    assert rates_at(10, moving).ema == pytest.approx(1.0)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_run_of_one_step_has_rates(warmup_steps: int) -> None:
    rates = rates_at(0, run_of(1, warmup_steps=warmup_steps, start_lr=0.5, final_lr=0.1))
    assert rates.lr == (0.5 if warmup_steps else 0.1)


def test_a_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    run = run_of(4, warmup_steps=4)
    assert [rates_at(step, run).lr for step in range(4)] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("size", ["vitl16", "vith16", "vitg16"])
def test_v_jepa_2_warms_up_stays_and_cools_down(size: str) -> None:
    pretraining, cooldown = (load(f"{size}_256px_{frames}f").settings for frames in (16, 64))
    assert [rates_at(step, pretraining).lr for step in (0, 6_000, 12_000, 239_999)] == pytest.approx(
        [1e-4, 3.125e-4, 5.25e-4, 5.25e-4]
    )
    assert [rates_at(step, cooldown).lr for step in (0, 11_999)] == pytest.approx([5.25e-4, 1e-6])
    for run in (pretraining, cooldown):
        last = rates_at(run.steps - 1, run)
        assert (last.weight_decay, last.ema) == (0.04, 0.99925)


def test_v_jepa_goes_up_in_a_line_and_down_in_a_cosine() -> None:
    """V-JEPA (arXiv:2404.08471): 90,000 steps, and averages that end by standing still."""
    run = run_of(
        90_000, start_lr=2e-4, lr=6.25e-4, final_lr=1e-6, warmup_steps=12_000, decay="cosine",
        weight_decay=0.04, final_weight_decay=0.4, ema=0.998, final_ema=1.0,
    )  # fmt: skip
    middle = 12_000 + (89_999 - 12_000) // 2
    assert [rates_at(step, run).lr for step in (0, 12_000, middle, 89_999)] == pytest.approx(
        [2e-4, 6.25e-4, (6.25e-4 + 1e-6) / 2, 1e-6], rel=1e-4
    )
    assert rates_at(89_999, run).weight_decay == pytest.approx(0.4)
    assert rates_at(89_999, run).ema == pytest.approx(1.0)
