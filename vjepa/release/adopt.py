"""A model of others becomes a checkpoint of ours, to evaluate, export, or begin a run from (`start=OUT`).

    vjepa import vitl.pt --out runs/vitl                 V-JEPA 2, as its authors release it
    vjepa import DIR --out runs/vitl                     a Hugging Face folder, or a native export

Tensors are taken over as they are, byte for byte; the optimizer's moments start at zero. Files are read with
`weights_only`, so nothing in them is run. What does not fit our network is refused, with the first names that do not.
"""

import logging
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from vjepa import config
from vjepa.model.predictor import Predictor
from vjepa.output import new_folder
from vjepa.parallel import join
from vjepa.release.read import read_weights
from vjepa.release.tensors import some
from vjepa.release.weights import expected_shapes, sized_encoder
from vjepa.run.checkpoint import Facts, Saver
from vjepa.run.folder import settings_hash, versions
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

# What the parts are called in files of V-JEPA 2 (`latest.pt`, the released ones), the first that is there.
ONLINE, AVERAGE, PREDICTOR = ("encoder",), ("target_encoder", "ema_encoder"), ("predictor",)
WRAPPERS = re.compile(r"^(module\.|backbone\.|_orig_mod\.)+")

# Names that tell which other model it is.
STRANGERS = (
    ("pos_embed", "V-JEPA 1, whose positions are learned or sine-cosine, not rotary"),
    ("patch_embed_img.", "V-JEPA 2.1, whose files are not read yet"),
    ("norms_block.", "V-JEPA 2.1, whose files are not read yet"),
    (".mlp.fc3.", "one with SwiGLU, which our blocks do not have"),
    ("action_encoder.", "the action-conditioned V-JEPA 2-AC"),
)


@dataclass(frozen=True)
class Sizes:
    """What the tensors of a file do not tell."""

    heads: int | None = None
    """Attention heads of the encoder; by default those of the registry's model of this width and depth."""
    predictor_heads: int = 12
    px: int = 256
    frames: int = 16
    fps: float = 4.0
    mask_tokens: tuple[int, ...] | None = None
    """Which mask token of the file each of our kinds of mask gets; by default all, as they are. Of files with one
    clip length V-JEPA 2 trained the first alone, so (0, 0) is the start for two kinds of mask."""


def adopt(source: Path, out: Path, sizes: Sizes = Sizes(), *, overwrite: bool = False) -> Path:
    """Write a checkpoint from a model of others.

    Args:
        source: a `.pt` file of V-JEPA 2, or a folder that `vjepa.release.read.read_weights` reads.
        out: folder for the checkpoint, laid out as a run's.
        sizes: what cannot be told from a `.pt` file.
        overwrite: replace what an earlier import wrote there.

    Returns:
        The checkpoint.

    Raises:
        BadInput: no such file, one that holds more than tensors, another kind of model, or a place that is taken.
    """
    if source.is_file():
        model, parts = _from_file(source, sizes)
        px, frames, fps = sizes.px, sizes.frames, sizes.fps
    else:
        weights = read_weights(source)
        model, px, frames, fps = weights.model, weights.px, weights.frames, weights.fps
        parts = {part: weights.tensors.part(name) for part, name in _PARTS.items()}
        if not parts["predictor"]:
            parts["predictor"] = _new_predictor(source, model)
    tokens = parts["predictor"]["mask_tokens"]
    if sizes.mask_tokens is not None:
        if strange := [one for one in sizes.mask_tokens if not 0 <= one < len(tokens)]:
            raise BadInput(f"mask_tokens has {strange[0]}, and the file has tokens 0 to {len(tokens) - 1}")
        parts["predictor"]["mask_tokens"] = tokens[list(sizes.mask_tokens)]
    run = _settings(model, px=px, frames=frames, fps=fps, kinds=len(parts["predictor"]["mask_tokens"]))
    _check(source, model, parts)
    with new_folder(out, overwrite=overwrite, ours="imported") as folder:
        (folder / "imported").write_text(f"{source}\n")
        _save(run, parts, folder, source)
    path = out / "checkpoints" / "step_00000000"
    log.info("%s: %s from %s", path, model.encoder.name, source)
    return path


_PARTS = {"encoder": "encoder", "target": "encoder", "predictor": "predictor"}
Parts = dict[str, dict[str, Tensor]]


def _settings(model: config.Model, *, px: int, frames: int, fps: float, kinds: int) -> config.Run:
    """A run that never was: only its model and the form of its clips mean something."""
    data: dict[str, Any] = {
        "sources": [{"shards": "unknown"}],
        "clip": {"frames": frames, "fps": fps},
        "crop": {"px": px},
    }
    masks = tuple(config.BLOCKS[kind % len(config.BLOCKS)] for kind in range(kinds))
    return config.Run.model_validate(
        {
            "name": "imported",
            "steps": 1,
            "batch_size": 1,
            "data": data,
            "model": model,
            "masks": masks,
            "optim": {"lr": 1e-4},
        }
    )


def _save(run: config.Run, parts: Parts, folder: Path, source: Path) -> None:
    tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    for part in ("encoder", "predictor"):
        for name, tensor in parts[part].items():
            tensors[f"optimizer.step.{part}.{name}"] = torch.zeros(())
            tensors[f"optimizer.exp_avg.{part}.{name}"] = torch.zeros_like(tensor)
            tensors[f"optimizer.exp_avg_sq.{part}.{name}"] = torch.zeros_like(tensor)
    facts = Facts(
        step=0,
        world=1,
        settings=run.model_dump(mode="json"),
        settings_hash=settings_hash(run),
        manifests=[],
        wandb_id=None,
        versions={**versions(), "imported_from": source.name},
    )
    with join(run.parallel) as world:
        Saver(folder, config.Checkpoint(), world).save(tensors, facts)


