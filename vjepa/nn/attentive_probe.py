"""The network of V-JEPA 2's attentive probe: self-attention blocks, a query that attends to all tokens, a linear layer.

Letters: B clips, N tokens of a clip, D width, H heads.

Source: V-JEPA 2 (arXiv:2506.09985), attentive probe. Parameter names follow the released classifiers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vjepa_data.settings import BadInput

NORM_EPS = 1e-6  # Hugging Face's; V-JEPA 2 trained its probes with 1e-5


class SelfAttention(nn.Module):
    """Apply multi-head attention among the tokens of a clip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B H N d] each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attend from a single query to all tokens, without a projection after it, as in V-JEPA 2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)

    def forward(self, query: Float[Tensor, "B 1 D"], x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 1 D"]:
        q = self.q(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ProbeMLP(nn.Module):
    """Apply two linear maps with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class ProbeBlock(nn.Module):
    """A self-attention block over the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = ProbeMLP(width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class QueryBlock(nn.Module):
    """A cross-attention block from a query to the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.xattn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = ProbeMLP(width)

    def forward(self, query: Float[Tensor, "B 1 D"], x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 1 D"]:
        query = query + self.xattn(query, self.norm1(x))
        return query + self.mlp(self.norm2(query))


class Pooler(nn.Module):
    """Pool the tokens of a clip to a feature."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(ProbeBlock(width, heads) for _ in range(blocks))
        self.cross_attention_block = QueryBlock(width, heads)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        for block in self.blocks:
            tokens = block(tokens)
        return self.cross_attention_block(self.query_tokens.expand(len(tokens), -1, -1), tokens)[:, 0]


class AttentiveProbe(nn.Module):
    """Map the tokens of a frozen encoder to logits of classes. Parameter names are V-JEPA 2's."""

    def __init__(self, width: int, heads: int, classes: int, *, blocks: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.pooler = Pooler(width, heads, blocks)
        self.linear = nn.Linear(width, classes)
        self._init(seed)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B classes"]:
        return self.linear(self.pooler(tokens))

    @torch.no_grad()
    def _init(self, seed: int) -> None:
        """Draw weights from a truncated normal of 0.02. The output layers of block i are divided by the root of 2 i."""
        draw = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=draw)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pooler.query_tokens, std=0.02, generator=draw)
        outputs = [(block.attn.proj, block.mlp.fc2) for block in self.pooler.blocks if isinstance(block, ProbeBlock)]
        for number, layers in enumerate([*outputs, (self.pooler.cross_attention_block.mlp.fc2,)], 1):
            for layer in layers:
                layer.weight.div_(math.sqrt(2 * number))


# Our parameter names (V-JEPA 2's) and the names of Hugging Face's `VJEPA2ForVideoClassification`, where a fused tensor
# is split in two or three. Each row stands for a `weight` and a `bias`, except that of the query.
HF_PROBE_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pooler.query_tokens", ("pooler.query_tokens",)),
    ("pooler.blocks.{i}.norm1", ("pooler.self_attention_layers.{i}.layer_norm1",)),
    (
        "pooler.blocks.{i}.attn.qkv",
        (
            "pooler.self_attention_layers.{i}.self_attn.q_proj",
            "pooler.self_attention_layers.{i}.self_attn.k_proj",
            "pooler.self_attention_layers.{i}.self_attn.v_proj",
        ),
    ),
    ("pooler.blocks.{i}.attn.proj", ("pooler.self_attention_layers.{i}.self_attn.out_proj",)),
    ("pooler.blocks.{i}.norm2", ("pooler.self_attention_layers.{i}.layer_norm2",)),
    ("pooler.blocks.{i}.mlp.fc1", ("pooler.self_attention_layers.{i}.mlp.fc1",)),
    ("pooler.blocks.{i}.mlp.fc2", ("pooler.self_attention_layers.{i}.mlp.fc2",)),
    ("pooler.cross_attention_block.norm1", ("pooler.cross_attention_layer.layer_norm1",)),
    ("pooler.cross_attention_block.xattn.q", ("pooler.cross_attention_layer.cross_attn.q_proj",)),
    (
        "pooler.cross_attention_block.xattn.kv",
        ("pooler.cross_attention_layer.cross_attn.k_proj", "pooler.cross_attention_layer.cross_attn.v_proj"),
    ),
    ("pooler.cross_attention_block.norm2", ("pooler.cross_attention_layer.layer_norm2",)),
    ("pooler.cross_attention_block.mlp.fc1", ("pooler.cross_attention_layer.mlp.fc1",)),
    ("pooler.cross_attention_block.mlp.fc2", ("pooler.cross_attention_layer.mlp.fc2",)),
    ("linear", ("classifier",)),
)


def hf_probe_tensors(probe: AttentiveProbe) -> dict[str, Tensor]:
    """Return the tensors of a probe under Hugging Face's names."""
    ours, found = probe.state_dict(), {}
    for own, theirs in HF_PROBE_NAMES:
        for block in range(len(probe.pooler.blocks)) if "{i}" in own else (0,):
            for suffix in ("",) if own.endswith("query_tokens") else (".weight", ".bias"):
                parts = ours[own.format(i=block) + suffix].chunk(len(theirs))
                found |= {name.format(i=block) + suffix: part for name, part in zip(theirs, parts, strict=True)}
    return found


@dataclass(frozen=True)
class Classifier:
    """A trained probe with the names of its classes."""

    probe: AttentiveProbe
    classes: tuple[str, ...]
    heads: int


def save_classifier(path: Path, tensors: Mapping[str, Tensor], classes: Sequence[str], heads: int) -> None:
    """Write a probe as safetensors, with its classes and heads in the metadata."""
    about = {"format": "pt", "classes": json.dumps(list(classes)), "heads": str(heads)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, about)


def load_classifier(path: Path) -> Classifier:
    """Read a probe that `save_classifier` wrote.

    Raises:
        BadInput: the file is missing or not a probe.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        classes, heads = tuple(json.loads(about["classes"])), int(about["heads"])
        width = tensors["linear.weight"].shape[1]
    except (OSError, SafetensorError, KeyError) as error:
        raise BadInput(
            f"{path}: not a probe ({error}); give the .safetensors that `vjepa eval attentive` wrote"
        ) from None
    blocks = sum(name.endswith(".attn.qkv.weight") for name in tensors)
    probe = AttentiveProbe(width, heads, len(classes), blocks=blocks)
    probe.load_state_dict(tensors)
    return Classifier(probe.eval().requires_grad_(False), classes, heads)
