"""Positions, patches and initialization."""

import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import nn

from vjepa.config import ENCODERS, Model, Transformer
from vjepa.nn.blocks import Block, PatchEmbed
from vjepa.nn.encoder import Encoder
from vjepa.nn.grid import Grid
from vjepa.nn.positions import axis_channels, rotate, rotations, sine_cosine
from vjepa.nn.predictor import Predictor
from vjepa_data.settings import BadInput

GRID = Grid(64, 32, 32)


def turned(x: torch.Tensor, place: Sequence[int], form: Literal["tiled", "interleaved"]) -> torch.Tensor:
    """Rotate the channels of a head at a position."""
    t, row, column = place
    index = torch.tensor([[(t * GRID.h + row) * GRID.w + column]])
    return rotate(x[None, None, None], rotations([(GRID, index)], head_width=len(x), form=form)).flatten()


@pytest.mark.parametrize(("head_width", "channels"), [(64, 20), (80, 26), (88, 28), (104, 34), (32, 10)])
def test_axes_have_as_many_channels_as_in_v_jepa_2(head_width: int, channels: int) -> None:
    assert axis_channels(head_width) == channels


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_interleaved_products_depend_on_distance_alone(axis: int) -> None:
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    products = []
    for shift in (0, 3, 19):
        at, from_ = [5, 6, 7], [5, 6, 7]
        at[axis], from_[axis] = shift + 4, shift
        products.append(turned(q, at, "interleaved") @ turned(k, from_, "interleaved"))
    assert max(products) - min(products) < 1e-4
    assert (turned(q, (5, 6, 7), "interleaved").norm() - q.norm()).abs() < 1e-5


def test_tiled_positions_are_not_a_rotation() -> None:
    """V-JEPA 2 was trained with this defect: equal offsets give different products."""
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    near, far = (turned(q, (p + 2, 0, 0), "tiled") @ turned(k, (p, 0, 0), "tiled") for p in (1, 11))
    assert (near - far).abs() > 1e-2


def test_channels_rotate_by_the_angles_of_the_paper() -> None:
    """Each pair is compared with sines and cosines computed singly in double precision."""
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for form in ("tiled", "interleaved"):
        expected = x.double().clone()
        for axis, position in enumerate((63, 31, 17)):
            for pair in range(5):
                a, b = (10 * axis + 2 * pair + i for i in (0, 1))
                if form == "interleaved":
                    angle_a = angle_b = position / 10000 ** (pair / 5)
                else:
                    angle_a, angle_b = (position / 10000 ** (((2 * pair + i) % 5) / 5) for i in (0, 1))
                xa, xb = float(x[a]), float(x[b])
                expected[a] = xa * math.cos(angle_a) - xb * math.sin(angle_a)
                expected[b] = xb * math.cos(angle_b) + xa * math.sin(angle_b)
        torch.testing.assert_close(turned(x, (63, 31, 17), form).double(), expected, rtol=0, atol=2e-5)
    assert torch.equal(turned(x, (63, 31, 17), "tiled")[30:], x[30:])  # unrotated channels


def test_angles_are_exact_for_bf16_activations() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, full = (turned(y, (63, 31, 31), "interleaved") for y in (x, x.float()))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.bfloat16())  # rounded once, at the end


def test_indexed_patches_equal_those_of_the_full_clip() -> None:
    embed = PatchEmbed(channels=3, tubelet_frames=2, patch_px=4, width=24)
    frames = torch.randn(3, 3, 6, 8, 12, generator=torch.Generator().manual_seed(0))
    whole = embed(frames)
    index = torch.stack([torch.randperm(18, generator=torch.Generator().manual_seed(i))[:7] for i in range(3)])
    torch.testing.assert_close(embed(frames, index), whole.take_along_dim(index[..., None], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 64, 64), (8, 60, 64), (8, 64, 8), (1, 64, 64)])
def test_a_clip_with_a_fraction_of_a_token_is_rejected(size: tuple[int, int, int]) -> None:
    with pytest.raises(BadInput, match="must be a multiple of a token's"):
        Grid.of(*size, Model(encoder="vit_tiny"))  # pyright: ignore[reportArgumentType]


def test_heads_too_narrow_for_positions_are_rejected() -> None:
    with pytest.raises(ValueError, match="even and at least 6"):
        Transformer(width=12, depth=1, heads=3)


def small() -> Model:
    return Model.model_validate(
        {
            "encoder": {"name": "custom", "width": 64, "depth": 3, "heads": 2},
            "predictor": {"width": 32, "depth": 2, "heads": 2},
        }
    )


