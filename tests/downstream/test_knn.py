"""The vote of nearest neighbours, and the page of similar clips."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from vjepa.checkpoints.checkpoint import resolve
from vjepa.evals.knn import vote
from vjepa.evals.nearest import nearest_page
from vjepa.evals.publish import publish
from vjepa.evals.shell import run_evaluation
from vjepa_data.settings import BadInput


def test_near_clips_of_other_videos_vote() -> None:
    angles = np.array([0.0, 0.1, 0.2, 3.0, 3.1, 3.2])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    target = np.array([0, 0, 0, 1, 1, 1])
    assert vote(features, target, np.arange(6), 2).tolist() == target.tolist()
    # A class has two clips of a single video, so no other video votes for it.
    alone = np.array([0, 1, 1, 2, 2, 2])
    assert vote(features, np.array([0, 2, 2, 1, 1, 1]), alone, 1).tolist()[1:3] == [0, 0]


def test_the_result_has_its_prior_and_its_interval(trained: Path, scenes: Path, tmp_path: Path) -> None:
    run_evaluation("knn", trained, scenes, {"label": "shape", "neighbours": 5}, out=tmp_path / "knn.json")
    found = json.loads((tmp_path / "knn.json").read_text())
    assert found["prior"] == 0.5
    assert 0 <= found["interval"][0] < found["accuracy"] < found["interval"][1] <= 1
    assert found["protocol"]["clips"] == 24


def test_results_are_added_to_the_wandb_record_of_the_run(trained: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    result = run_evaluation("knn", run, scenes, {"label": "shape", "baselines": True})
    assert result.columns == ["pretrained", "random init", "pixels", "prior"]
    with pytest.raises(BadInput, match="not a run with a W&B record"):
        run_evaluation("knn", run, scenes, {"label": "shape"}, wandb=True)
    settings = json.loads((resolve(run) / "state.json").read_text())["settings"]
    settings["track"] |= {"wandb": "offline", "wandb_timeout_s": 120}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "wandb").mkdir()
    (run / "wandb" / "id").write_text("abcd1234\n")
    publish(result, resolve(run))
    (record,) = run.glob("wandb/offline-run-*-abcd1234/*.wandb")
    wanted, deadline = b"eval/knn/shape/accuracy/random_init", time.monotonic() + 30
    while wanted not in record.read_bytes():  # W&B's service writes in the background
        assert time.monotonic() < deadline, "not recorded in 30 s"
        time.sleep(0.1)


def test_a_video_of_the_corpus_is_nearest_to_itself(
    trained: Path, scenes: Path, write_scene: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    query = write_scene(tmp_path / "query.mp4", 20)
    found = nearest_page(trained, scenes, query, tmp_path / "near.html", count=4)
    assert (found[0].key, found[0].cosine) == ("scene-0020", pytest.approx(1, abs=1e-3))
    cosines = [clip.cosine for clip in found]
    assert cosines == sorted(cosines, reverse=True)
    text = (tmp_path / "near.html").read_text()
    assert text.count("<figure>") == 5
    assert "query.mp4" in text


def test_bad_input_is_named(trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(BadInput, match=r"text\.mp4: not_video"):
        nearest_page(trained, scenes, tmp_path / "text.mp4", tmp_path / "near.html")
    with pytest.raises(BadInput, match="no class label 'colour'"):
        run_evaluation("knn", trained, scenes, {"label": "colour"}, out=tmp_path / "knn.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.mp4"]
