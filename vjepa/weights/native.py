"""The native format: `model.safetensors`, and `model.json` for the settings that tensors do not tell.

It holds any model that we train and loads with torch and safetensors alone: this module and the network import no other
package. Where pydantic is installed, the settings are validated like all settings.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from vjepa.nn.shapes import Model
from vjepa.weights.tensors import SafeTensors, read_json
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import BadInput

FORMAT = 1

Loaded = TypeVar("Loaded", VideoEncoder, WorldModel)


def load(folder: Path | str, part: str = "target") -> WorldModel:
    """Load a native export onto the CPU in fp32. It holds a single encoder, so `part` has no effect.

    Raises:
        BadInput: the folder is incomplete or damaged, or of another version.
    """
    return _build(WorldModel, Path(folder))


def load_encoder(folder: Path | str, part: str = "target") -> VideoEncoder:
    """Load the encoder of a native export, otherwise like `load`."""
    return _build(VideoEncoder, Path(folder))


def _build(kind: type[Loaded], folder: Path) -> Loaded:
    content, tensors = open_native(folder)
    try:
        clip = {"px": int(content["px"]), "frames": int(content["frames"]), "fps": float(content["fps"])}
        return kind(_settings(content["model"]), tensors, **clip, provenance=read_provenance(folder))
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"{folder}: model.json and model.safetensors do not fit each other ({reason}); copy or export it again"
        ) from None


def check_there(path: Path) -> None:
    """Check that a model's path exists.

    Raises:
        BadInput: it does not.
    """
    if path.is_file():
        raise BadInput(
            f"{path}: a model is a folder; give {path.parent}, or make a checkpoint of a released file: vjepa import"
        )
    if not path.exists():
        raise BadInput(
            f"{path}: no such model. Give a run, a checkpoint, or a folder made by `vjepa export` (download a model of "
            "the Hugging Face hub first: `hf download NAME --local-dir DIR`)."
        )


def open_native(folder: Path) -> tuple[dict[str, Any], SafeTensors]:
    """Return the settings and the tensors of a native export.

    Raises:
        BadInput: the folder is incomplete or damaged, or of another version.
    """
    content = read_json(folder / "model.json")
    if content.get("format") != FORMAT:
        raise BadInput(
            f"{folder / 'model.json'}: format {content.get('format')!r}, this version reads {FORMAT}. "
            "Export the model again."
        )
    return content, SafeTensors(folder / "model.safetensors")


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the origin of a model as `vjepa export` recorded it. Empty for models of other projects."""
    file = folder / "provenance.json"
    return read_json(file) if file.is_file() else {}


def _settings(content: dict[str, Any]) -> Model:
    try:
        from vjepa.config import Model
    except ModuleNotFoundError:  # no pydantic: the numbers as they are
        return json.loads(json.dumps(content), object_hook=lambda group: SimpleNamespace(**group))
    return Model.model_validate(content)
