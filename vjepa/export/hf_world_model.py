"""Export a world model for plain transformers: weights, `config.json`, and the code of the networks.

    FOLDER/model.safetensors, model.json           as in a native export, so `vjepa.load(FOLDER)` reads it too
    FOLDER/config.json                             sizes and the statistics of the actions
    FOLDER/modeling_vjepa_world_model.py, ...      loaded with `trust_remote_code=True`

The code is that of `vjepa.nn`, with its imports made relative, so both loaders compute the same.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vjepa.export.verify import fixed_clip, load_with_transformers
from vjepa.export.world_model_programs import dynamics_of, scale_of
from vjepa.weights.weights import Weights
from vjepa.weights.world_model import part_kinds
from vjepa_data.rng import generator

MODELING = "vjepa.export.modeling_vjepa_world_model"
TOLERANCE = 1e-5
STEPS = 3
"""Steps of the rollout that is compared."""

OWN_IMPORT = re.compile(r"^from (vjepa(?:_data)?(?:\.\w+)+) import", flags=re.MULTILINE)

SHAPES = '''"""Types of the network's signatures, as placeholders."""

from typing import Any


class Shape:
    """Accepts any shape: `Shape[Tensor, "B N D"]`."""

    def __class_getitem__(cls, _: object) -> Any:
        return Any


Bool = Float = Int = UInt8 = Shape
Model = Transformer = Any
'''


def write_code(folder: Path) -> None:
    """Write the modelling file and every module of ours that it imports."""
    waiting, done = [MODELING], set()
    while waiting:
        module = waiting.pop()
        if module in done:
            continue
        done.add(module)
        name = module.rpartition(".")[2]
        if name == "shapes":
            text = SHAPES
        else:
            spec = importlib.util.find_spec(module)
            assert spec is not None
            assert spec.origin is not None
            text = Path(spec.origin).read_text()
            waiting += OWN_IMPORT.findall(text)
        text = OWN_IMPORT.sub(lambda found: f"from .{found[1].rpartition('.')[2]} import", text)
        (folder / f"{name}.py").write_text(text)


def world_model_config(weights: Weights) -> dict[str, Any]:
    """Return the contents of `config.json`."""
    name = MODELING.rpartition(".")[2]
    kind = next(kind for kind in part_kinds(weights.tensors.names) if kind.capability == "rollout")
    is_frame = kind.marker == "dynamics.scales.mean"
    scale = "dynamics.scales" if is_frame else "dynamics.actions"
    objective = weights.provenance.get("settings", {}).get("objective", {})
    names = [objective[key] for key in ("action", "state") if objective.get(key)]
    mean = weights.tensors[f"{scale}.mean"].tolist()
    return {
        "model_type": "vjepa_world_model",
        "architectures": ["VJEPAWorldModel"],
        "auto_map": {"AutoConfig": f"{name}.VJEPAWorldModelConfig", "AutoModel": f"{name}.VJEPAWorldModel"},
        "dtype": "float32",
        "model": weights.model.model_dump(mode="json"),
        "dynamics": "frame" if is_frame else "latent",
        "shapes": {name: list(weights.tensors.shape(name)) for name in weights.tensors if name.startswith("dynamics.")},
        "px": weights.px,
        "frames": weights.frames,
        "fps": weights.fps,
        "actions": {
            "signals": names,
            "mean": mean,
            "std": weights.tensors[f"{scale}.std"].tolist(),
            **columns_and_units(weights.provenance.get("signals", {}), names, len(mean)),
        },
    }


def columns_and_units(signals: Mapping[str, Any], names: Sequence[str], channels: int) -> dict[str, list[str]]:
    """Return the name and the unit of each channel; nothing if the checkpoint does not describe its signals.

    Args:
        signals: the descriptions in a checkpoint.
        names: the signals that are concatenated. Only the first, the action, can be stacked rows.
        channels: number of all channels.
    """
    if not names or any(name not in signals for name in names):
        return {}
    action, *state = (signals[name] for name in names)
    rows = (channels - sum(len(one["columns"]) for one in state)) // len(action["columns"])
    return {key: [value for one in [action] * rows + state for value in one[key]] for key in ("columns", "units")}


@torch.no_grad()
def check_world_model(folder: Path, weights: Weights) -> dict[str, Any]:
    """Compare latents and a rollout, as loaded by transformers, with the weights that the export was made of.

    Raises:
        ValueError: they differ by more than 1e-5.
    """
    ours, frames = weights.world_model(), fixed_clip(weights)[:, :2]
    channels = scale_of(dynamics_of(ours)).mean.shape[0]
    drawn = generator(0, "export check of a rollout").normal(size=(1, frames.shape[1] - 1 + STEPS, channels))
    actions = torch.from_numpy(drawn).float()
    expected = ours.latents(frames), ours.rollout(frames, actions)
    theirs, version = load_with_transformers("AutoModel", folder, trust_remote_code=True)
    found = theirs.latents(frames), theirs.rollout(frames, actions)
    latents, rollout = ((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
    if max(latents, rollout) > TOLERANCE:
        raise ValueError(
            f"transformers gives other latents, by {latents}, or rollouts, by {rollout}; nothing was written"
        )
    return {
        "latents_max_abs_difference": latents,
        "rollout_max_abs_difference": rollout,
        "transformers": version,
    }
