"""LeWM: terms of the loss, exact resume with actions, and a loaded model that rolls out as training did."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

import vjepa
from vjepa.config import Run
from vjepa.engine.trainer import train
from vjepa.export.export import export
from vjepa.methods.actions import ActedClips
from vjepa.methods.base import Networks, create_method
from vjepa.methods.lewm.method import Inverse, LeWM
from vjepa.methods.regularizers import directions, sigreg
from vjepa.weights.load import read_weights
from vjepa_data.builder.shard import shard
from vjepa_data.corpus.index import Index
from vjepa_data.errors import BadInput
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.reader.signals import interval_statistics
from vjepa_data.settings import Clip, Data, Loader, Source
from vjepa_data.spec import Spec
from vjepa_data.worlds.episodes import WORLDS
from vjepa_data.worlds.files import write_episodes

FRAMES, PX = 5, 32


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two rooms."""
    folder = tmp_path_factory.mktemp("rooms")
    write_episodes(WORLDS["two_room"], folder / "in", episodes=6, seed=0, px=PX, frames=12)
    spec = Spec.model_validate(yaml.safe_load((folder / "in" / "spec.yaml").read_text()))
    shard([str(folder / "in")], folder / "corpus", spec=spec, workers=1)
    return folder / "corpus"


def make_run(corpus: Path | str = "none", **objective: Any) -> Run:
    return Run.model_validate(
        {
            "name": "tiny_lewm",
            "steps": 4,
            "batch_size": 4,
            "precision": "fp32",
            "data": {
                "sources": [{"shards": str(corpus)}],
                "clip": {"frames": FRAMES, "fps": 5},
                "crop": {"px": PX, "scale": [1, 1], "aspect": [1, 1], "flip": 0},
                "signals": ["action"],
            },
            "model": {
                "encoder": {"name": "custom", "width": 24, "depth": 1, "heads": 2},
                "predictor": {"width": 24, "depth": 2, "heads": 2},
                "patch_px": 8,
                "tubelet_frames": 1,
                "rope": "sincos",
                "window": 3,
            },
            "objective": {"name": "lewm", "latent": [16, 8], "rollout_steps": 3, "slices": 16, **objective},
            "optim": {"lr": 1e-3},
            "loader": {"workers": 0, "decoder": "pyav"},
            "checkpoint": {"every_steps": 2},
            "track": {"wandb": "off", "every_steps": 1, "monitor_every_steps": 2, "pictures_every_steps": None},
            "parallel": {"timeout_s": 60},
        }
    )


def acted_clips(*, clips: int = 4) -> ActedClips:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(clips, FRAMES, 3, PX, PX, generator=generator)
    actions = torch.randn(clips, FRAMES - 1, 2, generator=generator)
    return ActedClips(frames, actions, torch.ones(clips, FRAMES - 1, dtype=torch.bool), 0, tuple(range(clips)))


def build(run: Run) -> tuple[LeWM, Networks]:
    method = create_method(run)
    assert isinstance(method, LeWM)
    return method, method.build()


# The loss


def test_the_loss_is_its_formula():
    weights: dict[str, Any] = {
        "regularizer_weight": 0.1,
        "inverse_weight": 2.0,
        "temporal_weight": 0.3,
        "straight_weight": 0.2,
    }
    run = make_run(normalise="none", rollout_weight=0.7, **weights)
    method, networks = build(run)
    clips = acted_clips()
    loss = method.loss(networks, clips, step=0)
    tokens = method._encode_frames(networks["encoder"], clips.frames)
    dynamics: Any = networks["dynamics"]
    centre: Any = networks["dynamics.centre"]
    flat = tokens.flatten(2)
    assert torch.allclose(centre.mean, flat.mean((0, 1)), atol=1e-5)
    assert torch.allclose(centre.std, (flat.var((0, 1), correction=0) + 0.01).sqrt(), atol=1e-4)
    z = dynamics.projector((flat - centre.mean) / centre.std)
    following = dynamics.predict(z[:, :-1, None], clips.actions)[0][:, :, 0]
    rolled = dynamics.predict_steps(z[:, :1, None], clips.actions[:, :3])[:, :, 0]
    slices = directions(seed=0, step=0, width=8, slices=16, device=z.device)
    change = z[:, 1:] - z[:, :-1]
    cosine = (change[:, 1:] * change[:, :-1]).sum(-1) / (change[:, 1:].norm(dim=-1) * change[:, :-1].norm(dim=-1))
    expected = {
        "prediction": (following - z[:, 1:]).square().mean(),
        "rollout": (rolled - z[:, 1:4]).square().mean(),
        "regularizer": torch.stack([sigreg(each, count=4, slices=slices, knots=17) for each in z.unbind(1)]).mean(),
        "inverse": (networks["inverse"](z) - clips.actions).square().mean(),
        "copy_last": change.square().mean(),
        "straight": (1 - cosine).mean(),
    }
    for name, value in expected.items():
        assert torch.allclose(loss.metrics[name], value, rtol=1e-4), name
    shares = {"prediction": 1, "rollout": 0.7, "regularizer": 0.1, "inverse": 2, "copy_last": 0.3, "straight": 0.2}
    assert torch.allclose(loss.value, sum(w * expected[n] for n, w in shares.items()) + torch.zeros(()), rtol=1e-4)


