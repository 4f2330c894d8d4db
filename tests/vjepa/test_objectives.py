"""Every method equals its formulas, and settings that exclude each other are refused."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drifting_shapes import FRAMES, OBJECTIVES, PX, masked_clips, scenes, toy_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vjepa.config import Run
from vjepa.methods.base import MaskedClips, create_method
from vjepa.methods.levjepa import method as levjepa
from vjepa.methods.levjepa.settings import LeVJEPASettings
from vjepa.methods.regularizers import barlow, directions, sigreg, vicreg
from vjepa.methods.vjepa2_1 import method as vjepa2_1
from vjepa.methods.vjepa2_1.settings import VJEPA21Settings
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.grid import Grid
from vjepa.nn.positions import rotations
from vjepa.nn.predictor import PredictorInput
from vjepa_data.reader.batch import Batch, Clips

# --- V-JEPA 2.1 ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 18), st.integers(2, 40), st.integers(0, 99))
def test_distance_weights_are_those_to_the_nearest_hidden_token(t: int, h: int, w: int, seed: int) -> None:
    grid = Grid(t, h, w)
    order = torch.stack(
        [torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1)]
    )
    count = max(1, grid.tokens // 3)
    visible, hidden = order[:, :count], order[:, count:]
    visible_at, hidden_at = (
        torch.stack((ids // grid.cells, ids % grid.cells // w, ids % w), -1).double() for ids in (visible, hidden)
    )
    nearest = torch.cdist(visible_at, hidden_at).amin(-1) / max(1, min(h, w) // 16)
    torch.testing.assert_close(
        vjepa2_1.distance_weights(visible, hidden, grid), nearest.rsqrt().float(), rtol=1e-5, atol=1e-6
    )


def test_the_weight_of_visible_tokens_ramps_linearly() -> None:
    objective = VJEPA21Settings(context_weight=0.5, context_ramp=(10, 20))
    weights = [vjepa2_1.context_weight(step, objective) for step in (0, 9, 10, 15, 20, 1000)]
    assert weights == [0, 0, 0, 0.25, 0.5, 0.5]
    assert vjepa2_1.context_weight(0, VJEPA21Settings(context_ramp=(0, 0))) == 0.5


def test_dense_loss_is_the_formula() -> None:
    """Written out with loops over clips, tokens and levels."""
    run = toy_run(**{**OBJECTIVES["vjepa2_1"], "batch_size": 2})
    method = create_method(run)
    networks, clips = method.build(), masked_clips(run, 7)  # some batches were passed over
    loss = method.loss(networks, [clips], step=40)
    expected = 0.0
    with torch.no_grad():
        (h,) = networks["target"]([View(clips.frames)], levels=True)
        h = torch.cat([F.layer_norm(part, (48,)) for part in h.split(48, dim=-1)], dim=-1)
        for mask in clips.masks:
            (context,) = networks["encoder"]([View(clips.frames, mask.visible)], levels=True)
            z, y = networks["predictor"]([PredictorInput(context, mask.visible, mask.hidden, clips.grid, mask.kind)])
            near = vjepa2_1.distance_weights(mask.visible, mask.hidden, clips.grid)
            for clip in range(2):
                expected += (z[clip] - h[clip, mask.hidden[clip]]).abs().mean().item() / 4
                apart = (y[clip] - h[clip, mask.visible[clip]]).abs().mean(-1)
                expected += 0.25 * (apart * near[clip]).mean().item() / 4  # half-way up the ramp
    assert loss.value.item() == pytest.approx(expected, rel=1e-5)


def test_levels_are_the_features_after_their_blocks() -> None:
    run = toy_run(model={"levels": [1, 3], "predict_context": True}, objective={"name": "vjepa2_1"})
    encoder = Encoder(run.model)
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"patch_embed", "blocks", "norms_block"}
    seen: dict[int, Tensor] = {}
    for number, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda _m, _i, out, number=number: seen.update({number: out}))
    frames = scenes(0, 2)
    (both,) = encoder([View(frames)], levels=True)
    (last,) = encoder([View(frames)])
    first = encoder.norms_block[0](seen[1]).unflatten(0, (2, -1))
    assert torch.equal(both[..., :48], first)
    assert torch.equal(both[..., 48:], last)


def test_names_are_those_of_v_jepa_2_1() -> None:
    run = toy_run(model={**OBJECTIVES["vjepa2_1"]["model"], "still_tokens": True}, objective={"name": "vjepa2_1"})
    method = create_method(run)
    networks = method.build()
    encoder, predictor = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in networks.trained.values())
    assert encoder["patch_embed_img.proj.weight"] == (48, 3, 1, 8, 8)
    assert encoder["img_mod_embed"] == encoder["video_mod_embed"] == (1, 1, 48)
    assert encoder["norms_block.3.bias"] == (48,)
    assert predictor["predictor_embed.0.weight"] == (48, 4 * 48)
    assert predictor["predictor_embed.2.weight"] == (24, 48)
    assert predictor["predictor_proj.weight"] == predictor["predictor_proj_context.weight"] == (4 * 48, 24)


def test_stretched_positions_agree_across_resolutions() -> None:
    """The corners of a 4 x 4 grid and of an 8 x 8 grid are at the same places."""
    corners = [torch.tensor([[0, n - 1, n * (n - 1), n * n - 1]]) for n in (4, 8)]
    small, large = (
        rotations([(Grid(1, n, n), ids)], head_width=32, form="interleaved", cells=16)
        for n, ids in zip((4, 8), corners, strict=True)
    )
    torch.testing.assert_close(small, large)


def test_an_output_layer_that_nothing_trains_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predict_context \(True\) does not fit objective vjepa2"):
        toy_run(model={"predict_context": True})
    with pytest.raises(ValueError, match=r"predict_context \(False\) does not fit objective vjepa2_1"):
        toy_run(objective={"name": "vjepa2_1"})


@pytest.mark.parametrize("levels", [[1, 0, 3], [0, 1], [3, 3]])
def test_levels_must_ascend_to_the_last_block(levels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must ascend and end at the last block \(3\); try \[0, 1, 2, 3\]"):
        toy_run(model={"levels": levels})


# --- still pictures -----------------------------------------------------------------------------------------------


def batch_of(frames: int) -> Batch:
    pixels = torch.randint(
        0, 256, (2, frames, PX, PX, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    clips = Clips(frames=pixels, slots=(0, 1), keys=("a", "b"), sources=(0, 0), start_s=(0.0, 0.0))
    return Batch(step=3, groups=(clips,))


def test_a_still_picture_fills_a_tubelet() -> None:
    run = toy_run()
    method = create_method(run)
    (clips,) = method.prepare(batch_of(1), torch.device("cpu"))
    assert clips.frames.shape == (2, 3, 2, PX, PX)
    assert torch.equal(clips.frames[:, :, 0], clips.frames[:, :, 1])
    assert clips.grid == Grid(1, 4, 4)
    assert torch.isfinite(method.loss(method.build(), [clips], step=0).value)


def test_a_still_picture_may_have_a_tokenizer_of_its_own() -> None:
    run = toy_run(model={"still_tokens": True})
    method = create_method(run)
    inputs = [
        *method.prepare(batch_of(1), torch.device("cpu")),
        *method.prepare(batch_of(8), torch.device("cpu")),
    ]
    assert [clips.frames.shape[2] for clips in inputs] == [1, 8]
    networks = method.build()
    method.loss(networks, inputs, step=0).value.backward()
    encoder = networks["encoder"]
    assert isinstance(encoder, Encoder)
    for parameter in (encoder.patch_embed_img.proj.weight, encoder.patch_embed.proj.weight):
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_the_tokenizer_of_absent_pictures_has_a_zero_gradient() -> None:
    """None would let FSDP2 mix up the gradients of ranks with pictures and ranks without."""
    run = toy_run(model={"still_tokens": True})
    method = create_method(run)
    networks = method.build()
    method.loss(networks, method.prepare(batch_of(8), torch.device("cpu")), step=0).value.backward()
    for name, parameter in [*networks["encoder"].named_parameters(), *networks["predictor"].named_parameters()]:
        assert parameter.grad is not None, name
    encoder = networks["encoder"]
    assert isinstance(encoder, Encoder)
    assert not encoder.patch_embed_img.proj.weight.grad.any()  # pyright: ignore[reportOptionalMemberAccess]


# --- LeVJEPA ------------------------------------------------------------------------------------------------------


def test_sigreg_knows_a_normal_cloud_and_a_point() -> None:
    generator = torch.Generator().manual_seed(0)
    u = directions(seed=0, step=0, width=8, slices=256, device=torch.device("cpu"))
    torch.testing.assert_close(u.norm(dim=0), torch.ones(256))
    normal = torch.randn(4000, 8, generator=generator)
    assert sigreg(normal, count=4000, slices=u, knots=17).item() == pytest.approx(1, abs=0.5)
    assert sigreg(2 * normal, count=4000, slices=u, knots=17) > 50
    t = np.linspace(0, 3, 17)
    weights = np.full(17, 2 * 3 / 16)
    weights[[0, -1]] /= 2
    phi = np.exp(-(t**2) / 2)
    for point in (0.0, 0.7):
        cloud = torch.zeros(5, 8)
        cloud[:, 0] = point
        at_point = point * u[0].double().numpy()[:, None]
        apart = (np.cos(t * at_point) - phi) ** 2 + np.sin(t * at_point) ** 2
        expected = 5 * (weights * phi * apart).sum(1).mean()
        assert sigreg(cloud, count=5, slices=u, knots=17).item() == pytest.approx(expected, rel=1e-4)


def test_sigreg_has_the_gradient_of_its_value() -> None:
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32, requires_grad=True)
    u = directions(seed=0, step=0, width=3, slices=5, device=torch.device("cpu"))
    (gradient,) = torch.autograd.grad(sigreg(z, count=6, slices=u, knots=17), z)
    moved = z.detach().clone()
    with torch.no_grad():
        moved[2, 1] += 1e-2
        above = sigreg(moved, count=6, slices=u, knots=17)
        moved[2, 1] -= 2e-2
        slope = (above - sigreg(moved, count=6, slices=u, knots=17)) / 2e-2
    assert gradient[2, 1].item() == pytest.approx(slope.item(), rel=2e-2)


def test_vicreg_and_barlow_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, 6, generator=generator) * 0.5
    covariance = torch.cov(a.T)
    off = covariance - covariance.diagonal().diag()
    expected = torch.relu(1 - (a.var(0) + 1e-4).sqrt()).mean() + off.square().sum() / 6 / 25
    torch.testing.assert_close(vicreg(a, count=50), expected, rtol=1e-4, atol=1e-6)
    c = torch.corrcoef(torch.cat((a, b), 1).T)[:6, 6:]
    off = c - c.diagonal().diag()
    expected = (1 - c.diagonal()).square().sum() + 0.0051 * off.square().sum()
    torch.testing.assert_close(barlow(a, b, count=50), expected, rtol=1e-3, atol=1e-4)


def crops_of(clips: MaskedClips, run: Run) -> list[Tensor]:
    assert isinstance(run.objective, LeVJEPASettings)
    return levjepa.local_crops(clips, run.objective, seed=run.seed, flip=run.data.crop.flip)


def test_small_crops_are_a_function_of_step_and_slot() -> None:
    run = toy_run(**{**OBJECTIVES["levjepa"], "batch_size": 4})
    clips = masked_clips(run, 5)
    crops = crops_of(clips, run)
    assert [tuple(crop.shape) for crop in crops] == [(4, 3, FRAMES, 16, 16)] * 2
    part = dataclasses.replace(clips, frames=clips.frames[2:], slots=(2, 3))
    for whole, own in zip(crops, crops_of(part, run), strict=True):
        torch.testing.assert_close(own, whole[2:])
    assert not torch.equal(crops[0], crops[1])
    later = crops_of(dataclasses.replace(clips, step=6), run)
    assert not torch.equal(crops[0], later[0])


def test_small_crops_cover_the_requested_share_of_the_picture() -> None:
    """On a ramp of brightness the spread of a crop tells its width."""
    objective = {**OBJECTIVES["levjepa"]["objective"], "local_scale": [0.25, 0.25], "jitter": 0, "gray": 0}
    run = toy_run(**{**OBJECTIVES["levjepa"], "objective": objective, "batch_size": 64})
    ramps = torch.linspace(-1, 1, PX).expand(64, 3, 2, PX, PX)
    both = [dataclasses.replace(masked_clips(run, 0), frames=ramp) for ramp in (ramps, ramps.transpose(-1, -2))]
    width, height = (
        crops_of(clips, run)[0].flatten(1).max(1).values - crops_of(clips, run)[0].flatten(1).min(1).values
        for clips in both
    )
    shares = width / 2 * height / 2 * (16 / 15) ** 2  # from the middle of the first pixel to that of the last
    assert shares.mean().item() == pytest.approx(0.25, rel=0.1)


def test_a_class_token_is_the_summary_of_a_view_where_there_is_one() -> None:
    """Its gradient shows the use: without a class token the mean of tokens is used."""
    run = toy_run(**{**OBJECTIVES["levjepa"], "batch_size": 4}, model={"class_token": True, "causal": True})
    method = create_method(run)
    networks, clips = method.build(), masked_clips(run, 0)
    loss = method.loss(networks, [clips], step=0)
    loss.value.backward()
    encoder = networks["encoder"]
    assert isinstance(encoder, Encoder)
    assert encoder.cls_token.grad is not None
    assert encoder.cls_token.grad.any()
    (whole,) = encoder([View(clips.frames, clips.masks[0].visible)], class_token=True)
    assert whole.shape[1] == clips.masks[0].visible.shape[1] + 1


def test_settings_that_would_change_the_result_are_refused() -> None:
    with pytest.raises(ValueError, match="does not train a class token"):
        toy_run(model={"class_token": True})
    with pytest.raises(ValueError, match="compares all clips of a step"):
        toy_run(**OBJECTIVES["levjepa"], parallel={"accumulate": 2})
    views = OBJECTIVES["levjepa"]["objective"]
    with pytest.raises(ValueError, match="takes one kind of mask"):
        toy_run(objective={**views, "masks": views["masks"] * 2})
