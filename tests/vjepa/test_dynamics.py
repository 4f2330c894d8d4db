"""The dynamics predictor is causal, and a cached step is the full pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vjepa.compat import TorchDispatchMode, tree_leaves
from vjepa.nn.dynamics import DynamicsPredictor
from vjepa.nn.settings import EncoderSize, Model, Transformer

BATCH, FRAMES, ACTIONS, LATENT = 2, 6, 3, 8


def predictor(*, window: int | None = None, rope: str = "tiled", condition: str = "adaln") -> DynamicsPredictor:
    settings = Model(
        encoder=EncoderSize(name="custom", width=24, depth=1, heads=2),
        predictor=Transformer(width=24, depth=3, heads=2),
        window=window,
        rope=rope,  # pyright: ignore[reportArgumentType]
        condition=condition,  # pyright: ignore[reportArgumentType]
        init_std=0.2,
    )
    made = DynamicsPredictor(settings, latent=LATENT, actions=ACTIONS)
    made.init_weights(0)
    return made


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(BATCH, FRAMES, tokens, LATENT, generator=generator)
    return latents, torch.randn(BATCH, FRAMES, ACTIONS, generator=generator)


CONDITIONS = pytest.mark.parametrize("condition", ["adaln", "token"])


@CONDITIONS
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_prediction_has_no_gradient_to_later_frames_or_actions(window: int | None, tokens: int, condition: str):
    depth = 3
    latents, actions = (each.requires_grad_() for each in inputs(tokens))
    grid = (tokens // 2 or 1, min(2, tokens))
    found = predictor(window=window, condition=condition).predict(latents, actions, grid=grid)[0]
    for t in range(FRAMES):
        to_latents, to_actions = torch.autograd.grad(found[:, t].square().sum(), (latents, actions), retain_graph=True)
        # A block looks window - 1 frames back, so the prediction looks depth times as far.
        first = 0 if window is None else max(0, t - depth * (window - 1))
        for gradient in (to_latents.flatten(2), to_actions):
            reached = gradient.abs().amax((0, 2)) > 0
            assert reached.tolist() == [first <= s <= t for s in range(FRAMES)]


@CONDITIONS
@pytest.mark.parametrize("rope", ["tiled", "sincos"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("tokens", [1, 6])
def test_steps_with_a_cache_equal_the_full_pass(window: int | None, tokens: int, rope: str, condition: str):
    made, (latents, actions) = predictor(window=window, rope=rope, condition=condition), inputs(tokens)
    grid = (3, 2) if tokens == 6 else (1, 1)
    with torch.no_grad():
        whole = made.predict(latents, actions, grid=grid)[0]
        cache, steps = None, []
        for t in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)):  # also several frames at once
            found, cache = made.predict(latents[:, t], actions[:, t], cache=cache, grid=grid)
            steps.append(found)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-5
    assert cache is not None
    kept = FRAMES if window is None else window - 1
    assert cache.blocks[0].keys.shape[1] == kept * (tokens + (condition == "token"))


@CONDITIONS
def test_a_rollout_feeds_predictions_back(condition: str):
    made, (latents, actions) = predictor(condition=condition), inputs(4)
    with torch.no_grad():
        found = made.predict_steps(latents[:, :2], actions, grid=(2, 2))
        given = latents[:, :2]
        for t in range(2, FRAMES + 1):
            predicted, _ = made.predict(given, actions[:, :t], grid=(2, 2))
            given = torch.cat((given, predicted[:, -1:]), dim=1)
    assert found.shape == (BATCH, FRAMES - 1, 4, LATENT)
    assert (found - given[:, 2:]).abs().max() < 1e-5


@CONDITIONS
def test_an_action_changes_the_prediction(condition: str):
    made, (latents, actions) = predictor(condition=condition), inputs(1)
    assert not torch.allclose(made.predict(latents, actions)[0], made.predict(latents, -actions)[0])


class BoolTensors(TorchDispatchMode):
    """Counts the elements of boolean tensors that operations return."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.bool)
        return result


@pytest.mark.parametrize("window", [None, 2])
def test_frames_of_many_tokens_need_no_mask(window: int | None):
    latents, actions = inputs(4)
    with BoolTensors() as masks:
        predictor(window=window, condition="token").predict(latents, actions, grid=(2, 2))
    assert masks.elements == 0
