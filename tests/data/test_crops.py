import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vjepa_data.reader.crops import CropBox, choose, cut_out
from vjepa_data.settings import Crop


@given(st.integers(8, 700), st.integers(8, 700), st.integers(0, 10_000))
def test_a_box_lies_inside_the_picture(height: int, width: int, slot: int):
    box = choose(Crop(), height=height, width=width, seed=0, step=0, slot=slot)
    assert 0 <= box.top <= box.top + box.height <= height
    assert 0 <= box.left <= box.left + box.width <= width
    assert box.height > 0
    assert box.width > 0


def test_boxes_follow_the_settings():
    """Areas, aspects and flips have the distributions that the settings state."""
    crop = Crop(scale=(0.3, 1.0), aspect=(0.75, 1.35), flip=0.5)
    boxes = [choose(crop, height=1000, width=1000, seed=0, step=0, slot=s) for s in range(4000)]
    areas = np.array([b.height * b.width for b in boxes]) / 1e6
    aspects = np.array([b.width / b.height for b in boxes])
    assert 0.299 < areas.min() < 0.31
    assert areas.max() > 0.95
    assert 0.747 < aspects.min() < 0.76
    assert 1.34 < aspects.max() < 1.353
    assert abs(np.mean([b.flip for b in boxes]) - 0.5) < 0.03
    assert abs(np.mean([b.left / (1001 - b.width) for b in boxes]) - 0.5) < 0.03


def test_a_crop_is_a_function_of_seed_step_and_slot():
    draw = lambda **k: choose(Crop(), height=256, width=340, **{"seed": 0, "step": 0, "slot": 0, **k})  # noqa: E731
    assert draw() == draw()
    assert len({draw(), draw(seed=1), draw(step=1), draw(slot=1), draw(attempt=1)}) == 5


def test_a_frame_that_no_box_fits_is_cropped_at_its_centre():
    assert choose(Crop(scale=(1, 1)), height=10, width=100, seed=0, step=0, slot=0).width == 14


@pytest.mark.parametrize(
    "box", [CropBox(3, 5, 40, 50, False), CropBox(0, 0, 64, 96, True), CropBox(20, 30, 32, 32, False)]
)
def test_resizing_agrees_with_pillow_to_one_level(box: CropBox):
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    got = cut_out(frames, box, 32)
    for frame, mine in zip(frames, got, strict=True):
        part = frame[box.top : box.top + box.height, box.left : box.left + box.width]
        want = np.asarray(Image.fromarray(part).resize((32, 32), Image.Resampling.BILINEAR), dtype=np.int16)
        want = want[:, ::-1] if box.flip else want
        assert np.abs(mine.numpy().astype(np.int16) - want).max() <= 1


def test_sixteen_frames_take_less_than_five_milliseconds():
    frames = np.random.default_rng(0).integers(0, 256, (16, 256, 340, 3), dtype=np.uint8)
    out = torch.empty(16, 256, 256, 3, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for slot in range(30):
        box = choose(Crop(), height=256, width=340, seed=0, step=0, slot=slot)
        began = time.process_time()
        out.copy_(cut_out(frames, box, 256))
        seconds.append(time.process_time() - began)
    torch.set_num_threads(threads)
    assert sorted(seconds)[15] < 0.010  # 1.8 ms measured; twice the promise, for a machine that is shared