def test_initialization_follows_v_jepa_2() -> None:
    encoder, predictor = Encoder(small()), Predictor(small(), mask_tokens=2)
    for blocks in (encoder.blocks, predictor.predictor_blocks):
        for layer, block in enumerate(blocks, start=1):
            assert isinstance(block, Block)
            for weight, deviation in (
                (block.attn.qkv.weight, 0.02),
                (block.mlp.fc1.weight, 0.02),
                (block.attn.proj.weight, 0.02 / (2 * layer) ** 0.5),
                (block.mlp.fc2.weight, 0.02 / (2 * layer) ** 0.5),
            ):
                assert weight.std().item() == pytest.approx(deviation, rel=0.1)
                assert abs(weight.mean().item()) < deviation / 5
    for module in (encoder, predictor):
        for name, parameter in module.named_parameters():
            if name.endswith("bias") or name == "mask_tokens":
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name
            else:
                assert parameter.std() > 0, name


def test_fan_in_scales_weights_by_their_inputs() -> None:
    encoder = Encoder(Model.model_validate({**small().model_dump(), "init_std": "fan_in"}))
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    for weight, later in ((encoder.patch_embed.proj.weight, 1), (block.attn.qkv.weight, 1), (block.mlp.fc2.weight, 2)):
        inputs = weight[0].numel()
        assert weight.std().item() == pytest.approx((inputs * later) ** -0.5, rel=0.1)


def test_sine_cosine_models_rotate_no_channel() -> None:
    ids = torch.arange(12)[None]
    q = torch.randn(12, 2, 3, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(q, rotations([(Grid(3, 2, 2), ids)], head_width=24, form="sincos")), q)


def test_sines_and_cosines_of_a_token_do_not_depend_on_the_others() -> None:
    grid = Grid(4, 3, 5)
    table = sine_cosine(grid, torch.arange(grid.tokens)[None], 34)
    picked = torch.tensor([[59, 0], [7, 30]])
    assert torch.equal(sine_cosine(grid, picked, 34), table[0][picked])


def with_levels() -> tuple[Encoder, Predictor]:
    changes = {"levels": [0, 1, 2], "predict_context": True, "still_tokens": True}
    settings = Model.model_validate({**small().model_dump(), **changes})
    return Encoder(settings), Predictor(settings, mask_tokens=2)


def test_norms_start_as_identity() -> None:
    for module in with_levels():
        norms = [norm for norm in module.modules() if isinstance(norm, nn.LayerNorm)]
        assert len(norms) > 3
        assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


def test_marks_of_pictures_and_clips_start_near_zero() -> None:
    for module in with_levels():
        assert 0 < module.img_mod_embed.abs().max() < 1e-5


def test_initialization_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = Encoder(small(), seed=3)
    torch.manual_seed(2)
    with torch.device("meta"):
        late = Encoder(small())
    late.to_empty(device="cpu").init_weights(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), late.parameters(), strict=True))
    other = Encoder(small(), seed=4)
    assert not torch.equal(one.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)  # pyright: ignore


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_model_sizes_match_the_papers(name: str) -> None:
    """Parameters in millions, from the table of V-JEPA 2 and rounded like it."""
    with torch.device("meta"):
        encoder = Encoder(Model.model_validate({"encoder": name}))
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    expected = {"vit_tiny": 5.6, "vit_small": 22, "vit_base": 86, "vit_large": 304, "vit_huge": 632, "vit_giant": 1013}
    assert millions == pytest.approx(expected.get(name, 1844), rel=0.02)


COMPILE = """
import torch
from torch._dynamo import explain
from vjepa.config import Transformer
from vjepa.nn.attention import Segments
from vjepa.nn.grid import Grid
from vjepa.nn.blocks import Block
from vjepa.nn.positions import rotations

index, grid = torch.arange(8)[None].expand(2, -1), Grid(2, 2, 2)
rotation = rotations([(grid, index), (grid, index[:1, :5])], head_width=16, form="tiled")
segments = Segments.of([(2, 8), (1, 5)], device=torch.device("cpu"))
report = explain(Block(Transformer(width=32, depth=1, heads=2)))(torch.randn(21, 32), rotation, segments)
print(report.graph_count, report.graph_break_count)
"""


def test_a_block_compiles_without_graph_breaks() -> None:
    """Runs in a separate process, because the signature checks of tests are graph breaks."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]


def test_every_linear_layer_has_a_bias() -> None:
    assert all(module.bias is not None for module in Encoder(small()).modules() if isinstance(module, nn.Linear))
