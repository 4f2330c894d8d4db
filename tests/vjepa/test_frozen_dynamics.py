"""Dynamics on a frozen encoder: the loss, the encoder by reference, exact resume, and the loaded model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

import vjepa
from vjepa.config import Run
from vjepa.engine.optimizer import build_optimizer
from vjepa.engine.trainer import train
from vjepa.export.export import export
from vjepa.methods import feature_cache
from vjepa.methods.actions import ActedClips
from vjepa.methods.base import Networks, create_method
from vjepa.methods.dynamics.method import Dynamics
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor
from vjepa.nn.settings import Transformer
from vjepa.weights.load import read_weights
from vjepa.weights.tensors import write_safetensors
from vjepa_data.builder.shard import shard
from vjepa_data.errors import BadInput
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Loader
from vjepa_data.spec import Spec
from vjepa_data.worlds.episodes import WORLDS
from vjepa_data.worlds.files import write_episodes

FRAMES, PX = 6, 32


def make_run(corpus: Path | str, encoder: Path | str, *, condition: str = "token", **objective: Any) -> Run:
    return Run.model_validate(
        {
            "name": "tiny_dynamics",
            "steps": 4,
            "batch_size": 4,
            "precision": "fp32",
            "data": {
                "sources": [{"shards": str(corpus)}],
                "clip": {"frames": FRAMES, "fps": 5},
                "crop": {"px": PX, "scale": [1, 1], "aspect": [1, 1], "flip": 0},
                "signals": ["action", "state"],
            },
            "model": {
                "encoder": {"name": "custom", "width": 24, "depth": 1, "heads": 2},
                "predictor": {"width": 24, "depth": 2, "heads": 2},
                "patch_px": 8,
                "init_std": 0.2,
                "condition": condition,
            },
            "objective": {
                "name": "dynamics",
                "encoder": str(encoder),
                "action_channels": 2,
                "state": "state",
                "state_channels": 2,
                **objective,
            },
            "optim": {"lr": 1e-3},
            "loader": {"workers": 0, "decoder": "pyav"},
            "checkpoint": {"every_steps": 2},
            "track": {"wandb": "off", "every_steps": 1, "monitor_every_steps": 2, "pictures_every_steps": None},
            "parallel": {"timeout_s": 60},
        }
    )


def write_encoder(folder: Path, *, seed: int = 0) -> Path:
    """Write a native export of an untrained encoder, with a masked predictor of a size of its own."""
    folder.mkdir(parents=True)
    model = make_run("none", "none").model.model_copy(update={"predictor": Transformer(width=12, depth=1, heads=1)})
    parts = {"encoder": Encoder(model, seed=seed), "predictor": Predictor(model, mask_tokens=1)}
    tensors = {f"{part}.{name}": value for part, net in parts.items() for name, value in net.state_dict().items()}
    write_safetensors(folder / "model.safetensors", tensors.items())
    content = {"format": 1, "model": model.model_dump(mode="json"), "masks": [], "px": PX, "frames": 4, "fps": 4.0}
    (folder / "model.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "native")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    write_episodes(WORLDS["two_room"], folder / "in", episodes=6, seed=0, px=PX, frames=12)
    spec = Spec.model_validate(yaml.safe_load((folder / "in" / "spec.yaml").read_text()))
    shard([str(folder / "in")], folder / "corpus", spec=spec, workers=1)
    return folder / "corpus"


@pytest.fixture(scope="module")
def trained(rooms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamics") / "run"
    assert train(make_run(rooms, encoder), folder) == 0
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith("loss")} for line in lines]


def clips_of(*, count: int = 4) -> ActedClips:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(count, FRAMES, 3, PX, PX, generator=generator)
    conditions = torch.randn(count, FRAMES - 1, 4, generator=generator)
    return ActedClips(frames, conditions, torch.ones(count, FRAMES - 1, dtype=torch.bool), 0, tuple(range(count)))


def build(run: Run) -> tuple[Dynamics, Networks]:
    method = create_method(run)
    assert isinstance(method, Dynamics)
    return method, method.build()


@pytest.mark.parametrize("condition", ["token", "adaln"])
@pytest.mark.parametrize("exponent", [1, 2])
def test_the_loss_is_its_formula(encoder: Path, condition: str, exponent: int):
    run = make_run("none", encoder, condition=condition, normalise="none", exponent=exponent, rollout_weight=0.5)
    method, networks = build(run)
    clips = clips_of()
    loss = method.loss(networks, clips, step=0)
    # Each frame is doubled and encoded alone.
    doubled = clips.frames.flatten(0, 1)[:, :, None].repeat(1, 1, 2, 1, 1)
    plain = vjepa.load(encoder).encoder.encoder
    h = F.layer_norm(plain([_view(doubled)])[0], (24,)).unflatten(0, (4, FRAMES))
    dynamics: Any = networks["dynamics"]
    actions, states = clips.actions[..., :2], clips.actions[..., 2:]
    grid = (4, 4)
    p = F.layer_norm(dynamics.predict(h[:, :-1], actions, states, grid=grid)[0], (24,))
    one = p[:, :1]
    two = F.layer_norm(
        dynamics.predict(torch.cat((h[:, :1], one), 1), actions[:, :2], states[:, :2], grid=grid)[0][:, 1:], (24,)
    )

    def error(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (predicted - target).abs().pow(exponent).mean()

    assert torch.allclose(loss.metrics["prediction"], error(p, h[:, 1:]), rtol=1e-4)
    assert torch.allclose(loss.metrics["rollout"], error(torch.cat((one, two), 1), h[:, 1:3]), rtol=1e-4)
    assert torch.allclose(loss.metrics["copy_last"], error(h[:, :-1], h[:, 1:]), rtol=1e-4)
    assert torch.allclose(loss.value, loss.metrics["prediction"] + 0.5 * loss.metrics["rollout"])


def _view(frames: torch.Tensor) -> Any:
    from vjepa.nn.encoder import View

    return View(frames)


def test_a_later_frame_or_action_leaves_predictions_unchanged(encoder: Path):
    method, networks = build(make_run("none", encoder, normalise="none", rollout_steps=0))
    clips = clips_of()
    changed = clips_of()
    changed.frames[:, 3:] += 1
    changed.actions[:, 3:] += 1
    for each in (clips, changed):  # only the first two intervals count
        each.valid[:, 2:] = False
    one, other = (method.loss(networks, each, step=0).metrics["prediction"] for each in (clips, changed))
    assert torch.equal(one, other)


def test_the_frozen_encoder_has_no_gradient_moment_or_average(encoder: Path):
    run = make_run("none", encoder, normalise="none")
    method, networks = build(run)
    method.loss(networks, clips_of(), step=0).value.backward()
    frozen = list(networks.frozen["encoder"].parameters())
    assert frozen
    assert all(not p.requires_grad and p.grad is None for p in frozen)
    optimizer = build_optimizer(networks.trained, run.optim)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(map(id, frozen))
    assert not networks.averages
    assert "encoder" not in networks.saved


def test_a_checkpoint_describes_the_signals_it_was_trained_with(trained: Path):
    signals = read_weights(trained).provenance["signals"]
    assert signals["action"]["columns"] == ["dx", "dy"]
    assert signals["action"]["combine"] == "sum"
    assert len(signals["state"]["units"]) == len(signals["state"]["columns"])


def test_the_frozen_encoder_is_neither_trained_nor_saved(trained: Path, encoder: Path):
    weights = read_weights(trained)
    stored = json.loads((trained / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert stored["settings"]["objective"]["encoder"] == str(encoder)
    from vjepa.weights.sharded import Sharded

    names = set(Sharded(trained / "checkpoints" / "step_00000004"))
    assert not [
        name
        for name in names
        if "encoder." in name.replace("dynamics.action_encoder.", "").replace("dynamics.state_encoder.", "")
    ]
    assert "encoder_file.sha256" in names
    before = vjepa.load(encoder).encoder.encoder.state_dict()
    for name, value in before.items():
        assert torch.equal(weights.tensors[f"encoder.{name}"], value), name


def test_a_resumed_run_is_the_same_to_the_bit(rooms: Path, encoder: Path, trained: Path, tmp_path: Path):
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    assert train(make_run(rooms, encoder), again) == 0
    one, other = (read_weights(folder).tensors for folder in (trained, again))
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_cached_features_train_the_same_to_the_bit(
    rooms: Path, encoder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cold, warm, and under another encoder in the same folder."""
    monkeypatch.setattr(feature_cache, "RESERVED_BYTES", 0)
    cached = {"feature_cache": str(tmp_path / "cache")}
    for name in ("cold", "warm"):
        assert train(make_run(rooms, encoder, **cached), tmp_path / name) == 0
        assert losses(tmp_path / name) == losses(trained)
    assert len(list((tmp_path / "cache").glob("*/*.features"))) == 1
    other = write_encoder(tmp_path / "other", seed=1)
    assert train(make_run(rooms, other, **cached), tmp_path / "b") == 0
    assert len(list((tmp_path / "cache").glob("*/*.features"))) == 2
    assert losses(tmp_path / "b") != losses(trained)


