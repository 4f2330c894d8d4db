"""A file of V-JEPA 2-AC becomes an encoder and a dynamics checkpoint that rolls out as its own networks do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vjepa
from vjepa.config import Model, Run
from vjepa.methods.base import create_method
from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.frame_dynamics import FrameDynamics, normed
from vjepa.nn.settings import EncoderSize, Transformer
from vjepa.weights.fair_checkpoints import Sizes
from vjepa.weights.import_checkpoint import import_checkpoint
from vjepa.weights.load import read_weights
from vjepa_data.errors import BadInput

PX, FRAMES, COLUMNS = 32, 5, 7
SIZES = Sizes(heads=2, predictor_heads=2, px=PX)
MODEL = Model(
    encoder=EncoderSize(name="custom", width=24, depth=1, heads=2),
    predictor=Transformer(width=24, depth=2, heads=2),
    condition="token",
    init_std=0.2,
)


def networks() -> tuple[Encoder, FrameDynamics]:
    return Encoder(MODEL, seed=1), FrameDynamics(MODEL, actions=COLUMNS, states=COLUMNS, seed=1)


def as_released() -> dict[str, Any]:
    """The layout of vjepa2-ac-vitg.pt: names behind wrappers, and an embedding that is not used."""
    encoder, dynamics = networks()
    predictor = {f"module.{name}": tensor for name, tensor in dynamics.state_dict().items()}
    predictor |= {
        "module.extrinsics_encoder.weight": torch.ones(24, 6),
        "module.extrinsics_encoder.bias": torch.ones(24),
    }
    parts = {"encoder": {f"module.backbone.{name}": tensor for name, tensor in encoder.state_dict().items()}}
    return {**parts, "predictor": predictor, "target_encoder": parts["encoder"], "epoch": 315, "opt": {}}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ac")
    torch.save(as_released(), folder / "vjepa2-ac.pt")
    import_checkpoint(folder / "vjepa2-ac.pt", folder / "out", SIZES)
    return folder / "out"


def test_an_imported_model_rolls_out_as_its_networks(imported: Path):
    model, (encoder, dynamics) = vjepa.load(imported), networks()
    assert model.capabilities == {"encode", "rollout"}
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 1, PX, PX, 3), generator=generator, dtype=torch.uint8)
    actions, states = torch.randn(2, 2, FRAMES - 1, COLUMNS, generator=generator)
    with torch.no_grad():
        pixels = normalise(frames).expand(-1, -1, MODEL.tubelet_frames, -1, -1)
        first = normed(encoder([View(pixels)])[0][:, None])
        expected = dynamics.predict_steps(first, actions, states, grid=(2, 2), transform=normed)
        found = model.rollout(frames, torch.cat((actions, states), dim=-1))
    assert torch.allclose(found.flatten(2, 3), expected, atol=1e-5)


def test_training_can_begin_from_an_import(imported: Path):
    weights = read_weights(imported)
    run = Run.model_validate(weights.provenance["settings"])
    objective = run.objective.model_dump()
    assert (objective["exponent"], objective["normalise"], run.data.signals) == (1, "none", ("action", "state"))
    assert (run.data.clip.frames, run.data.crop.px, run.data.crop.flip) == (8, PX, 0)
    built = create_method(run).build()
    encoder, _ = networks()
    own = dict(encoder.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in built["encoder"].named_parameters())
    assert torch.equal(read_weights(imported / "encoder").tensors["encoder.norm.weight"], own["norm.weight"])


@pytest.mark.parametrize(
    ("spoil", "sizes", "error"),
    [
        (lambda p: p.pop("module.state_encoder.weight"), {}, r"state_encoder\.weight of its predictor is missing"),
        (lambda p: p.pop("module.predictor_norm.bias"), {}, r"predictor lacks predictor_norm\.bias"),
        (lambda p: p.update({"module.mask_tokens.0": torch.zeros(1)}), {}, "predictor has mask_tokens"),
        (lambda p: p.update({"module.predictor_proj.bias": torch.zeros(9)}), {}, r"is \[9\], expected \[24\]"),
        (lambda p: None, {"objective": "vjepa2"}, "has no masks; leave out --objective"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, spoil: Callable[[dict], Any], sizes: dict, error: str):
    content = as_released()
    spoil(content["predictor"])
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(BadInput, match=error):
        import_checkpoint(tmp_path / "other.pt", tmp_path / "out", Sizes(heads=2, predictor_heads=2, px=PX, **sizes))
    assert not (tmp_path / "out").exists()
