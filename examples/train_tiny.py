"""Generate videos, shard them, pretrain a tiny model and encode a video with it, in seconds on one core.

python examples/train_tiny.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch

import vjepa
from vjepa.config import Run
from vjepa.engine.trainer import train
from vjepa_data.builder.shard import shard
from vjepa_data.spec import Spec
from vjepa_data.synthetic.physics import write_corpus

SPEC = Spec.model_validate({"name": "tiny", "encode": {"short_side_px": 64}})


def tiny_run(corpus: Path, *, steps: int = 50) -> Run:
    """Return the settings of a V-JEPA 2 run that fits any machine."""
    return Run.model_validate(
        {
            "name": "tiny",
            "steps": steps,
            "batch_size": 8,
            "precision": "fp32",
            "data": {"sources": [{"shards": str(corpus)}], "clip": {"frames": 4, "fps": 6}, "crop": {"px": 48}},
            "model": {
                "encoder": {"name": "custom", "width": 48, "depth": 2, "heads": 2},
                "predictor": {"width": 24, "depth": 1, "heads": 1},
                "patch_px": 8,
            },
            "optim": {"lr": 1e-3, "warmup_steps": 5},
            "loader": {"workers": 0},
            "track": {"wandb": "off"},
        }
    )


def main(folder: Path) -> torch.Tensor:
    """Go from raw videos to the features of a clip, [1 t h w D]."""
    write_corpus(folder / "videos", videos=24, seed=0)
    shard([str(folder / "videos")], folder / "shards", spec=SPEC, workers=1)
    train(tiny_run(folder / "shards"), folder / "run")  # the same line resumes a run that was killed
    model = vjepa.load(folder / "run")  # model.predict is the other half
    return model.encode(torch.zeros(1, 4, 48, 48, 3, dtype=torch.uint8))  # [B T H W C] in


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    print("features:", tuple(main(folder).shape))
