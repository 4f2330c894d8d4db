"""A native export loads and runs where nothing but torch and safetensors is installed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import vjepa
from vjepa.export.export import export
from vjepa.weights.load import load_encoder

# Frames as other libraries return them: channels first, floats, one clip without a batch.
OTHER_FORMS = """
import sys, torch, vjepa
encoder = vjepa.load_encoder(sys.argv[1])
clip = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
others = (clip.movedim(-1, 2), clip.movedim(-1, 1), clip.float(), clip[0], clip[0].movedim(-1, 0), clip[0, 0])
for frames in (*others, clip.numpy(), clip.float().numpy(), clip[..., :1], list(clip)):
    try:
        encoder(frames)
    except ValueError as error:
        print(error)
"""

# Hides every package except ours, safetensors, torch and the dependencies of torch.
ALONE = """
import importlib.metadata, re, sys
from importlib.machinery import PathFinder

def needs(name, found):
    found.add(name)
    for line in importlib.metadata.requires(name) or ():
        other = plain(re.match(r"[\\w.-]+", line)[0])
        if "extra ==" not in line and other not in found and installed(other):
            needs(other, found)
    return found

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

wanted = needs("torch", set())
packages = importlib.metadata.packages_distributions()
allowed = {top for top, owners in packages.items() if wanted & {plain(owner) for owner in owners}}
allowed |= {"vjepa", "vjepa_data", "safetensors", *sys.stdlib_module_names}

class Alone(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top not in packages:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Alone
for name in ("numpy", "pydantic", "jaxtyping", "yaml"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is not hidden")

import vjepa
assert "torch" not in sys.modules
import torch
frames = torch.arange(2 * 4 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(2, 4, 32, 32, 3)
models = [vjepa.load(folder) for folder in sys.argv[2:]]
features = [vjepa.load_encoder(folder)(frames) for folder in sys.argv[2:]]
tokens = torch.arange(32).expand(2, -1)
predictions = [model.predict(frames, tokens[:, :20], tokens[:, 20:]) for model in models]
torch.save((features, predictions), sys.argv[1])
try:
    vjepa.load_encoder("nowhere")
except ValueError as error:
    assert str(error).startswith("nowhere: no such model"), error
    assert "hf download" in str(error)
others = {name.partition(".")[0] for name in sys.modules} - allowed
print(sorted(name for name in others if name in packages))
"""


def test_a_native_export_needs_no_other_package(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    runs = [
        make_trained(tmp_path / "plain"),
        make_trained(tmp_path / "other", levels=(0, 1), still_tokens=True, rope="interleaved", rope_cells=4),
    ]
    exports = [run.with_suffix(".native") for run in runs]
    for run, out in zip(runs, exports, strict=True):
        export(run, out, format="native")
    words = [sys.executable, "-W", "ignore", "-c", ALONE, tmp_path / "features.pt", *exports]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    frames = torch.arange(2 * 4 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(2, 4, 32, 32, 3)
    tokens = torch.arange(32).expand(2, -1)
    for features, predictions, run in zip(*torch.load(tmp_path / "features.pt"), runs, strict=True):
        model = vjepa.load(run)
        assert torch.equal(features, model.encode(frames))
        assert torch.equal(predictions, model.predict(frames, tokens[:, :20], tokens[:, 20:]))


def test_the_package_loads_the_encoder_of_a_run(trained: Path) -> None:
    frames = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
    for part in ("target", "encoder"):
        assert torch.equal(vjepa.load_encoder(trained, part)(frames), load_encoder(trained, part)(frames))


def test_frames_of_another_form_are_rejected(trained: Path) -> None:
    done = subprocess.run([sys.executable, "-c", OTHER_FORMS, str(trained)], check=True, capture_output=True, text=True)
    lines = [line.removeprefix("frames are a uint8 tensor [B T H W 3], got ") for line in done.stdout.splitlines()]
    zero_to_one = "(frames * 255).round().to(torch.uint8) for values from 0 to 1"
    for line, (got, advice) in zip(lines, [
        ("a uint8 tensor [1, 4, 3, 32, 32]", "frames.movedim(2, -1)"),
        ("a uint8 tensor [1, 3, 4, 32, 32]", "frames.movedim(1, -1)"),
        ("a float32 tensor [1, 4, 32, 32, 3]", zero_to_one),
        ("a uint8 tensor [4, 32, 32, 3]", "frames[None] (one clip)"),
        ("a uint8 tensor [3, 4, 32, 32]", "frames.movedim(0, -1)[None] (one clip)"),
        ("a uint8 tensor [32, 32, 3]", "frames[None, None] (one picture)"),
        ("a uint8 numpy array [1, 4, 32, 32, 3]", "torch.from_numpy(frames)"),
        ("a float32 numpy array [1, 4, 32, 32, 3]", f"torch.from_numpy(frames), then {zero_to_one}"),
        ("a uint8 tensor [1, 4, 32, 32, 1]", "frames.expand(-1, -1, -1, -1, 3) (grey)"),
        ("a list", "Convert a list of clips with torch.stack"),
    ], strict=True):  # fmt: skip
        assert line.startswith((f"{got}; use {advice}", f"{got}. {advice}")), line
