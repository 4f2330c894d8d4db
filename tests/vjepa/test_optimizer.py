import pytest
import torch
from torch import nn

from vjepa.config import Optim
from vjepa.engine.optimizer import build_optimizer, update_weights
from vjepa.engine.schedule import Rates

RATES = Rates(lr=0.1, weight_decay=0.5, ema=0.99)


def a_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    model.register_parameter("mask_tokens", nn.Parameter(torch.ones(2, 1, 1, 3)))
    return model


def with_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = a_model()
    optimizer = build_optimizer({"encoder": model}, Optim(lr=1.0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with_gradients(model, 0.0)
    update_weights(optimizer, torch.tensor(1.0), RATES, clip_norm=None)
    shrunk = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert shrunk == {"linear.weight", "mask_tokens"}
    assert torch.allclose(model.get_parameter("linear.weight"), before["linear.weight"] * (1 - 0.1 * 0.5))


def test_an_update_is_torchs_own() -> None:
    ours, theirs = a_model(), a_model()
    optimizer = build_optimizer({"encoder": ours}, Optim(lr=1.0, betas=(0.8, 0.9), eps=1e-6))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0, fused=True)
    for step in range(4):
        for model in (ours, theirs):
            with_gradients(model, 0.1 * (step + 1))
        update_weights(optimizer, torch.tensor(1.0), Rates(lr=0.1, weight_decay=0.0, ema=1.0), clip_norm=None)
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_clipping_is_torchs_own_and_the_norm_is_that_before() -> None:
    ours, theirs = a_model(), a_model()
    optimizer = build_optimizer({"encoder": ours}, Optim(lr=1.0))
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    for value in (3.0, 5.0):  # Adam forgets the scale of a first gradient
        for model in (ours, theirs):
            with_gradients(model, value)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5 * value)
        rates = Rates(lr=0.1, weight_decay=0.0, ema=1.0)
        update = update_weights(optimizer, torch.tensor(1.0), rates, clip_norm=0.5 * value)
        plain.step()
        assert torch.equal(update.grad_norm, norm)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize(("gradient", "loss"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_a_non_finite_step_changes_no_weight_moment_or_count(gradient: float, loss: float) -> None:
    model = a_model()
    optimizer = build_optimizer({"encoder": model}, Optim(lr=1.0))
    with_gradients(model, 1.0)
    assert float(update_weights(optimizer, torch.tensor(1.0), RATES, clip_norm=1.0).applied) == 1
    weights = [p.clone() for p in model.parameters()]
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    with_gradients(model, 1.0)
    next(model.parameters()).grad = torch.full_like(next(model.parameters()), gradient)
    assert float(update_weights(optimizer, torch.tensor(loss), RATES, clip_norm=1.0).applied) == 0
    for parameter, weight, moments in zip(model.parameters(), weights, state, strict=True):
        assert torch.equal(parameter, weight)
        assert all(torch.equal(optimizer.state[parameter][key], moments[key]) for key in moments)
