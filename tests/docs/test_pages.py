"""The commands of the pages work, in the order of the page, on a small corpus and a small run."""

import json
from pathlib import Path

import pytest
from pages import ROOT, run_page

from vjepa_data.synthetic.physics import write_corpus

pytestmark = pytest.mark.timeout(900)  # each command imports torch, which is slow on a busy machine

SMALL = {"vitl16_256px_16f": "small.yaml"}


def test_the_commands_of_the_readme_work(page_folder: Path) -> None:
    write_corpus(page_folder / "videos", videos=6, seed=0, seconds=2)
    run_page(ROOT / "README.md", page_folder, smaller=SMALL | {"--nodes 16": "--nodes 1"})
    assert (page_folder / "corpora/mine/manifest.json").exists()
    assert (page_folder / "masks.png").exists()
    assert (page_folder / "model/config.json").exists()
    assert (page_folder / "features.parquet").exists()


def test_the_commands_of_the_training_page_work(page_folder: Path) -> None:
    run_page(ROOT / "docs/training.md", page_folder, smaller=SMALL | {"--nodes 2": "--nodes 1"})
    assert len((page_folder / "runs/mine/metrics.jsonl").read_text().splitlines()) == 4
    assert (page_folder / "runs/mine/report.html").exists()


def test_the_commands_of_the_methods_page_work(page_folder: Path) -> None:
    run_page(ROOT / "docs/objectives.md", page_folder, smaller=SMALL)
    assert (page_folder / "masks.png").exists()


def test_the_commands_of_the_architecture_page_work(page_folder: Path) -> None:
    run_page(ROOT / "docs/architecture.md", page_folder, smaller={"--videos 40": "--videos 6"})
    assert json.loads((page_folder / "runs/demo/shards/manifest.json").read_text())["splits"]


def test_the_commands_of_the_worlds_and_planning_pages_work(page_folder: Path) -> None:
    quick = "steps=2 batch_size=4 optim.warmup_steps=0 track.wandb=off"
    smaller = {"--videos 2000": "--videos 6"}
    smaller |= {f"vjepa train {name}": f"vjepa train {name} {quick}" for name in ("lewm_two_room", "dynamics_two_room")}
    run_page(ROOT / "docs/worlds.md", page_folder, smaller=smaller)
    assert (page_folder / "rollout.png").exists()
    assert len((page_folder / "runs/dynamics_two_room/metrics.jsonl").read_text().splitlines()) == 2
    few = "--budget 4 --samples 4 --elites 2 --iterations 1 --horizon 4 --data-episodes 2"
    smaller = {"--episodes 200": f"--episodes 2 {few}", "--episodes 100": f"--episodes 2 {few}"}
    run_page(ROOT / "docs/planning.md", page_folder, smaller=smaller)
    assert (page_folder / "plans/two_room/report.html").exists()


def test_the_commands_of_the_physics_page_work(page_folder: Path) -> None:
    quick = "steps=2 batch_size=4 optim.warmup_steps=0"
    smaller = {"--videos 112": "--videos 7", "--videos 448": "--videos 4", "train surprise": f"train surprise {quick}"}
    smaller |= {"--out surprise.json": "--out surprise.json --untrained 1 --slide 8"}
    smaller |= {"encode.short_side_px=48": "encode.short_side_px=48 split.val_share=0.5"}
    smaller |= {"--out objects.json": "--out objects.json --random-seeds 1"}
    run_page(ROOT / "docs/physics.md", page_folder, smaller=smaller)
    assert json.loads((page_folder / "surprise.json").read_text())["kind"] == "surprise"
    assert (page_folder / "surprise.html").exists()
    assert (page_folder / "objects.html").exists()
