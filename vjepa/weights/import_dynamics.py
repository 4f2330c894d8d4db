"""Import V-JEPA 2-AC: its encoder as a native export, and its predictor as a checkpoint of `dynamics` on that encoder.

    vjepa import vjepa2-ac-vitg.pt --out runs/vjepa2_ac
    runs/vjepa2_ac/encoder/        model.json and model.safetensors of the frozen encoder
    runs/vjepa2_ac/checkpoints/    the predictor, and the sha256 of the encoder's file

Its parameters have our names. The embedding of the camera's pose (`extrinsics_encoder`) is left out: the published
class always has it, and its configuration does not use it. Actions and states are not scaled, as there.

Source of the layout: `src/models/ac_predictor.py` and `src/hub/backbones.py` of facebookresearch/vjepa2.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from vjepa import config
from vjepa.atomic import new_folder
from vjepa.methods.frozen_encoder import EncoderFile
from vjepa.nn.frame_dynamics import FrameDynamics
from vjepa.weights.fair_checkpoints import FairCheckpoint, Sizes
from vjepa.weights.native import FORMAT
from vjepa.weights.save_imported import save_imported
from vjepa.weights.tensors import some, write_safetensors
from vjepa.weights.weights import expected_shapes
from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)

FRAMES = 8
"""Frames of a clip, from configs/train/vitg16/droid-256px-8f.yaml of V-JEPA 2."""

UNUSED = "extrinsics_encoder."


def import_dynamics(source: Path, out: Path, found: FairCheckpoint, sizes: Sizes, *, overwrite: bool) -> Path:
    """Write the encoder and the checkpoint.

    Args:
        source: the file.
        out: folder for both, laid out like a run.
        found: contents of the file.
        sizes: settings that cannot be inferred from the file.
        overwrite: replace the result of an earlier import.

    Returns:
        Folder of the checkpoint.

    Raises:
        BadInput: tensors are missing, unknown or of another shape, or an option does not fit, or `out` exists.
    """
    if sizes.objective is not None or sizes.mask_tokens is not None:
        raise BadInput(f"{source} is of V-JEPA 2-AC, which has no masks; leave out --objective and --mask-tokens")
    dynamics = {name: tensor for name, tensor in (found.predictor or {}).items() if not name.startswith(UNUSED)}
    actions, states = (_channels(source, dynamics, name) for name in ("action_encoder", "state_encoder"))
    encoder = found.online or found.average or {}
    _check(source, "encoder", encoder, expected_shapes(found.model, 0), prefix="encoder.")
    with torch.device("meta"):
        network = FrameDynamics(found.model, actions=actions, states=states)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    _check(source, "predictor", dynamics, shapes)
    run = _run(found, out.absolute() / "encoder", sizes, actions=actions, states=states)
    with new_folder(out, overwrite=overwrite, ours="imported") as folder:
        (folder / "imported").write_text(f"{source}\n")
        _write_encoder(folder / "encoder", found.model, encoder, run.data)
        tensors = {f"dynamics.{name}": tensor.float().contiguous() for name, tensor in dynamics.items()}
        tensors["dynamics.scales.mean"] = torch.zeros(actions + states)
        tensors["dynamics.scales.std"] = torch.ones(actions + states)
        tensors["encoder_file.sha256"] = EncoderFile(folder / "encoder").sha256.detach()
        save_imported(run, tensors, folder, source, trained=("dynamics",))
    path = out / "checkpoints" / "step_00000000"
    log.info("%s: V-JEPA 2-AC from %s, to be trained further by dynamics on %s", path, source, out / "encoder")
    return path


def _channels(source: Path, dynamics: Mapping[str, Tensor], name: str) -> int:
    """Return the columns of an action or a state."""
    weight = dynamics.get(f"{name}.weight")
    if weight is None or weight.dim() != 2:
        shape = "missing" if weight is None else f"of shape {list(weight.shape)}"
        raise BadInput(f"{source}: {name}.weight of its predictor is {shape}; expected [width, columns]")
    return weight.shape[1]


def _check(
    source: Path, part: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, prefix: str = ""
) -> None:
    """Raise for the first tensors that are missing, unknown, or of another shape."""
    expected = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    for word, names in (("lacks", expected.keys() - tensors.keys()), ("has", tensors.keys() - expected.keys())):
        if names:
            raise BadInput(f"{source}: its {part} {word} {some(sorted(names))}; this architecture is not supported")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise BadInput(f"{source}: {part} {name} is {list(tensors[name].shape)}, expected {list(shape)}")


def _run(found: FairCheckpoint, encoder: Path, sizes: Sizes, *, actions: int, states: int) -> config.Run:
    """Return the settings of a run that trains the predictor further. Sources and rates are placeholders."""
    values = {
        "name": "imported",
        "steps": 1,
        "batch_size": 1,
        "optim": {"lr": 1e-4},
        "data": {
            "sources": [{"shards": "unknown"}],
            "clip": {"frames": sizes.frames or FRAMES, "fps": sizes.fps},
            "crop": {"px": found.px, "scale": (1, 1), "aspect": (1, 1), "flip": 0},
            "signals": ("action", "state"),
        },
        "model": found.model,
        "objective": {
            "name": "dynamics",
            "encoder": str(encoder),
            "action_channels": actions,
            "state": "state",
            "state_channels": states,
            "normalise": "none",
            "exponent": 1,
        },
    }
    try:
        return config.Run.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"this V-JEPA 2-AC file cannot be imported: {error.errors()[0]['msg']}") from None


def _write_encoder(folder: Path, model: config.Model, tensors: Mapping[str, Tensor], data: config.Data) -> None:
    """Write the encoder as a native export."""
    folder.mkdir()
    named = ((f"encoder.{name}", tensor.float().contiguous()) for name, tensor in tensors.items())
    write_safetensors(folder / "model.safetensors", named)
    clip = {"px": data.crop.px, "frames": data.clip.frames, "fps": data.clip.fps}
    content = {"format": FORMAT, "model": model.model_dump(mode="json"), **clip, "masks": []}
    (folder / "model.json").write_text(json.dumps(content, indent=2) + "\n")
