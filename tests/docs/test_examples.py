"""Every file in examples/ runs, in the order in which a reader would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT
from tiny_model import write_model

EXAMPLES = ROOT / "examples"

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("examples")]


def run_example(name: str, *words: object) -> str:
    """Run an example as a program of its own and return its output."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `train_tiny.py` leaves: videos, shards and a trained run."""
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    assert "features: (1, 2, 6, 6, 48)" in run_example("train_tiny.py", folder)
    return folder


def test_train_tiny_stays_under_60_lines(tiny: Path) -> None:
    assert (tiny / "run/checkpoints/latest").exists()
    assert len((EXAMPLES / "train_tiny.py").read_text().splitlines()) < 60


def test_use_loader_resumes_and_splits_exactly(tiny: Path) -> None:
    assert "equal after a restart, and on two ranks" in run_example("use_loader.py", tiny / "shards")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs(tiny: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "probe_features.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tiny.parent)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "accuracy" in printed


def test_a_custom_method_trains_and_loads(tiny: Path) -> None:
    assert "features: (1, 2, 6, 6, 48)" in run_example("custom_method.py", tiny / "shards", tiny.parent / "colour")


def test_a_model_plans_in_two_rooms(tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    printed = run_example("plan_two_room.py", write_model(tmp_path / "model"), film, 1)
    assert f"of 1 goals; {film} shows them" in printed
    assert film.stat().st_size > 1000
    assert len((EXAMPLES / "plan_two_room.py").read_text().splitlines()) < 60


def test_a_custom_evaluation_writes_a_result(tiny: Path) -> None:
    out = tiny.parent / "retrieval.json"
    assert "random init: " in run_example("custom_evaluation.py", tiny / "run", tiny / "shards", out)
    assert [row["features"] for row in json.loads(out.read_text())["rows"]] == ["pretrained", "random init", "pixels"]
