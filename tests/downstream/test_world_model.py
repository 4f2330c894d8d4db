"""`vjepa.load` gives the networks of training, from every layout."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import load_weights
from torch import Tensor, nn

import vjepa
from vjepa.export.export import export
from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.grid import Grid
from vjepa.nn.predictor import Predictor, PredictorInput
from vjepa.weights import world_model
from vjepa.weights.load import read_weights
from vjepa.weights.tensors import InMemory
from vjepa_data.errors import BadInput

GRID = Grid(2, 4, 4)
DENSE = {"levels": (0, 1), "still_tokens": True, "predict_context": True, "rope": "interleaved", "rope_cells": 4}


def clips(frames: int = 4) -> Tensor:
    return torch.randint(0, 256, (2, frames, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tokens(grid: Grid = GRID) -> tuple[Tensor, Tensor]:
    """Token ids of two clips, each hidden in other places: visible [2 V], hidden [2 K]."""
    order = torch.stack([torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(n)) for n in range(2)])
    return order[:, :12].sort().values, order[:, 12:].sort().values


def trained_prediction(run: Path, part: str, frames: Tensor, *, mask_kind: int) -> Tensor:
    """The prediction as a training step computes it, from the tensors of the checkpoint itself."""
    weights = read_weights(run)
    encoder, predictor = Encoder(weights.model), Predictor(weights.model, len(weights.masks))
    encoder.load_state_dict(load_weights(run, part))
    predictor.load_state_dict(load_weights(run, "predictor"))
    grid, is_still = Grid.of(frames.shape[1], 32, 32, weights.model), frames.shape[1] == 1
    visible, hidden = tokens(grid)
    with torch.no_grad():
        (context,) = encoder([View(normalise(frames), visible)], levels=True)
        return predictor([PredictorInput(context, visible, hidden, grid, mask_kind, still=is_still)])[0]


@pytest.mark.parametrize("part", ["target", "encoder"])
@pytest.mark.parametrize("layout", ["run", "checkpoint", "native", "hf"])
def test_predictions_are_those_of_training(trained: Path, tmp_path: Path, layout: str, part: str) -> None:
    path = {"run": trained, "checkpoint": trained / "checkpoints" / "step_00000040"}.get(layout, tmp_path / "out")
    if layout in ("native", "hf"):
        export(trained, path, format=layout, part=part)  # pyright: ignore[reportArgumentType]
    model = vjepa.load(path, part)  # pyright: ignore[reportArgumentType]
    assert model.capabilities == {"encode", "predict"}
    assert (model.px, model.frames, model.fps, model.width, model.provenance["step"]) == (32, 4, 8.0, 48, 40)
    visible, hidden = tokens()
    for kind in (0, 1):
        expected = trained_prediction(trained, part, clips(), mask_kind=kind)
        assert torch.equal(model.predict(clips(), visible, hidden, mask_kind=kind), expected)


@pytest.mark.parametrize("frames", [4, 1])
def test_all_levels_are_predicted_for_clips_and_pictures(
    make_trained: Callable[..., Path], tmp_path: Path, frames: int
) -> None:
    run = make_trained(tmp_path / "run", **DENSE)
    export(run, tmp_path / "native", format="native")
    visible, hidden = tokens(Grid(max(1, frames // 2), 4, 4))
    expected = trained_prediction(run, "target", clips(frames), mask_kind=1)
    assert expected.shape == (2, hidden.shape[1], 2 * 48)
    for path in (run, tmp_path / "native"):
        model = vjepa.load(path)
        assert model.levels == 2
        assert torch.equal(model.predict(clips(frames), visible, hidden, mask_kind=1), expected)
        context = model.encoder.features(clips(frames), visible, levels=True)
        again = model.predict(context, visible, hidden, mask_kind=1, still=frames == 1)
        assert torch.equal(again, expected)
        assert model.targets(clips(frames)).shape == (2, max(1, frames // 2), 4, 4, 96)


def test_features_need_the_grid_of_clips_of_another_size(trained: Path) -> None:
    model, frames = vjepa.load(trained), clips(8)
    grid = model.encoder.grid(frames)
    visible, hidden = tokens(grid)
    context = model.encoder.features(frames, visible)
    expected = model.predict(frames, visible, hidden)
    assert torch.equal(model.predict(context, visible, hidden, grid=grid), expected)
    with pytest.raises(BadInput, match=r"visible has token \d+, and the clips have tokens 0 to 31"):
        model.predict(context, visible, hidden)


def test_a_still_picture_fills_a_tubelet(trained: Path) -> None:
    model, picture = vjepa.load(trained), clips(1)
    assert torch.equal(model.encode(picture), model.encode(picture.expand(-1, 2, -1, -1, -1)))


def test_targets_are_normed_features(trained: Path) -> None:
    model = vjepa.load(trained)
    features = model.encode(clips())
    assert torch.equal(features, model.encoder(clips()))
    assert torch.equal(model.targets(clips()), torch.nn.functional.layer_norm(features, (48,)))


def test_gradients_reach_the_context(trained: Path) -> None:
    model = vjepa.load(trained)
    visible, hidden = tokens()
    context = model.encoder.features(clips(), visible).requires_grad_()
    model.predict(context, visible, hidden).square().sum().backward()
    assert context.grad is not None
    assert context.grad.any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_predictor_says_which_methods_have_one(
    make_trained: Callable[..., Path], tmp_path: Path
) -> None:
    model = vjepa.load(make_trained(tmp_path / "run", _without_predictor=True))
    assert (model.predictor, model.capabilities) == (None, {"encode"})
    assert model.encode(clips()).shape == (2, 2, 4, 4, 48)
    with pytest.raises(BadInput, match="cannot predict: its parts are encoder; load a model trained by vjepa2 or"):
        model.predict(clips(), *tokens())


def test_a_model_without_dynamics_says_which_methods_roll_out(trained: Path) -> None:
    with pytest.raises(
        BadInput, match="cannot rollout: its parts are encoder, predictor; load a model trained by lewm or dynamics"
    ):
        vjepa.load(trained).rollout(clips(), torch.zeros(2, 3, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_kind": 2}, "mask_kind is 2, and the model has mask tokens 0 to 1"),
        ({"hidden": torch.tensor([[32], [0]])}, "hidden has token 32, and the clips have tokens 0 to 31"),
        ({"visible": torch.tensor([[-1], [0]])}, "visible has token -1"),
    ],
)
def test_tokens_that_do_not_exist_are_named(trained: Path, change: dict, message: str) -> None:
    visible, hidden = tokens()
    with pytest.raises(BadInput, match=message):
        vjepa.load(trained).predict(clips(), **{"visible": visible, "hidden": hidden, **change})


class ToyDynamics(nn.Module):
    """Adds a linear map of the action to the last frame's features, at every step."""

    def __init__(self, width: int, action: int) -> None:
        super().__init__()
        self.action = nn.Linear(action, width)

    def rollout(self, encoder: nn.Module, frames: Tensor, actions: Tensor) -> Tensor:
        return encoder(frames)[:, -1:] + self.action(actions)[:, :, None, None].cumsum(1)


