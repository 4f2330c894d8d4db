"""The commands of the pages work, in the order of the page, on a small corpus and a small run."""

import json
from pathlib import Path

import pytest
import yaml
from pages import ROOT, run_page

from vjepa_data.synthetic.physics import write_corpus

pytestmark = pytest.mark.timeout(900)  # each command imports torch, which is slow on a busy machine

SMALL = {"vitl16_256px_16f": "small.yaml"}


@pytest.fixture
def folder(tmp_path: Path, tiny_corpus: Path) -> Path:
    """Return a working folder with the files that the pages assume: videos, shards and the settings of a small run."""
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


def test_the_commands_of_the_readme_work(folder: Path) -> None:
    write_corpus(folder / "videos", videos=6, seed=0, seconds=2)
    run_page(ROOT / "README.md", folder, smaller=SMALL | {"--nodes 16": "--nodes 1"})
    assert (folder / "corpora/mine/manifest.json").exists()
    assert (folder / "masks.png").exists()
    assert (folder / "model/config.json").exists()
    assert (folder / "features.parquet").exists()


def test_the_commands_of_the_training_page_work(folder: Path) -> None:
    run_page(ROOT / "docs/training.md", folder, smaller=SMALL | {"--nodes 2": "--nodes 1"})
    assert len((folder / "runs/mine/metrics.jsonl").read_text().splitlines()) == 4
    assert (folder / "runs/mine/report.html").exists()


def test_the_commands_of_the_methods_page_work(folder: Path) -> None:
    run_page(ROOT / "docs/objectives.md", folder, smaller=SMALL)
    assert (folder / "masks.png").exists()


def test_the_commands_of_the_architecture_page_work(folder: Path) -> None:
    run_page(ROOT / "docs/architecture.md", folder, smaller={"--videos 40": "--videos 6"})
    assert json.loads((folder / "runs/demo/shards/manifest.json").read_text())["splits"]
