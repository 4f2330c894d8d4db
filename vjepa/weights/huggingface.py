"""Conversion to and from Hugging Face's `VJEPA2Model`: parameter names, config.json, video processor.

`VJEPA2Model` uses a single mask token, at index 1 modulo their number.
"""

import re
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from vjepa import config
from vjepa.nn.encoder import MEAN, STD
from vjepa.weights.native import read_provenance
from vjepa.weights.tensors import InFiles, SafeTensors, Tensors, read_json, some
from vjepa.weights.weights import Weights, sized_encoder
from vjepa_data.errors import BadInput

# Our names and the names of `VJEPA2Model`. `{i}` is the number of a block. Where one of our tensors is three tensors
# there, its rows are split in thirds. Each entry stands for a `weight` and a `bias`, except for the mask tokens.
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


# Fields of `config.json` that tell V-JEPA 2.1 from V-JEPA 2 under the same model_type, by any of the names that they
# have had (huggingface/transformers#45497), and values that mean V-JEPA 2.
VJEPA21 = re.compile(r"rope|modality|distill|hierarchical|interpolate|img_temporal|teacher_embed|register")
UNSET = ("None", "False", "0", "1", "[]")


def hf_names(model: config.Model) -> dict[str, tuple[str, ...]]:
    """Return the names in `VJEPA2Model` of each of our tensors, three names where rows are split in thirds."""
    names: dict[str, tuple[str, ...]] = {}
    for ours, theirs in HF_NAMES:
        depth = (model.encoder if ours.startswith("encoder.") else model.predictor).depth
        for block in range(depth) if "{i}" in ours else (0,):
            for suffix in ("",) if ours.endswith("mask_tokens") else (".weight", ".bias"):
                names[ours.format(i=block) + suffix] = tuple(name.format(i=block) + suffix for name in theirs)
    return names


def hf_config(weights: Weights) -> dict[str, Any]:
    """Return `config.json` for `transformers.VJEPA2Model`."""
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
        "initializer_range": 0.02 if weights.model.init_std == "fan_in" else weights.model.init_std,
        "num_pooler_layers": 3,
        "pred_hidden_size": predictor.width,
        "pred_num_attention_heads": predictor.heads,
        "pred_num_hidden_layers": predictor.depth,
        "pred_mlp_ratio": predictor.mlp_ratio,
        "pred_num_mask_tokens": weights.mask_tokens,
        "pred_zero_init_mask_tokens": True,
    }


def read_huggingface(path: Path) -> Weights:
    """Open a folder of `VJEPA2Model` or of its classifier, exported by us or published elsewhere.

    Raises:
        BadInput: the folder holds another kind of model, or an unsupported variant.
    """
    content = read_json(path / "config.json")
    if content.get("model_type") != "vjepa2":
        raise BadInput(f"{path}: config.json has model_type {content.get('model_type')!r}; only vjepa2 can be read")
    if of_21 := sorted(key for key in content if VJEPA21.search(key) and repr(content[key]) not in UNSET):
        raise BadInput(
            f"{path}: config.json has {some(of_21)}, as folders of V-JEPA 2.1 have, which are not supported; import "
            "the file that its authors released: vjepa import FILE.pt"
        )
    model = _model_of_hf(path, content)
    provenance = read_provenance(path)
    index = path / "model.safetensors.index.json"
    if not index.is_file() and not (path / "model.safetensors").is_file() and list(path.glob("pytorch_model*.bin")):
        raise BadInput(
            f"{path}: its tensors are in pytorch_model.bin, which could run code. Load it with transformers where you "
            "trust it, and save_pretrained to another folder."
        )
    theirs = InFiles(index) if index.is_file() else SafeTensors(path / "model.safetensors")
    tensors = FromHF(theirs, model, provenance.get("mask_token_order"))
    if missing := tensors.missing():
        raise BadInput(f"{path}: model.safetensors lacks {some(missing)}; is it a VJEPA2Model with its predictor?")
    if extra := tensors.extra():
        raise BadInput(f"{path}: model.safetensors has {some(extra)}, which VJEPA2Model does not have; not supported")
    masks = TypeAdapter(tuple[config.Mask, ...]).validate_python(provenance.get("masks", []))
    fps = float(provenance.get("fps", 4.0))  # by default V-JEPA 2's; config.json has no such field
    return Weights(
        model, content.get("crop_size", 256), content.get("frames_per_clip", 64), fps, masks, tensors, provenance
    )


def _model_of_hf(path: Path, content: dict[str, Any]) -> config.Model:
    for key, ours in (("hidden_act", "gelu"), ("qkv_bias", True), ("layer_norm_eps", 1e-6), ("in_chans", 3)):
        if content.get(key, ours) != ours:
            raise BadInput(f"{path}: config.json has {key} {content[key]!r}; only {ours!r} is supported")
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
        raise BadInput(f"{path}: config.json is not a valid model: {error.errors()[0]['msg']}") from None


def mask_token_order(count: int, kind: int) -> list[int]:
    """Return which of our mask tokens goes to each index of an export.

    The token of `kind` goes to index 1 (modulo their number), the only index that `VJEPA2Model` uses. The token that
    was there takes its place.
    """
    order, used = list(range(count)), 1 % count
    order[used], order[kind] = order[kind], order[used]
    return order


class FromHF(Tensors):
    """Tensors of a `VJEPA2Model` under our names."""

    def __init__(self, theirs: Tensors, model: config.Model, order: list[int] | None) -> None:
        # A classifier holds the same model behind a prefix.
        prefix = "vjepa2." if any(name.startswith("vjepa2.") for name in theirs) else ""
        self.theirs, self.order = theirs, order
        self.theirs_of = {ours: tuple(prefix + name for name in names) for ours, names in hf_names(model).items()}
        self.names = self.theirs_of.keys()

    def missing(self) -> list[str]:
        """Return names of `VJEPA2Model` that the file lacks."""
        return [name for names in self.theirs_of.values() for name in names if name not in self.theirs]

    def extra(self) -> list[str]:
        """Return names of the file that neither `VJEPA2Model` nor its classifier has."""
        known = {name for names in self.theirs_of.values() for name in names}
        return [name for name in self.theirs if name not in known and not name.startswith(("pooler.", "classifier."))]

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.cat([self.theirs[part] for part in self.theirs_of[name]])
        if name == "predictor.mask_tokens" and self.order:
            tensor = tensor[torch.tensor(self.order).argsort()]
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        parts = [self.theirs.shape(part) for part in self.theirs_of[name]]
        return (sum(part[0] for part in parts), *parts[0][1:])


def hf_processor(px: int) -> dict[str, Any]:
    """Return `video_preprocessor_config.json`: short side to px * 256 / 224, centre crop, ImageNet's statistics."""
    return {
        "video_processor_type": "VJEPA2VideoProcessor",
        "size": {"shortest_edge": int(px * 256 / 224)},
        "crop_size": {"height": px, "width": px},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 2,
        "return_metadata": False,
    }
