"""A working folder with the files that the pages assume."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def page_folder(tmp_path: Path, tiny_corpus: Path) -> Path:
    """Return a folder with `small.yaml`, the settings of a run that trains in seconds."""
    settings = {
        "name": "small",
        "steps": 4,
        "batch_size": 8,
        "precision": "fp32",
        "data": {"sources": [{"shards": str(tiny_corpus)}], "clip": {"frames": 4, "fps": 4}, "crop": {"px": 32}},
        "model": {
            "encoder": {"name": "custom", "width": 24, "depth": 2, "heads": 2},
            "predictor": {"width": 12, "depth": 1, "heads": 1},
            "patch_px": 8,
        },
        "optim": {"lr": 1e-3},
        "loader": {"workers": 0, "decoder": "pyav"},
        "track": {"wandb": "off", "every_steps": 2},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path