def test_gradients_flow_through_the_target():
    method, networks = build(make_run(normalise="none", rollout_weight=0, regularizer_weight=0, inverse_weight=0))
    clips = acted_clips()
    frames = clips.frames.requires_grad_()
    method.loss(networks, clips, step=0).value.backward()
    assert frames.grad is not None
    assert frames.grad[:, -1].abs().max() > 0  # the last frame is a target only


def test_predictions_do_not_depend_on_later_frames():
    method, networks = build(make_run(normalise="none"))
    clips = acted_clips()
    frames = clips.frames.requires_grad_()
    tokens = method._encode_frames(networks["encoder"], frames)
    found = networks["dynamics"](tokens, clips.actions, clips.actions, 3, networks["dynamics.centre"])
    for t in range(FRAMES - 1):
        (gradient,) = torch.autograd.grad(found.following[:, t].square().sum(), frames, retain_graph=True)
        assert gradient[:, t + 1 :].abs().max() == 0
        assert gradient[:, t].abs().max() > 0
    (gradient,) = torch.autograd.grad(found.rollout.square().sum(), frames)
    assert gradient[:, 1:].abs().max() == 0  # a rollout starts at the first frame


def test_invalid_intervals_do_not_count():
    method, networks = build(make_run(normalise="none", regularizer_weight=0))
    clips = acted_clips()
    clips.valid[:, 2:] = False
    before = method.loss(networks, clips, step=0)
    changed = ActedClips(clips.frames.clone(), clips.actions.clone(), clips.valid, 0, clips.slots)
    changed.frames[:, 3:] = 0
    changed.actions[:, 2:] = 9
    after = method.loss(networks, changed, step=0)
    for name in ("prediction", "rollout", "inverse", "copy_last", "straight"):
        assert torch.allclose(before.metrics[name], after.metrics[name], rtol=1e-5), name


def test_a_linear_inverse_reads_differences_alone():
    inverse = Inverse(make_run().model, latent=8, hidden=0, actions=2)
    latents = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    found = inverse(latents)
    assert torch.allclose(found, inverse(latents + latents[:1, :1]), atol=1e-5)
    total = torch.stack((latents[:, 0], latents[:, -1]), dim=1)
    assert torch.allclose(found.sum(1), inverse(total)[:, 0], atol=1e-5)


