"""A trained model outside of training: its tensors, wherever they are stored, and the names they go by elsewhere.

Four layouts are read, and told apart by what is in the folder:

    runs/X                      a run: its newest complete checkpoint
    runs/X/checkpoints/step_*   one checkpoint, of any world size
    a native export             model.json, model.safetensors
    a Hugging Face folder       config.json of model_type vjepa2, model.safetensors

Tensors are named as in V-JEPA 2 with the part in front: `encoder.blocks.0.attn.qkv.weight`,
`predictor.mask_tokens`. They are read one at a time, when asked for.
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

from vjepa import config
from vjepa.model.encoder import Encoder, View, normalise
from vjepa.model.grid import Grid
from vjepa.model.predictor import Predictor
from vjepa.run import checkpoint
from vjepa_data.settings import BadInput

Part = Literal["target", "encoder"]

MASKS: TypeAdapter[tuple[config.Mask, ...]] = TypeAdapter(tuple[config.Mask, ...])


# Ours, and Hugging Face's `VJEPA2Model`. `{i}` is the number of a block; where one of ours becomes three of theirs,
# its rows are cut in thirds. Each row stands for a `weight` and a `bias`, but for the mask tokens.
HF_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("encoder.patch_embed.proj", ("encoder.embeddings.patch_embeddings.proj",)),
    ("encoder.blocks.{i}.norm1", ("encoder.layer.{i}.norm1",)),
    (
        "encoder.blocks.{i}.attn.qkv",
        (
            "encoder.layer.{i}.attention.query",
            "encoder.layer.{i}.attention.key",
            "encoder.layer.{i}.attention.value",
        ),
    ),
    ("encoder.blocks.{i}.attn.proj", ("encoder.layer.{i}.attention.proj",)),
    ("encoder.blocks.{i}.norm2", ("encoder.layer.{i}.norm2",)),
    ("encoder.blocks.{i}.mlp.fc1", ("encoder.layer.{i}.mlp.fc1",)),
    ("encoder.blocks.{i}.mlp.fc2", ("encoder.layer.{i}.mlp.fc2",)),
    ("encoder.norm", ("encoder.layernorm",)),
    ("predictor.predictor_embed", ("predictor.embeddings.predictor_embeddings",)),
    ("predictor.mask_tokens", ("predictor.embeddings.mask_tokens",)),
    ("predictor.predictor_blocks.{i}.norm1", ("predictor.layer.{i}.norm1",)),
    (
        "predictor.predictor_blocks.{i}.attn.qkv",
        (
            "predictor.layer.{i}.attention.query",
            "predictor.layer.{i}.attention.key",
            "predictor.layer.{i}.attention.value",
        ),
    ),
    ("predictor.predictor_blocks.{i}.attn.proj", ("predictor.layer.{i}.attention.proj",)),
    ("predictor.predictor_blocks.{i}.norm2", ("predictor.layer.{i}.norm2",)),
    ("predictor.predictor_blocks.{i}.mlp.fc1", ("predictor.layer.{i}.mlp.fc1",)),
    ("predictor.predictor_blocks.{i}.mlp.fc2", ("predictor.layer.{i}.mlp.fc2",)),
    ("predictor.predictor_norm", ("predictor.layernorm",)),
    ("predictor.predictor_proj", ("predictor.proj",)),
)


class Tensors(Mapping[str, Tensor], ABC):
    """Named tensors that may lie on disk until asked for; their names and shapes cost nothing."""

    names: Collection[str]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class InMemory(Tensors):
    """Tensors that are there already."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.names = tensors.keys()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