def test_another_encoder_file_is_refused(rooms: Path, trained: Path, tmp_path: Path):
    again, changed = tmp_path / "run", tmp_path / "native"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    original = Path(
        json.loads((again / "checkpoints" / "step_00000002" / "state.json").read_text())["settings"]["objective"][
            "encoder"
        ]
    )
    shutil.move(original, changed)
    try:
        with pytest.raises(BadInput, match="cannot be read"):
            vjepa.load(again)
        write_encoder(original, seed=1)
        with pytest.raises(BadInput, match="another encoder"):
            vjepa.load(again)
        with pytest.raises(BadInput, match="not the encoder that the checkpoint was trained with"):
            train(make_run(rooms, original), again)
    finally:
        shutil.rmtree(original, ignore_errors=True)
        shutil.move(changed, original)


def test_an_encoder_of_another_size_is_refused(encoder: Path):
    values = make_run("none", encoder, normalise="none").model_dump(mode="json")
    values["model"]["encoder"]["width"] = 48
    with pytest.raises(BadInput, match=r"model\.encoder asks for"):
        create_method(Run.model_validate(values)).build()
    with pytest.raises(BadInput, match="not a native export"):
        create_method(make_run("none", "nowhere", normalise="none")).build()


def test_a_loaded_model_and_its_export_roll_out_as_in_training(
    rooms: Path, encoder: Path, trained: Path, tmp_path: Path
):
    run, model = make_run(rooms, encoder), vjepa.load(trained)
    batch = next(iter(ClipLoader(run.data, Loader(workers=0, decoder="pyav"), seed=0, batch_size=4)))
    (clips,) = batch.groups
    method = create_method(run)
    assert isinstance(method, Dynamics)
    conditions = method.prepare(batch, torch.device("cpu")).actions
    dynamics: Any = model.parts["dynamics"]
    with torch.no_grad():
        latents = model.latents(clips.frames)
        assert latents.shape == (4, FRAMES, 4, 4, 24)
        found = model.rollout(clips.frames[:, :2], conditions)
        assert found.shape == (4, 4, 4, 4, 24)
        scaled = dynamics.scales(conditions)
        first = dynamics.predict(latents[:, :2].flatten(2, 3), scaled[:, :2, :2], scaled[:, :2, 2:], grid=(4, 4))[0]
        assert torch.allclose(found[:, 0].flatten(1, 2), F.layer_norm(first[:, -1], (24,)), atol=1e-5)
        export(trained, tmp_path / "native", format="native")
        other = vjepa.load(tmp_path / "native")
        assert torch.allclose(other.rollout(clips.frames[:, :2], conditions), found, atol=1e-5)