def test_a_new_kind_of_part_is_one_entry(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, exporting and loading a model with a dynamics predictor need no other change."""
    kind = world_model.PartKind(
        name="dynamics",
        marker="dynamics.action.weight",
        build=lambda model, shape: ToyDynamics(*shape("dynamics.action.weight")),
        capability="rollout",
        methods=("toy",),
    )
    monkeypatch.setattr(world_model, "PARTS", (*world_model.PARTS, kind))
    weights = read_weights(trained)
    dynamics = {f"dynamics.{name}": one for name, one in ToyDynamics(48, 7).state_dict().items()}
    tensors = InMemory({**weights.tensors, **dynamics})
    model = world_model.WorldModel(weights.model, tensors, px=32, frames=4, fps=8.0, provenance={})
    assert model.capabilities == {"encode", "predict", "rollout"}
    actions = torch.randn(2, 3, 7)
    assert model.rollout(clips(), actions).shape == (2, 3, 4, 4, 48)


# In a separate process signatures are not checked, so users without jaxtyping see the same errors.
OTHER_FORMS = """
import sys, torch, vjepa
model = vjepa.load(sys.argv[1])
frames, ids = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8), torch.arange(4)[None]
for context, visible in ((frames.float(), ids), (torch.zeros(1, 4, 7), ids), (frames, ids.int()), (frames, ids[0])):
    try:
        model.predict(context, visible, ids)
    except ValueError as error:
        print(error)
"""


def test_arguments_of_another_form_are_rejected(trained: Path) -> None:
    done = subprocess.run([sys.executable, "-c", OTHER_FORMS, str(trained)], check=True, capture_output=True, text=True)
    assert [re.split("[;.] ", line)[0] for line in done.stdout.splitlines()] == [
        "features of the visible tokens are [1, 4, 48], got [1, 4, 32, 32, 3]",
        "features of the visible tokens are [1, 4, 48], got [1, 4, 7]",
        "visible token ids are int64 [B N], got int32 [1, 4]",
        "visible token ids are int64 [B N], got int64 [4]",
    ]