def test_shuffled_actions_are_those_of_the_next_slot():
    method, networks = build(make_run(normalise="none"))
    clips = acted_clips()
    loss = method.loss(networks, clips, step=0)
    rolled = ActedClips(clips.frames, clips.actions.roll(-1, 0), clips.valid, 0, clips.slots)
    other = method.loss(networks, rolled, step=0)
    assert torch.allclose(loss.metrics["shuffled_actions"], other.metrics["prediction"], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": {"signals": []}}, "set data.signals"),
        ({"data": {"clip": {"frames": 3}}}, "needs clips of 4 frames"),
        ({"model": {"causal": True}}, "remove model.levels"),
        ({"parallel": {"accumulate": 2}}, "Use more ranks"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(change: dict[str, dict[str, Any]], error: str):
    values = make_run().model_dump(mode="json")
    for group, names in change.items():
        values[group] = {**values[group], **names}
    with pytest.raises(ValidationError, match=error):
        Run.model_validate(values)


# A run


@pytest.fixture(scope="module")
def trained(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lewm") / "run"
    assert train(make_run(rooms), folder) == 0
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith(("step", "loss"))} for line in lines]


def test_a_run_logs_ratios(trained: Path):
    last = records(trained)[-1]
    assert last["loss/copy_ratio"] == pytest.approx(last["loss/prediction"] / last["loss/copy_last"], rel=1e-4)
    assert last["loss/action_gain"] == pytest.approx(last["loss/shuffled_actions"] / last["loss/prediction"], rel=1e-4)


def test_a_resumed_run_is_the_same_to_the_bit(rooms: Path, trained: Path, tmp_path: Path):
    again = tmp_path / "run"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    assert train(make_run(rooms), again) == 0
    one, other = (read_weights(folder).tensors for folder in (trained, again))
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert records(again)[-1] == records(trained)[-1]


def test_the_action_scale_is_that_of_the_corpus(rooms: Path, trained: Path):
    found = Index(rooms).statistics["action"]
    model = vjepa.load(trained)
    scale: Any = model.parts["dynamics"]
    # Clips at 5 fps sum two rows of 10 Hz.
    assert torch.allclose(scale.actions.mean, 2 * torch.tensor(found.mean), atol=1e-6)
    assert torch.allclose(scale.actions.std, 2 * torch.tensor(found.std), atol=1e-6)


@pytest.mark.parametrize("pace", [{"fps": 5}, {"frame_step": 2}, {"duration_s": 0.8}])
def test_the_action_scale_follows_the_pace_of_the_source(rooms: Path, pace: dict[str, float]):
    """Frames are two of 10 Hz apart, however the source says it."""
    source = Source.model_validate({"shards": str(rooms), **pace})
    data = Data(sources=(source,), clip=Clip(frames=4, fps=1), signals=("action",))
    found = interval_statistics(data, "action")
    assert np.allclose(found.std, 2 * np.array(Index(rooms).statistics["action"].std))


def test_a_loaded_model_rolls_out_as_in_training(rooms: Path, trained: Path):
    run, model = make_run(rooms), vjepa.load(trained)
    assert model.capabilities == {"encode", "rollout"}
    batch = next(iter(ClipLoader(run.data, Loader(workers=0, decoder="pyav"), seed=0, batch_size=4)))
    (clips,) = batch.groups
    actions = clips.signals["action"].values
    dynamics: Any = model.parts["dynamics"]
    with torch.no_grad():
        latents = model.latents(clips.frames)
        found = model.rollout(clips.frames[:, :2], actions)
        assert latents.shape == (4, FRAMES, 1, 1, 8)
        assert found.shape == (4, 3, 1, 1, 8)
        expected = dynamics.predict_steps(latents[:, :2].flatten(2, 3), dynamics.actions(actions))
        assert torch.allclose(found[:, :, 0], expected, atol=1e-5)
        method = create_method(run)
        assert isinstance(method, LeWM)
        prepared = method.prepare(batch, torch.device("cpu"))
        tokens = method._encode_frames(model.encoder.encoder, prepared.frames)
        assert torch.allclose(dynamics.project(tokens, dynamics.centre), latents[:, :, 0, 0], atol=1e-6)
    with pytest.raises(BadInput, match="actions of 2 channels"):
        model.rollout(clips.frames, actions[:, :, :1])
    with pytest.raises(BadInput, match="size that the model was trained on"):
        model.latents(torch.zeros(1, 2, 40, 40, 3, dtype=torch.uint8))


def test_an_export_rolls_out_as_the_run(trained: Path, tmp_path: Path):
    export(trained, tmp_path / "native", format="native")
    one, other = vjepa.load(trained), vjepa.load(tmp_path / "native")
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, PX, PX, 3), dtype=np.uint8))
    actions = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(one.rollout(frames, actions), other.rollout(frames, actions), atol=1e-5)


def test_a_wrong_number_of_channels_is_refused(rooms: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="the objective's channels are 3"):
        train(make_run(rooms, action_channels=3), tmp_path / "run")