# ---- files of V-JEPA 2


def _from_file(path: Path, sizes: Sizes) -> tuple[config.Model, Parts]:
    content = _read_file(path)
    online, average, predictor = (_part(content, names) for names in (ONLINE, AVERAGE, PREDICTOR))
    if online is None and average is None:
        raise BadInput(f"{path} holds {some(list(content))}; expected the parts encoder, target_encoder, predictor")
    encoder = online or average or {}
    every = {**encoder, **(predictor or {})}
    for mark, what in STRANGERS:
        if found := [name for name in every if mark in f".{name}" or name.startswith(mark)]:
            raise BadInput(f"{path} is {what} ({some(found)}); our network cannot be it")
    model = _infer(path, encoder, predictor, sizes)
    if predictor is None:
        predictor = _new_predictor(path, model)
    return model, {"encoder": online or encoder, "target": average or encoder, "predictor": predictor}


def _new_predictor(path: Path, model: config.Model) -> dict[str, Tensor]:
    log.warning("%s has no predictor: a new one is made, good for features but not for predictions", path)
    return dict(Predictor(model, len(config.BLOCKS)).state_dict())


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise BadInput(
            f"{path} holds more than tensors and numbers, and is not read: that would run its code"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({str(error).splitlines()[0]}); is it a whole torch file?") from None
    if not isinstance(content, Mapping):
        raise BadInput(
            f"{path} holds a {type(content).__name__}; expected the parts encoder, target_encoder, predictor"
        )
    return content


def _part(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor] | None:
    """Tensors of one part under our names: wrappers cut off, the mask tokens as one tensor."""
    found = next((content[name] for name in names if isinstance(content.get(name), Mapping)), None)
    if found is None:
        return None
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in found.items()}
    tokens = sorted((name for name in tensors if name.startswith("mask_tokens.")), key=lambda name: int(name[12:]))
    if tokens:
        tensors["mask_tokens"] = torch.stack([tensors.pop(name) for name in tokens])  # [n 1 1 P]
    return tensors


def _infer(
    path: Path, encoder: Mapping[str, Tensor], predictor: Mapping[str, Tensor] | None, sizes: Sizes
) -> config.Model:
    """The sizes of a network from the shapes of its tensors."""
    try:
        width, _, tubelet, patch, _ = encoder["patch_embed.proj.weight"].shape
        depth = _depth(encoder, "blocks")
        ratio = _ratio(encoder["blocks.0.mlp.fc1.weight"].shape[0], width)
    except (KeyError, ValueError):
        raise BadInput(
            f"{path}: its encoder has {some(sorted(encoder))}; expected patch_embed.proj.weight and blocks.0.*"
        ) from None
    heads = sizes.heads
    if heads is None:
        known = [one[2] for one in config.ENCODERS.values() if one[:2] == (width, depth)]
        if not known:
            raise BadInput(f"{path}: an encoder of width {width} and depth {depth} is in no table; give its --heads")
        heads = known[0]
    settings: dict[str, Any] = {"encoder": sized_encoder(width, depth, heads, ratio)}
    if predictor is not None and "predictor_embed.weight" in predictor:
        narrow = predictor["predictor_embed.weight"].shape[0]
        fc1 = predictor.get("predictor_blocks.0.mlp.fc1.weight")
        settings["predictor"] = {
            "width": narrow,
            "depth": max(1, _depth(predictor, "predictor_blocks")),
            "heads": sizes.predictor_heads,
            "mlp_ratio": _ratio(fc1.shape[0], narrow) if fc1 is not None else 4.0,
        }
    try:
        return config.Model.model_validate({**settings, "patch_px": patch, "tubelet_frames": tubelet})
    except ValidationError as error:
        raise BadInput(f"{path}: its sizes make no model: {error.errors()[0]['msg']}") from None


def _ratio(hidden: int, width: int) -> float:
    """The ratio that gives back the hidden channels when they are computed as the network does."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _depth(tensors: Iterable[str], stack: str) -> int:
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf"{stack}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _check(source: Path, model: config.Model, parts: Parts) -> None:
    """Name the first tensors that are missing, too many, of another shape or another type."""
    if "mask_tokens" not in parts["predictor"]:
        raise BadInput(f"{source}: its predictor has no mask_tokens; our network cannot be it")
    shapes = expected_shapes(model, len(parts["predictor"]["mask_tokens"]))
    for part, named in parts.items():
        name = _PARTS[part]
        expected = {one.removeprefix(f"{name}."): shape for one, shape in shapes.items() if one.startswith(f"{name}.")}
        complaints: Sequence[tuple[str, list[str]]] = (
            ("lacks", sorted(expected.keys() - named.keys())),
            ("has", sorted(named.keys() - expected.keys())),
        )
        for word, names in complaints:
            if names:
                raise BadInput(f"{source}: its {part} {word} {some(names)}; it is not a model of this kind")
        for one, shape in expected.items():
            if tuple(named[one].shape) != shape:
                raise BadInput(f"{source}: {part} {one} is {list(named[one].shape)}, expected {list(shape)}")
            named[one] = named[one].float().contiguous()
