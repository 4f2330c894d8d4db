"""Exports of world models: plain transformers with code of its own, two programs, and native, all roll out alike."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vjepa
from vjepa.config import Model
from vjepa.export import hf_world_model
from vjepa.export.export import export
from vjepa.nn.encoder import Encoder
from vjepa.nn.frame_dynamics import FrameDynamics
from vjepa.nn.latent_dynamics import ActionScale, Centre, LatentDynamics
from vjepa.weights.tensors import write_safetensors
from vjepa_data.errors import BadInput

PX, CHANNELS = 32, 2


def write_model(folder: Path, kind: str, *, states: int = 0, **settings: Any) -> Path:
    """Write a native export of an untrained world model with scales other than 0 and 1."""
    size = {"width": 24, "depth": 2, "heads": 2}
    model = Model.model_validate(
        {"encoder": {"name": "custom", **size}, "predictor": size, "patch_px": 8, "init_std": 0.2, **settings}
    )
    tokens = (PX // 8) ** 2
    if kind == "frame":
        dynamics: Any = FrameDynamics(model, actions=CHANNELS, states=states)
        dynamics.scales = ActionScale(CHANNELS + states)
    else:
        dynamics = LatentDynamics(model, tokens=tokens, hidden=16, latent=8, actions=CHANNELS)
        dynamics.actions, dynamics.centre = ActionScale(CHANNELS), Centre(tokens * 24)
    tensors = {f"encoder.{name}": value for name, value in Encoder(model, seed=1).state_dict().items()}
    tensors |= {f"dynamics.{name}": value for name, value in dynamics.state_dict().items()}
    for name, value in tensors.items():
        if name.endswith(("scales.mean", "actions.mean", "centre.mean")):
            value += 0.3
        elif name.endswith(("scales.std", "actions.std", "centre.std")):
            value *= 2
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", tensors.items())
    content = {"format": 1, "model": model.model_dump(mode="json"), "masks": [], "px": PX, "frames": 6, "fps": 5.0}
    (folder / "model.json").write_text(json.dumps(content))
    return folder


MODELS = {
    "latent": {"kind": "latent", "window": 3},
    "tokens and states": {"kind": "frame", "states": 2, "condition": "token"},
    "adaln and a window": {"kind": "frame", "condition": "adaln", "window": 2, "rope": "interleaved"},
}


def inputs(channels: int, *, known: int = 2, steps: int = 5, clips: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (clips, known, PX, PX, 3), generator=draw, dtype=torch.uint8)
    return frames, torch.randn(clips, known - 1 + steps, channels, generator=draw)


def test_an_export_names_the_channels_of_actions_and_states():
    signals = {
        "action": {"columns": ["dx", "dy"], "units": ["m", "m"]},
        "state": {"columns": ["angle"], "units": ["rad"]},
    }
    both = hf_world_model.columns_and_units(signals, ["action", "state"], 3)
    assert both == {"columns": ["dx", "dy", "angle"], "units": ["m", "m", "rad"]}
    stacked = hf_world_model.columns_and_units(signals, ["action"], 4)
    assert stacked["columns"] == ["dx", "dy", "dx", "dy"]
    assert hf_world_model.columns_and_units({}, ["action"], 2) == {}


def compare_programs(tmp_path: Path, name: str) -> None:
    """Export a model as programs, and compare their rollout with the model's."""
    source = write_model(tmp_path / "native", **MODELS[name])
    check = export(source, tmp_path / "programs", format="pt2")["check"]
    assert check["rollout_max_abs_difference"] <= 1e-5
    model = vjepa.load(source)
    frames, actions = inputs(CHANNELS + MODELS[name].get("states", 0))
    encode, step = (torch.export.load(tmp_path / "programs" / f"{n}.pt2").module() for n in ("encode", "step"))
    expected = model.rollout(frames, actions)
    known = [encode(frames[:, number]) for number in range(2)]
    assert torch.allclose(known[1], model.latents(frames)[:, 1], atol=1e-5)
    blocks, _, _, heads, width = check["past"]
    keys = values = torch.zeros(blocks, len(frames), 0, heads, width)
    found, latent = [], known[0]
    for number in range(actions.shape[1]):
        latent = known[number] if number < 2 else latent
        latent, keys, values = step(latent, actions[:, number], keys, values, torch.tensor(number))
        if check["window"]:
            kept = (check["window"] - 1) * check["tokens_per_frame"]
            keys, values = keys[:, :, -kept:], values[:, :, -kept:]
        found.append(latent)
    assert torch.allclose(torch.stack(found[1:], 1), expected, atol=1e-5)


def test_the_programs_roll_out_as_the_model(tmp_path: Path):
    """In a separate process, because the signature checks of tests cannot be traced."""
    calls = [f"names['compare_programs'](Path({str(tmp_path / name)!r}), {name!r})" for name in MODELS]
    code = f"import runpy; from pathlib import Path; names = runpy.run_path({__file__!r}); {'; '.join(calls)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The native export and the transformers export of each model."""
    pytest.importorskip("transformers")
    found = {}
    for name, settings in MODELS.items():
        folder = tmp_path_factory.mktemp("world")
        native = write_model(folder / "native", **settings)
        check = export(native, folder / "hf", format="hf")["check"]
        assert check["rollout_max_abs_difference"] <= 1e-5
        found[name] = (native, folder / "hf")
    return found


def test_the_folder_for_transformers_is_read_by_our_loader_too(folders: dict[str, tuple[Path, Path]]):
    for name, (native, folder) in folders.items():
        frames, actions = inputs(CHANNELS + MODELS[name].get("states", 0))
        model = vjepa.load(folder)
        assert torch.equal(model.rollout(frames, actions), vjepa.load(native).rollout(frames, actions))
        config = json.loads((folder / "config.json").read_text())
        assert config["actions"]["mean"] == pytest.approx([0.3] * actions.shape[-1])
        assert config["actions"]["std"] == [2.0] * actions.shape[-1]
        card = (folder / "README.md").read_text()
        assert "trust_remote_code=True" in card
        assert "rollout(frames, actions)" in card


PROGRAM = """
import sys
sys.modules |= dict.fromkeys(("vjepa", "vjepa_data", "jaxtyping", "pydantic"))
import torch
from transformers import AutoModel
frames, actions, expected, folder = torch.load(sys.argv[1])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    print((model.rollout(frames, actions) - expected).abs().max().item(), type(model).__name__)
"""


def test_plain_transformers_rolls_out_without_our_package(folders: dict[str, tuple[Path, Path]], tmp_path: Path):
    native, folder = folders["tokens and states"]
    frames, actions = inputs(CHANNELS + 2)
    expected = vjepa.load(native).rollout(frames, actions)
    torch.save((frames, actions, expected, str(folder)), tmp_path / "case.pt")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "case.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    difference, name = done.stdout.split()
    assert float(difference) <= 1e-5
    assert name == "VJEPAWorldModel"


def test_an_export_with_other_latents_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    source = write_model(tmp_path / "native", **MODELS["latent"])
    monkeypatch.setattr(hf_world_model, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="nothing was written"):
        export(source, tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()


def test_a_probe_is_refused(tmp_path: Path):
    source = write_model(tmp_path / "native", **MODELS["latent"])
    with pytest.raises(BadInput, match="a probe cannot be exported with a world model"):
        export(source, tmp_path / "out", format="hf", probe=tmp_path / "probe")
