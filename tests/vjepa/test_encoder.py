"""The encoder: packing, visibility, causality, precision."""

import pytest
import torch
from torch import Tensor

from vjepa.config import Model
from vjepa.nn.encoder import Encoder, View, normalise
from vjepa_data.settings import BadInput

SMALL = Model.model_validate(
    {
        "encoder": {"name": "custom", "width": 64, "depth": 2, "heads": 2},
        "predictor": {"width": 32, "depth": 2, "heads": 2},
        "patch_px": 8,
    }
)


def perturbed(rope: str = "tiled") -> Encoder:
    encoder = Encoder(Model.model_validate({**SMALL.model_dump(), "rope": rope}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder


def some_views() -> list[View]:
    """Return two masks of the same clips, a longer clip without a mask, and a wide masked clip."""
    generator = torch.Generator().manual_seed(1)
    short, long = (torch.randn(2, 3, frames, 32, 32, generator=generator) for frames in (4, 8))
    wide = torch.randn(1, 3, 4, 16, 48, generator=generator)
    index = torch.stack([torch.randperm(32, generator=generator) for _ in range(2)])
    return [
        View(short, index[:, :12].sort().values),
        View(short, index[:, 12:].sort().values),
        View(long),
        View(wide, torch.tensor([[0, 3, 5, 23]])),
    ]


def gradients(encoder: Encoder, outputs: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([output.square().mean() for output in outputs]).sum()
    return list(torch.autograd.grad(loss, list(encoder.parameters())))


def test_one_packed_pass_equals_one_pass_per_view() -> None:
    encoder, views = perturbed(), some_views()
    packed = encoder(views)
    single = [encoder([view])[0] for view in views]
    for ours, theirs in zip(packed, single, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients(encoder, packed), gradients(encoder, single), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_hidden_tokens_and_other_clips_have_no_influence() -> None:
    encoder, views = perturbed(), some_views()
    before = encoder(views)
    frames = views[0].frames.clone()
    hidden = sorted(set(range(32)) - set(views[0].index[1].tolist()))  # pyright: ignore[reportOptionalSubscript]
    for token in hidden:
        t, row, column = token // 16, token % 16 // 4, token % 4
        frames[1, :, 2 * t : 2 * t + 2, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 7.0
    frames[0] = 7.0
    after = encoder([View(frames, views[0].index), *views[1:]])
    assert torch.equal(before[0][1], after[0][1])
    assert not torch.equal(before[0][0], after[0][0])


def test_the_order_of_ids_only_permutes_features() -> None:
    encoder, frames = perturbed(), some_views()[0].frames
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    whole, shuffled = encoder([View(frames), View(frames, order)])
    torch.testing.assert_close(shuffled, whole.take_along_dim(order[..., None], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", ["tiled", "interleaved"])
def test_interleaved_positions_are_relative(rope: str) -> None:
    """With `interleaved`, moving the full picture changes nothing and moving half of it does."""
    encoder = perturbed(rope=rope)
    frames = torch.randn(1, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[0, 1, 4, 5]])  # two by two, in a corner
    moved = encoder([View(frames.roll((8, 16), (3, 4)), seen + 4 + 2)])[0]
    torn = frames.clone()
    torn[..., :8, 24:], torn[..., :8, 8:16] = frames[..., :8, 8:16], frames[..., :8, 24:]
    (before,), (after,) = encoder([View(frames, seen)]), encoder([View(torn, torch.tensor([[0, 3, 4, 5]]))])
    assert (after - before).abs().max() > 1e-3
    if rope == "interleaved":
        torch.testing.assert_close(moved, before, rtol=0, atol=1e-5)
    else:
        assert (moved - before).abs().max() > 1e-4


def with_class_token(*, causal: bool) -> Encoder:
    encoder = Encoder(Model.model_validate({**SMALL.model_dump(), "class_token": True, "causal": causal}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder


def test_later_tubelets_have_no_influence_on_a_causal_encoder() -> None:
    encoder, views = with_class_token(causal=True), some_views()
    before = encoder(views, class_token=True)
    later = [View(view.frames.clone(), view.index) for view in views]
    for view in later:
        view.frames[:, :, 2:] += 1.0  # all but the first tubelet, of 16 tokens (the wide clip: 12)
    after = encoder(later, class_token=True)
    for view, old, new in zip(views, before, after, strict=True):
        ids = torch.arange(64).expand(2, -1) if view.index is None else view.index
        first = ids < view.frames.shape[-2] * view.frames.shape[-1] // 64
        assert torch.equal(old[:, 1:][first], new[:, 1:][first])
        assert ((old - new)[:, 1:][~first].abs().amax(-1) > 1e-4).all()
        assert ((old - new)[:, 0].abs().amax(-1) > 1e-4).all()  # the class token reads the whole clip


def test_a_causal_pass_equals_one_pass_per_prefix() -> None:
    """Features of tubelet t equal the features of a clip that ends with it."""
    encoder = Encoder(Model.model_validate({**SMALL.model_dump(), "causal": True}))
    frames = some_views()[2].frames  # 4 tubelets of 16 tokens
    (whole,) = encoder([View(frames)])
    for t in range(4):
        (prefix,) = encoder([View(frames[:, :, : 2 * t + 2])])
        torch.testing.assert_close(prefix[:, -16:], whole[:, 16 * t : 16 * t + 16], rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_no_token_attends_to_a_causal_class_token(causal: bool) -> None:
    encoder, views = with_class_token(causal=causal), some_views()
    before = encoder(views, class_token=True)
    assert [len(each[0]) for each in before] == [1 + 12, 1 + 20, 1 + 64, 1 + 4]
    for plain, each in zip(encoder(views), before, strict=True):
        assert torch.equal(plain, each[:, 1:])
    with torch.no_grad():
        encoder.cls_token.add_(1.0)
    for old, new in zip(before, encoder(views, class_token=True), strict=True):
        assert not torch.equal(old[:, 0], new[:, 0])
        assert torch.equal(old[:, 1:], new[:, 1:]) == causal


def test_bf16_features_are_close_to_fp32() -> None:
    encoder, views = perturbed(), some_views()
    exact = encoder(views)
    rough = encoder.bfloat16()(views)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b.float()).abs().mean() < 0.02 * a.abs().mean()


def test_wrong_sizes_are_rejected() -> None:
    with pytest.raises(BadInput, match=r"height \(20\) must be a multiple of a token's \(8\); try 16"):
        perturbed()([View(torch.zeros(1, 3, 4, 20, 32))])


def test_frames_are_normalised_with_imagenet_statistics() -> None:
    frames = torch.zeros(1, 1, 1, 2, 3, dtype=torch.uint8)
    frames[0, 0, 0, 1] = 255
    out = normalise(frames)
    assert out.shape == (1, 3, 1, 1, 2)
    torch.testing.assert_close(out[0, :, 0, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    torch.testing.assert_close(out[0, :, 0, 0, 1], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
