"""A stream equals a windowed pass over the whole video, in constant memory and time per tubelet."""

import pytest
import torch
from torch import Tensor

from vjepa.config import Model, load
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.streaming import EncoderStream, StreamStep, check_streamable
from vjepa.weights.tensors import InMemory
from vjepa.weights.video_encoder import VideoEncoder
from vjepa_data.settings import BadInput

FORM = {
    "encoder": {"name": "custom", "width": 48, "depth": 3, "heads": 2},
    "predictor": {"width": 32, "depth": 1, "heads": 2},
    "patch_px": 8,
    "tubelet_frames": 2,
    "rope": "interleaved",
    "causal": True,
}
T = 64


def encoder_with(**changes: object) -> Encoder:
    encoder = Encoder(Model.model_validate({**FORM, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder.requires_grad_(False)


def clip_of(tubelets: int, px: int = 16) -> Tensor:
    return torch.randn(1, 3, 2 * tubelets, px, px, generator=torch.Generator().manual_seed(1))


def streamed(encoder: Encoder, clip: Tensor, *, window: int, chunk: int) -> tuple[Tensor, Tensor | None]:
    stream = EncoderStream(encoder, window=window)
    features, summaries = [], []
    for part in clip.split(2 * chunk, dim=2):
        features.append(stream(part))
        summaries.append(stream.class_features)
    return torch.cat(features, 1).flatten(1, 2), torch.cat(summaries, 1) if encoder.settings.class_token else None


@pytest.mark.parametrize("window", [4, 16, 64])
def test_a_stream_equals_a_windowed_pass(window: int) -> None:
    clip = clip_of(T)
    (whole,) = encoder_with(window=window)([View(clip)])
    for chunk in (1, 2, 5):
        features, _ = streamed(encoder_with(), clip, window=window, chunk=chunk)
        torch.testing.assert_close(features, whole, rtol=0, atol=1e-5)
    if window >= T:
        (causal,) = encoder_with()([View(clip)])
        assert torch.equal(causal, whole)


@pytest.mark.parametrize(
    "changes",
    [{"class_token": True}, {"levels": (0, 2), "rope_cells": 16}, {"still_tokens": True}, {"patch_px": 16}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_stream_of_any_form_equals_a_windowed_pass(changes: dict) -> None:
    clip = clip_of(10)
    (whole,) = encoder_with(**changes, window=4)([View(clip)])
    features, _ = streamed(encoder_with(**changes), clip, window=4, chunk=3)
    torch.testing.assert_close(features, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [2, 8])
def test_class_features_equal_those_of_the_clip_so_far(window: int) -> None:
    clip = clip_of(6)
    _, found = streamed(encoder_with(class_token=True), clip, window=window, chunk=2)
    assert found is not None
    whole = encoder_with(class_token=True, window=window)
    for t in range(6):
        (prefix,) = whole([View(clip[:, :, : 2 * t + 2])], class_token=True)
        torch.testing.assert_close(found[:, t], prefix[:, 0], rtol=0, atol=1e-5)


def test_a_changed_future_leaves_the_past_bit_identical() -> None:
    encoder, clip = encoder_with(), clip_of(12)
    changed = clip.clone()
    changed[:, :, 14:] += 1.0
    before, after = (streamed(encoder, each, window=4, chunk=3)[0] for each in (clip, changed))
    assert torch.equal(before[:, : 7 * 4], after[:, : 7 * 4])
    assert (before - after)[:, 7 * 4 :].abs().amax(-1).min() > 1e-4


def test_a_tubelet_beyond_the_reach_has_no_influence() -> None:
    """The window itself does not bound the reach: each block adds W - 1 tubelets."""
    encoder, clip = encoder_with(window=2), clip_of(6)
    changed = clip.clone()
    changed[:, :, :2] += 1.0
    difference = (encoder([View(clip)])[0] - encoder([View(changed)])[0]).unflatten(1, (6, 4)).abs().amax((0, 2, 3))
    assert (difference[:4] > 1e-6).all()  # 3 blocks reach 3 tubelets back
    assert (difference[4:] == 0).all()


def test_hidden_tokens_do_not_move_the_window() -> None:
    """With masks a window counts tubelets of video and not visible tokens."""
    encoder, clip = encoder_with(window=2, encoder={"name": "custom", "width": 48, "depth": 1, "heads": 2}), clip_of(4)
    index = torch.tensor([[0, 1, 9, 12]])  # tubelets 0, 0, 2, 3
    changed = clip.clone()
    changed[:, :, :2] += 1.0
    before, after = (encoder([View(each, index)])[0] for each in (clip, changed))
    assert (before[0, :2] != after[0, :2]).any(-1).all()
    assert torch.equal(before[0, 2:], after[0, 2:])


def test_features_do_not_depend_on_the_time_since_the_start() -> None:
    """The same shot after a year of video gives the same features: angles do not lose precision."""
    encoder, clip = encoder_with(), clip_of(8)
    early, late = (EncoderStream(encoder, window=3) for _ in range(2))
    late.time = 3 * 10**8
    now, then = (torch.cat([stream(part) for part in clip.split(2, dim=2)], 1) for stream in (early, late))
    reach = 3 * 2  # before it, one stream begins and the other has empty slots in sight
    torch.testing.assert_close(now[:, reach:], then[:, reach:], rtol=0, atol=1e-5)


def test_a_stream_stops_and_goes_on() -> None:
    encoder, clip = encoder_with(class_token=True), clip_of(9)
    whole, _ = streamed(encoder, clip, window=3, chunk=1)
    first, second = EncoderStream(encoder, window=3), EncoderStream(encoder, window=3)
    for part in clip[:, :, :10].split(2, dim=2):
        first(part)
    second.load_state_dict(first.state_dict())
    rest = torch.cat([second(part) for part in clip[:, :, 10:].split(2, dim=2)], 1)
    assert torch.equal(rest.flatten(1, 2), whole[:, 20:])
    with pytest.raises(BadInput, match="Go on with the model and the window that began it"):
        EncoderStream(encoder, window=4).load_state_dict(first.state_dict())


def test_the_exported_step_equals_the_stream() -> None:
    for changes in ({}, {"class_token": True}):
        encoder = encoder_with(**changes)
        step, stream = StreamStep(encoder, window=3, px=16), EncoderStream(encoder, window=3)
        frames = torch.randint(
            0, 256, (2, 14, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
        )
        keys, values, time = step.empty(2)
        for part in frames.split(2, dim=1):
            features, keys, values, time = step(part, keys, values, time)
            expected = stream((part.movedim(-1, 1).float() / 255 - step.mean) / step.std)[:, 0]
            torch.testing.assert_close(features[:, -4:], expected, rtol=0, atol=1e-5)
            if stream.class_features is not None:
                torch.testing.assert_close(features[:, 0], stream.class_features[:, 0], rtol=0, atol=1e-5)
        assert time.item() == 7


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "its tokens attend to later tubelets as well; train with model.causal: true"),
        ({"rope": "tiled"}, r"its positions \(model.rope: tiled\) are not a rotation.*model.rope: interleaved"),
        ({"rope": "sincos"}, r"its positions \(model.rope: sincos\) are added to the tokens"),
    ],
)
def test_models_that_cannot_stream_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        EncoderStream(encoder_with(**changes), window=4)


# ---- the stream of a loaded model


def loaded() -> VideoEncoder:
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder_with().state_dict().items()}
    return VideoEncoder(Model.model_validate(FORM), InMemory(tensors), px=16, frames=8, fps=4.0, provenance={})


@pytest.mark.parametrize("name", ["vjepa2_causal_vitb16_224px_32f", "levjepa_vitb16_224px_16f"])
def test_shipped_causal_configs_can_stream(name: str) -> None:
    run = load(name).settings
    check_streamable(run.model)
    assert 2 * (run.model.window or 0) * run.model.tubelet_frames <= run.data.clip.frames  # the window is trained


def test_live_frames_give_features_as_each_tubelet_ends() -> None:
    model, seen = loaded(), []
    frames = torch.randint(0, 256, (7, 16, 16, 3), dtype=torch.uint8)

    def camera():
        for number, frame in enumerate(frames):
            seen.append(number)
            yield frame

    features, read = [], []
    for each in model.stream().follow(camera()):
        features.append(each)
        read.append(len(seen))
    assert read == [2, 4, 6]
    expected = model.stream()(frames[None, :6])[0]
    torch.testing.assert_close(torch.stack(features), expected, rtol=0, atol=1e-6)


def test_the_default_window_is_the_trained_clip() -> None:
    model = loaded()
    assert model.stream().window == 4
    assert model.stream(window=9).window == 9


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 3, 16, 16, 3), r"frames \(3\) must be a multiple of a token's \(2\)"),
        ((1, 2, 24, 16, 3), "began with 1 videos of 2 x 2 tokens and goes on with 1 of 3"),
        ((2, 2, 16, 16, 3), "Begin a new stream"),
    ],
)
def test_frames_of_another_form_are_refused(shape: tuple[int, ...], reason: str) -> None:
    stream = loaded().stream()
    stream(torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(BadInput, match=reason):
        stream(torch.zeros(shape, dtype=torch.uint8))


def test_memory_of_a_stream_does_not_grow() -> None:
    stream = EncoderStream(encoder_with(), window=4)
    sizes = set()
    for _ in range(40):
        stream(clip_of(1))
        assert stream._keys is not None
        sizes.add((stream._keys.data_ptr(), stream._keys.numel()))
    assert len(sizes) == 1
