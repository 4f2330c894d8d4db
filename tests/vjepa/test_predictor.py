"""Guesses are made one clip at a time, and each kind of mask has its own token."""

import torch

from vjepa.config import Model
from vjepa.nn.grid import Grid
from vjepa.nn.predictor import Predictor, PredictorInput

GRID = Grid(2, 4, 4)
SMALL = Model.model_validate(
    {
        "encoder": {"name": "custom", "width": 64, "depth": 2, "heads": 2},
        "predictor": {"width": 32, "depth": 2, "heads": 2},
    }
)


def perturbed(tokens: int = 2) -> Predictor:
    predictor = Predictor(SMALL, mask_tokens=tokens)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return predictor


def some_guesses() -> list[PredictorInput]:
    generator = torch.Generator().manual_seed(1)
    guesses = []
    for token, (visible, hidden) in enumerate([(12, 20), (20, 7)]):
        order = torch.stack([torch.randperm(32, generator=generator) for _ in range(3)])
        context = torch.randn(3, visible, 64, generator=generator)
        guesses.append(PredictorInput(context, order[:, :visible], order[:, visible : visible + hidden], GRID, token))
    return guesses


def test_one_packed_pass_equals_a_pass_for_each_guess() -> None:
    predictor, guesses = perturbed(), some_guesses()
    packed = predictor(guesses)
    single = [predictor([guess])[0] for guess in guesses]
    assert [tuple(each.shape) for each in packed] == [(3, 20, 64), (3, 7, 64)]
    for ours, theirs in zip(packed, single, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    parameters = list(predictor.parameters())
    grads = [
        torch.autograd.grad(torch.stack([o.square().mean() for o in outputs]).sum(), parameters)
        for outputs in (packed, single)
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_each_kind_of_mask_trains_its_own_token() -> None:
    predictor = perturbed(tokens=3)
    sum(out.square().mean() for out in predictor(some_guesses())).backward()  # pyright: ignore
    gradient = predictor.mask_tokens.grad
    assert gradient is not None
    assert gradient[0].any()
    assert gradient[1].any()
    assert not gradient[2].any()  # no kind of that number: zero, yet present, so that all ranks reduce alike


def test_a_guess_depends_on_where_and_not_on_the_order() -> None:
    predictor, guess = perturbed(), some_guesses()[0]
    (before,) = predictor([guess])
    seen, asked = torch.randperm(12), torch.randperm(20)
    shuffled = PredictorInput(guess.context[:, seen], guess.visible[:, seen], guess.hidden[:, asked], GRID, guess.token)
    (after,) = predictor([shuffled])
    torch.testing.assert_close(after, before[:, asked], rtol=0, atol=1e-5)
    moved = PredictorInput(guess.context, guess.visible.roll(1, 1), guess.hidden, GRID, guess.token)
    assert (predictor([moved])[0] - before).abs().max() > 1e-3


def test_clips_do_not_see_each_other() -> None:
    predictor, guess = perturbed(), some_guesses()[0]
    (before,) = predictor([guess])
    context = guess.context.clone()
    context[0] = 5.0
    (after,) = predictor([PredictorInput(context, guess.visible, guess.hidden, GRID, guess.token)])
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])
