"""The predictor: packing, mask tokens, positions."""

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


def some_inputs() -> list[PredictorInput]:
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for kind, (visible, hidden) in enumerate([(12, 20), (20, 7)]):
        order = torch.stack([torch.randperm(32, generator=generator) for _ in range(3)])
        context = torch.randn(3, visible, 64, generator=generator)
        inputs.append(PredictorInput(context, order[:, :visible], order[:, visible : visible + hidden], GRID, kind))
    return inputs


def test_one_packed_pass_equals_one_pass_per_input() -> None:
    predictor, inputs = perturbed(), some_inputs()
    packed = predictor(inputs)
    single = [predictor([given])[0] for given in inputs]
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
    sum(out.square().mean() for out in predictor(some_inputs())).backward()  # pyright: ignore
    gradient = predictor.mask_tokens.grad
    assert gradient is not None
    assert gradient[0].any()
    assert gradient[1].any()
    assert not gradient[2].any()  # unused: zero but present, so that all ranks reduce alike


def test_predictions_depend_on_position_and_not_on_order() -> None:
    predictor, given = perturbed(), some_inputs()[0]
    (before,) = predictor([given])
    seen, asked = torch.randperm(12), torch.randperm(20)
    shuffled = PredictorInput(
        given.context[:, seen], given.visible[:, seen], given.hidden[:, asked], GRID, given.mask_kind
    )
    (after,) = predictor([shuffled])
    torch.testing.assert_close(after, before[:, asked], rtol=0, atol=1e-5)
    moved = PredictorInput(given.context, given.visible.roll(1, 1), given.hidden, GRID, given.mask_kind)
    assert (predictor([moved])[0] - before).abs().max() > 1e-3


def test_clips_do_not_influence_each_other() -> None:
    predictor, given = perturbed(), some_inputs()[0]
    (before,) = predictor([given])
    context = given.context.clone()
    context[0] = 5.0
    (after,) = predictor([PredictorInput(context, given.visible, given.hidden, GRID, given.mask_kind)])
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])
