from pathlib import Path

import numpy as np
import pytest
import torch

from vjepa_data.reader.batch import Batch
from vjepa_data.reader.crops import CropBox, _resize, _resize_by_floats, cut_out
from vjepa_data.reader.device_prefetch import ahead
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Clip, Crop, Data, Loader, Source

CPU = torch.device("cpu")


def batches(corpus: Path, loader: Loader, *, device: torch.device = CPU, steps: int = 4) -> list[Batch]:
    sources = (Source(shards=str(corpus)), Source(shards=str(corpus), frames=7, fps=6))
    data = Data(sources=sources, clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    with ClipLoader(data, loader, seed=5, batch_size=8) as clips:
        return [batch for batch, _ in zip(ahead(clips, device), range(steps), strict=False)]


@pytest.mark.parametrize("workers", [0, 1])
def test_device_and_workers_scale_to_the_same_clips(corpus: Path, workers: int):
    here = batches(corpus, Loader(workers=workers))
    there = batches(corpus, Loader(workers=workers, crop_on="device"))
    for a, b in zip(here, there, strict=True):
        assert (a.step, len(a), len(a.groups)) == (b.step, len(b), len(b.groups)) == (a.step, 8, 2)
        for x, y in zip(a.groups, b.groups, strict=True):
            assert (x.slots, x.keys, x.sources, x.start_s) == (y.slots, y.keys, y.sources, y.start_s)
            assert torch.equal(x.frames, y.frames)


def test_uncropped_clips_hold_only_the_pixels_of_their_boxes(corpus: Path):
    """Until the device has scaled them, a batch cannot be split either."""
    data = Data(sources=(Source(shards=str(corpus)),), clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    with ClipLoader(data, Loader(workers=0, crop_on="device"), seed=5, batch_size=8) as clips:
        batch = next(clips)
    (group,) = batch.uncropped
    assert len(batch) == len(group) == 8
    assert group.pixels.numel() == sum(4 * box.height * box.width * 3 for box in group.boxes)
    assert len({(box.height, box.width) for box in group.boxes}) > 1
    with pytest.raises(AssertionError, match="before `split`"):
        batch.split(2)


@pytest.mark.parametrize("size", [(40, 50), (17, 90), (20, 21)])
def test_float_and_uint8_scaling_agree_to_one_level(size: tuple[int, int]):
    pictures = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    difference = (_resize(pictures, 32).int() - _resize_by_floats(pictures, 32).int()).abs()
    assert difference.max() <= 1
    signed = _resize(pictures, 32).float() - _resize_by_floats(pictures, 32).float()
    assert signed.mean().abs() < 0.1  # that of uint8 rounds twice


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("crop_on", ["cpu", "device"])
def test_clips_on_a_gpu_agree_to_one_level(corpus: Path, crop_on: str):
    there = batches(corpus, Loader(workers=1, crop_on=crop_on), device=torch.device("cuda", 0))  # pyright: ignore[reportArgumentType]
    for a, b in zip(batches(corpus, Loader(workers=0)), there, strict=True):
        for x, y in zip(a.groups, b.groups, strict=True):
            assert y.frames.is_cuda
            assert (x.frames.int() - y.frames.cpu().int()).abs().max() <= 1


def test_cutting_may_omit_or_repeat_frames():
    frames = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    box, rows = CropBox(2, 3, 8, 8, True), np.array([0, 2, 2, 4])
    assert np.array_equal(cut_out(frames, box, 8, rows=rows).numpy(), frames[rows, 2:10, 3:11][:, :, ::-1])
