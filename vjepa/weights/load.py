"""Load a trained model from any of four layouts, which are told apart by the files in the folder.

runs/X                      a run: its newest complete checkpoint, in the place that its settings name
runs/X/checkpoints/step_*   a checkpoint, written at any world size
a native export             model.json, model.safetensors
a Hugging Face folder       config.json of model_type vjepa2, model.safetensors
"""

from pathlib import Path

from pydantic import TypeAdapter

from vjepa import config
from vjepa.weights.huggingface import read_huggingface
from vjepa.weights.native import check_there, open_native, read_provenance
from vjepa.weights.sharded import read_checkpoint
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.weights import Part, Weights, check_shapes
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import BadInput


def load(path: Path | str, part: Part = "target") -> WorldModel:
    """Load a trained model onto the CPU in fp32 (see `vjepa.load`).

    Raises:
        BadInput: there is no model at the path, it is damaged, or it is of another kind.
    """
    return read_weights(Path(path), part).world_model()


def load_encoder(path: Path | str, part: Part = "target") -> VideoEncoder:
    """Load only the encoder of a trained model (see `vjepa.load_encoder`).

    Raises:
        BadInput: as for `load`.
    """
    return read_weights(Path(path), part).encoder()


def read_weights(path: Path, part: Part = "target") -> Weights:
    """Open a model in any of the four layouts. Tensors are read when they are used.

    Args:
        path: a run, a checkpoint, or an export.
        part: which encoder of a run or a checkpoint, see `vjepa.load`.

    Raises:
        BadInput: there is no model at the path, it is damaged, or it is of another kind.
    """
    check_there(path)
    if any((path / name).exists() for name in ("state.json", "checkpoints", "config.yaml")):
        weights = read_checkpoint(path, part)
    elif (path / "model.json").is_file():
        weights = _read_native(path)
    elif (path / "config.json").is_file():
        weights = read_huggingface(path)
    else:
        raise BadInput(
            f"{path}: not a model: it has no checkpoints/, state.json, model.json or config.json. "
            "Give a run, a checkpoint, or a folder made by `vjepa export`."
        )
    check_shapes(path, weights)
    return weights


def _read_native(path: Path) -> Weights:
    content, tensors = open_native(path)
    try:
        model = config.Model.model_validate(content["model"])
        masks = TypeAdapter(tuple[config.Mask, ...]).validate_python(content["masks"])
        sizes = int(content["px"]), int(content["frames"]), float(content["fps"])
    except (KeyError, TypeError, ValueError):  # pydantic's ValidationError is a ValueError
        raise BadInput(f"{path / 'model.json'}: not written by `vjepa export`; export the model again") from None
    return Weights(model, *sizes, masks, tensors, read_provenance(path))
