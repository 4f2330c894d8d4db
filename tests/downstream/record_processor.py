"""Record the results of Hugging Face's video processor for `test_processor.py` (needs torchvision).

vjepa export RUN --out hf            for a model of 32 px
python tests/downstream/record_processor.py hf
"""

import json
import sys
from pathlib import Path

import numpy as np

SIZES = {"wide": (54, 97), "tall": (71, 40), "small": (20, 24), "square": (33, 33)}


def draw_clip(height: int, width: int) -> np.ndarray:
    """Two frames with fine and coarse structure: uint8 [2 H W 3]."""
    t, y, x, c = np.ogrid[:2, :height, :width, :3]
    return ((x * x * (3 + c) + y * (7 + 2 * t) + x * y * (1 + c) + 40 * t) // 5 % 256).astype(np.uint8)


def record(folder: Path) -> None:
    """Write `processor.npz` next to this file: the processor's settings, and its bytes for each clip."""
    import torch
    import torchvision  # pyright: ignore[reportMissingImports]
    import transformers

    processor = transformers.AutoVideoProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    found = {}
    for name, size in SIZES.items():
        pixels = processor(torch.from_numpy(draw_clip(*size)).permute(0, 3, 1, 2), return_tensors="pt")
        levels = (pixels["pixel_values_videos"][0] * std + mean) * 255  # [T C H W]
        assert (levels - levels.round()).abs().max() < 1e-3, "the processor's resize no longer gives bytes"
        found[name] = levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    about = {
        "settings": json.loads(processor.to_json_string()),
        "versions": {one.__name__: one.__version__ for one in (torch, torchvision, transformers)},
    }
    np.savez_compressed(Path(__file__).with_name("processor.npz"), about=np.array(json.dumps(about)), **found)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
