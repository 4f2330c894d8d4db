"""A trained model, wherever it lies. Four layouts, told apart by what is in the folder:

runs/X                      a run: its newest complete checkpoint, wherever its settings say that it lies
runs/X/checkpoints/step_*   one checkpoint, of any world size
a native export             model.json, model.safetensors
a Hugging Face folder       config.json of model_type vjepa2, model.safetensors
"""

from pathlib import Path

from pydantic import TypeAdapter

from vjepa import config
from vjepa.weights.huggingface import read_huggingface
from vjepa.weights.native import VideoEncoder, check_there, open_native, read_provenance
from vjepa.weights.sharded import read_checkpoint
from vjepa.weights.weights import Part, Weights, check_shapes
from vjepa_data.settings import BadInput


def load_encoder(path: Path | str, part: Part = "target") -> VideoEncoder:
    """Load a frozen encoder onto the CPU in fp32.

    Args:
        path: a run, a checkpoint, or an export.
        part: of a run or a checkpoint: `target`, the moving average whose features V-JEPA 2 evaluates, or `encoder`,
            the trained weights themselves. An export holds the one it was made of.

    Raises:
        BadInput: nothing there, torn, or another kind of model.
    """
    return read_weights(Path(path), part).encoder()


def read_weights(path: Path, part: Part = "target") -> Weights:
    """Open a model in any of the four layouts; tensors are read when asked for.

    Raises:
        BadInput: nothing there, torn, or another kind of model.
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
            f"{path}: not a model: no checkpoints/, state.json, model.json or config.json in it; "
            "give a run, a checkpoint, or a folder made by `vjepa export`"
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
