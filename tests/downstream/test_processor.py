"""Our preparation of clips equals Hugging Face's video processor, as recorded with torchvision."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from vjepa.nn.encoder import normalise
from vjepa.weights.huggingface import hf_processor
from vjepa_data.evaluation.clips import centre_view

RECORDED = Path(__file__).with_name("processor.npz")
RECIPE = runpy.run_path(str(Path(__file__).with_name("record_processor.py")))
SIZES, draw_clip = RECIPE["SIZES"], RECIPE["draw_clip"]


@pytest.mark.parametrize("name", SIZES)
def test_the_centre_view_equals_the_processors(name: str) -> None:
    ours = centre_view(torch.from_numpy(draw_clip(*SIZES[name])), 32).numpy().astype(int)
    difference = np.abs(ours - np.load(RECORDED)[name])
    assert difference.max() <= 1  # torch's resize may round the other way in another version
    assert (difference > 0).mean() < 0.01


def test_the_processor_reads_our_settings() -> None:
    recorded = json.loads(str(np.load(RECORDED)["about"]))["settings"]
    for name, value in hf_processor(32).items():
        found = recorded[name]
        if isinstance(found, dict):
            found = {key: number for key, number in found.items() if number is not None}
        assert found == pytest.approx(value) if name in ("image_mean", "image_std") else found == value, name


def test_our_normalisation_follows_the_settings() -> None:
    settings = hf_processor(32)
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    mean, std = (torch.tensor(settings[name]) for name in ("image_mean", "image_std"))
    wanted = (frames.double() * settings["rescale_factor"] - mean) / std
    torch.testing.assert_close(normalise(frames), wanted.movedim(-1, 1).float())


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_installed_processor_equals_ours(tmp_path: Path) -> None:
    from transformers import AutoVideoProcessor

    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(hf_processor(32)))
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    pixels = torch.from_numpy(draw_clip(*SIZES["tall"]))
    theirs = processor(pixels.permute(0, 3, 1, 2), return_tensors="pt")["pixel_values_videos"]
    assert (theirs - normalise(centre_view(pixels, 32)[None]).transpose(1, 2)).abs().max() < 0.02
