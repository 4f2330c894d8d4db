"""Random weights give the same features in our networks and in `transformers.VJEPA2Model`."""

import pytest
import torch
from torch import Tensor, nn

from vjepa.config import EncoderSize, Model, Transformer
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.grid import Grid
from vjepa.nn.predictor import Predictor, PredictorInput

transformers = pytest.importorskip("transformers")

FRAMES, PX = 8, 64

# Channels of a head: V-JEPA 2's ViT-L and predictor (64, 32), ViT-H (80), the unreleased ViT-g (88).
HEAD_WIDTHS = (64, 32, 80, 88)


def settings(head_width: int) -> Model:
    encoder = EncoderSize(name="custom", width=3 * head_width, depth=3, heads=3, mlp_ratio=48 / 11)
    return Model(encoder=encoder, predictor=Transformer(width=2 * head_width, depth=2, heads=2))


def perturb(module: nn.Module, generator: torch.Generator) -> None:
    """Change every parameter. At initialization biases are 0 and norms 1, so a swapped parameter would go unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def huggingface(model: Model, encoder: Encoder, predictor: Predictor) -> nn.Module:
    """Return Hugging Face's model with the same weights."""
    config = transformers.VJEPA2Config(
        patch_size=model.patch_px,
        crop_size=PX,
        frames_per_clip=FRAMES,
        tubelet_size=model.tubelet_frames,
        hidden_size=model.encoder.width,
        num_attention_heads=model.encoder.heads,
        num_hidden_layers=model.encoder.depth,
        mlp_ratio=model.encoder.mlp_ratio,
        pred_hidden_size=model.predictor.width,
        pred_num_attention_heads=model.predictor.heads,
        pred_num_hidden_layers=model.predictor.depth,
        pred_num_mask_tokens=len(predictor.mask_tokens),
    )
    other = transformers.VJEPA2Model(config).eval()
    weights: dict[str, Tensor] = {}
    for prefix, module in (("encoder", encoder), ("predictor", predictor)):
        for name, value in module.state_dict().items():
            path = _rename(prefix, name)
            if ".qkv." in path:
                for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    weights[path.replace("qkv", part)] = third
            else:
                weights[path] = value
    other.load_state_dict(weights, strict=True)
    return other


def _rename(prefix: str, name: str) -> str:
    for ours, theirs in (
        ("patch_embed.proj", "embeddings.patch_embeddings.proj"),
        ("predictor_embed", "embeddings.predictor_embeddings"),
        ("mask_tokens", "embeddings.mask_tokens"),
        ("predictor_blocks", "layer"),
        ("predictor_norm", "layernorm"),
        ("predictor_proj", "proj"),
        ("blocks", "layer"),
    ):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    else:
        name = name.replace("norm", "layernorm")
    return f"{prefix}.{name.replace('.attn.', '.attention.')}"


def pair(head_width: int) -> tuple[Encoder, Predictor, nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(head_width)
    model = settings(head_width)
    encoder, predictor = Encoder(model), Predictor(model, mask_tokens=2)
    for module in (encoder, predictor):
        perturb(module, generator)
    frames = torch.randn(2, 3, FRAMES, PX, PX, generator=generator)
    return encoder, predictor, huggingface(model, encoder, predictor), frames


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_features_equal_hugging_face_bit_for_bit(head_width: int) -> None:
    encoder, _, other, frames = pair(head_width)
    with torch.no_grad():
        (ours,) = encoder([View(frames)])
        theirs = other(frames.transpose(1, 2), skip_predictor=True).last_hidden_state
    assert (ours - theirs).abs().max().item() == 0.0


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_predictions_equal_hugging_face_to_rounding(head_width: int) -> None:
    """Not bit for bit: Hugging Face sorts the tokens of a sequence by position, so sums run in another order."""
    encoder, predictor, other, frames = pair(head_width)
    generator = torch.Generator().manual_seed(1)
    grid = Grid(4, 4, 4)
    order = torch.stack([torch.randperm(grid.tokens, generator=generator) for _ in range(2)])
    visible, hidden = order[:, :20].sort().values, order[:, 20:].sort().values
    with torch.no_grad():
        out = other(frames.transpose(1, 2), context_mask=[visible], target_mask=[hidden])
        (whole,) = encoder([View(frames)])
        context = whole.gather(1, visible[..., None].expand(-1, -1, whole.shape[-1]))
        # Hugging Face uses mask token 1 alone.
        (ours,) = predictor([PredictorInput(context, visible, hidden, grid, mask_kind=1)])
    theirs = out.predictor_output.last_hidden_state
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