class SafeTensors(Tensors):
    """The tensors of a safetensors file, each read when asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise BadInput(f"{path} is missing; the folder is not complete, copy or export it again") from None
        except SafetensorError as error:
            raise BadInput(f"{path}: torn or no safetensors file ({error}); copy or export it again") from None
        self.names = dict.fromkeys(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.get_slice(name).get_shape())


@dataclass(frozen=True)
class Weights:
    """A model's shape, its tensors and where it came from."""

    model: config.Model
    px: int
    """Height and width of the frames it was trained on last."""
    frames: int
    """Frames per clip it was trained on last."""
    fps: float
    """Frames per second of video time."""
    masks: tuple[config.Mask, ...]
    """Kinds of mask, in the order of the predictor's mask tokens; empty if not known."""
    tensors: Tensors
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def mask_tokens(self) -> int:
        """Of the predictor; 0 where there is none, as in what LeVJEPA trained."""
        name = "predictor.mask_tokens"
        return self.tensors.shape(name)[0] if name in self.tensors else 0

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of `encoder` or `predictor`, without the name of the part."""
        return {key.removeprefix(f"{name}."): self.tensors[key] for key in self.tensors if key.startswith(f"{name}.")}


class VideoEncoder(nn.Module):
    """A frozen encoder: clips of uint8 frames in, one feature per token out."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        with torch.device("meta"):
            self.encoder = Encoder(weights.model)
        self.encoder.load_state_dict(weights.part("encoder"), assign=True)
        self.model, self.px, self.frames, self.fps = weights.model, weights.px, weights.frames, weights.fps
        self.provenance = weights.provenance
        self.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        return self.model.encoder.width

    def forward(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w D"]:
        """Encode clips of one shape: RGB, H and W multiples of the patch, T of the tubelet."""
        _, steps, height, width, _ = frames.shape
        grid = Grid.of(steps, height, width, self.model)
        (tokens,) = self.encoder([View(normalise(frames))])
        return tokens.unflatten(1, (grid.t, grid.h, grid.w))


def load_encoder(path: Path | str, part: Part = "target") -> VideoEncoder:
    """Load a frozen encoder from a run, a checkpoint, or an export of any format, onto the CPU in fp32.

    Args:
        path: see the top of this file.
        part: `target`, the moving average whose features V-JEPA 2 evaluates, or `encoder`, the trained weights
            themselves. An export holds the one it was made of.

    Raises:
        BadInput: nothing there, torn, or another kind of model.
    """
    return VideoEncoder(read_weights(Path(path), part))


def random_encoder(like: Weights | VideoEncoder, seed: int) -> VideoEncoder:
    """The same encoder as it was before training, for baselines: initialised from `seed`."""
    tensors = {f"encoder.{name}": tensor for name, tensor in Encoder(like.model, seed=seed).state_dict().items()}
    return VideoEncoder(
        Weights(like.model, like.px, like.frames, like.fps, (), InMemory(tensors), {"part": "random", "seed": seed})
    )


def read_weights(path: Path, part: Part = "target") -> Weights:
    """Open a model in any of the four layouts; tensors are read when asked for.

    Raises:
        BadInput: nothing there, torn, or another kind of model.
    """
    if not path.exists():
        raise BadInput(f"{path}: no such model; give a run, a checkpoint, or a folder made by `vjepa export`")
    if (path / "state.json").is_file() or (path / "checkpoints").is_dir():
        weights = _from_checkpoint(path, part)
    elif (path / "model.json").is_file():
        weights = _from_native(path)
    elif (path / "config.json").is_file():
        weights = _from_hf(path)
    else:
        raise BadInput(
            f"{path}: not a model: no checkpoints/, state.json, model.json or config.json in it; "
            "give a run, a checkpoint, or a folder made by `vjepa export`"
        )
    _check_shapes(path, weights)
    return weights


# ---- checkpoints


def _from_checkpoint(path: Path, part: Part) -> Weights:
    path = checkpoint.resolve(path)
    facts = checkpoint.read_facts(path)
    try:
        run = config.Run.model_validate(facts.settings)
    except ValidationError as error:
        raise BadInput(f"{path}: its settings are not of this version: {error.errors()[0]['msg']}") from None
    provenance = {
        "part": part,
        "run": run.name,
        "step": facts.step,
        "settings": dict(facts.settings),
        "settings_hash": facts.settings_hash,
        "manifests": list(facts.manifests),
        "versions": dict(facts.versions),
    }
    tensors = FromCheckpoint(path, {"encoder": part, "predictor": "predictor"})
    data = run.data
    return Weights(run.model, data.crop.px, data.clip.frames, data.clip.fps, run.masks, tensors, provenance)


class FromCheckpoint(Tensors):
    """Tensors of a sharded checkpoint of any world size, each put together when asked for."""

    def __init__(self, path: Path, parts: Mapping[str, str]) -> None:
        """Args:
        path: a checkpoint.
        parts: which of its models stands for each of our parts.

        Raises:
            BadInput: it is damaged.
        """
        if wrong := checkpoint.damage(path):
            raise BadInput(f"{path} is damaged: {wrong}; choose another checkpoint of the run")
        self.path = path
        entries = FileSystemReader(path).read_metadata().state_dict_metadata
        self.stored = {
            f"{ours}.{name.removeprefix(f'{theirs}.')}": (name, entry)
            for ours, theirs in parts.items()
            for name, entry in entries.items()
            if name.startswith(f"{theirs}.") and isinstance(entry, TensorStorageMetadata)
        }
        if "predictor.mask_tokens" not in self.stored:  # the head of another objective, of no use outside of training
            self.stored = {name: one for name, one in self.stored.items() if not name.startswith("predictor.")}
        self.names = self.stored.keys()

    def __getitem__(self, name: str) -> Tensor:
        stored, entry = self.stored[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as we asked for
            load_dcp({stored: tensor}, checkpoint_id=self.path, no_dist=True)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.stored[name][1].size)


# ---- our own format


def native_json(weights: Weights) -> dict[str, Any]:
    """What `model.json` holds beside the tensors."""
    return {
        "format": 1,
        "model": weights.model.model_dump(mode="json"),
        "px": weights.px,
        "frames": weights.frames,
        "fps": weights.fps,
        "masks": [mask.model_dump(mode="json") for mask in weights.masks],
    }


def _from_native(path: Path) -> Weights:
    content = read_json(path / "model.json")
    try:
        model, masks = config.Model.model_validate(content["model"]), MASKS.validate_python(content["masks"])
        sizes = int(content["px"]), int(content["frames"]), float(content["fps"])
    except (KeyError, TypeError, ValueError):  # pydantic's ValidationError is a ValueError
        raise BadInput(f"{path / 'model.json'}: not written by `vjepa export`; export the model again") from None
    tensors = SafeTensors(path / "model.safetensors")
    return Weights(model, *sizes, masks, tensors, _provenance(path))


# ---- Hugging Face


def hf_names(model: config.Model) -> dict[str, tuple[str, ...]]:
    """Each of our tensors and what it is called in `VJEPA2Model`; three names for rows cut in thirds."""
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in HF_NAMES:
        depth = (model.encoder if ours.startswith("encoder.") else model.predictor).depth
        for block in range(depth) if "{i}" in ours else (0,):
            for suffix in ("",) if ours.endswith("mask_tokens") else (".weight", ".bias"):
                names[ours.format(i=block) + suffix] = tuple(name.format(i=block) + suffix for name in theirs)
    return names


def hf_config(weights: Weights) -> dict[str, Any]:
    """`config.json` for `transformers.VJEPA2Model`."""
    encoder, predictor = weights.model.encoder, weights.model.predictor
    return {
        "architectures": ["VJEPA2Model"],
        "model_type": "vjepa2",
        "dtype": "float32",
        "patch_size": weights.model.patch_px,
        "crop_size": weights.px,
        "frames_per_clip": weights.frames,
        "tubelet_size": weights.model.tubelet_frames,
        "in_chans": 3,
        "hidden_size": encoder.width,
        "num_attention_heads": encoder.heads,
        "num_hidden_layers": encoder.depth,
        "mlp_ratio": encoder.mlp_ratio,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "attention_dropout": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": weights.model.init_std,
        "num_pooler_layers": 3,
        "pred_hidden_size": predictor.width,
        "pred_num_attention_heads": predictor.heads,
        "pred_num_hidden_layers": predictor.depth,
        "pred_mlp_ratio": predictor.mlp_ratio,
        "pred_num_mask_tokens": weights.mask_tokens,
        "pred_zero_init_mask_tokens": True,
    }


def _from_hf(path: Path) -> Weights:
    content = read_json(path / "config.json")
    if content.get("model_type") != "vjepa2":
        raise BadInput(f"{path}: config.json is of model_type {content.get('model_type')!r}; only vjepa2 can be read")
    model = _model_of_hf(path, content)
    provenance = _provenance(path)
    tensors = FromHF(SafeTensors(path / "model.safetensors"), model, provenance.get("mask_token_order"))
    if missing := tensors.missing():
        raise BadInput(f"{path}: model.safetensors lacks {some(missing)}; is it a VJEPA2Model with its predictor?")
    masks = MASKS.validate_python(provenance.get("settings", {}).get("masks", []))
    fps = float(provenance.get("fps", 4.0))  # V-JEPA 2's rate; not a field of config.json
    return Weights(
        model, content.get("crop_size", 256), content.get("frames_per_clip", 64), fps, masks, tensors, provenance
    )


def _model_of_hf(path: Path, content: dict[str, Any]) -> config.Model:
    for key, ours in (("hidden_act", "gelu"), ("qkv_bias", True), ("layer_norm_eps", 1e-6), ("in_chans", 3)):
        if content.get(key, ours) != ours:
            raise BadInput(f"{path}: config.json has {key} {content[key]!r}; our encoder has {ours!r} and no other")
    numbers = (
        content.get("hidden_size", 1024),
        content.get("num_hidden_layers", 24),
        content.get("num_attention_heads", 16),
        content.get("mlp_ratio", 4.0),
    )
    try:
        return config.Model(
            encoder=sized_encoder(*numbers),
            predictor=config.Transformer(
                width=content.get("pred_hidden_size", 384),
                depth=content.get("pred_num_hidden_layers", 12),
                heads=content.get("pred_num_attention_heads", 12),
                mlp_ratio=content.get("pred_mlp_ratio", 4.0),
            ),
            patch_px=content.get("patch_size", 16),
            tubelet_frames=content.get("tubelet_size", 2),
            init_std=content.get("initializer_range", 0.02),
        )
    except ValidationError as error:
        raise BadInput(f"{path}: config.json does not make a model: {error.errors()[0]['msg']}") from None


def sized_encoder(width: int, depth: int, heads: int, mlp_ratio: float) -> config.Encoder:
    """An encoder by its numbers, under its registry name if it has one."""
    for name, numbers in config.ENCODERS.items():
        if numbers[:3] == (width, depth, heads) and int(width * numbers[3]) == int(width * mlp_ratio):
            return config.Encoder.model_validate(name)
    return config.Encoder(name="custom", width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)


def mask_token_order(count: int, kind: int) -> list[int]:
    """Which of our mask tokens stands at each place of an export: `kind` at place 1, the only one that
    `VJEPA2Model` uses (1 modulo their number), the others where they were."""
    order, place = list(range(count)), 1 % count
    order[place], order[kind] = order[kind], order[place]
    return order


class FromHF(Tensors):
    """Our tensors, read from those of a `VJEPA2Model`."""

    def __init__(self, theirs: Tensors, model: config.Model, order: list[int] | None) -> None:
        # A classifier holds the same model under a name of its own.
        prefix = "vjepa2." if any(name.startswith("vjepa2.") for name in theirs) else ""
        self.theirs, self.order = theirs, order
        self.theirs_of = {ours: tuple(prefix + one for one in names) for ours, names in hf_names(model).items()}
        self.names = self.theirs_of.keys()

    def missing(self) -> list[str]:
        return [name for names in self.theirs_of.values() for name in names if name not in self.theirs]

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.cat([self.theirs[one] for one in self.theirs_of[name]])
        if name == "predictor.mask_tokens" and self.order:
            tensor = tensor[torch.tensor(self.order).argsort()]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        parts = [self.theirs.shape(one) for one in self.theirs_of[name]]
        return (sum(part[0] for part in parts), *parts[0][1:])


# ---- files


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file.

    Raises:
        BadInput: missing, or something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; the folder is not complete, copy or make it again") from None
    except ValueError as error:  # also what is not UTF-8
        raise BadInput(f"{path}: not JSON ({error}); the file is damaged, copy or make it again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _provenance(path: Path) -> dict[str, Any]:
    file = path / "provenance.json"
    return read_json(file) if file.is_file() else {}


def expected_shapes(model: config.Model, mask_tokens: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a model, without making it; without a predictor for 0 mask tokens."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"encoder": Encoder(model)}
        if mask_tokens:
            parts["predictor"] = Predictor(model, mask_tokens)
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def _check_shapes(path: Path, weights: Weights) -> None:
    expected = expected_shapes(weights.model, weights.mask_tokens)
    missing, extra = expected.keys() - set(weights.tensors), set(weights.tensors) - expected.keys()
    if missing or extra:
        sides = (("lacks", missing), ("has", extra))
        what = " and ".join(f"{word} {some(sorted(names))}" for word, names in sides if names)
        raise BadInput(f"{path}: not the model that its settings describe: it {what}")
    for name, shape in expected.items():
        if (got := weights.tensors.shape(name)) != shape:
            raise BadInput(f"{path}: {name} has shape {list(got)}, its settings ask for {list(shape)}")


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
