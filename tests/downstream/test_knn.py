"""Neighbours in feature space: who votes, and who is shown."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from vjepa.checkpoints.checkpoint import resolve
from vjepa.evals.knn import knn, nearest_page, vote
from vjepa.evals.publish import publish
from vjepa_data.settings import BadInput


def test_near_clips_of_other_videos_decide() -> None:
    angles = np.array([0.0, 0.1, 0.2, 3.0, 3.1, 3.2])
    features = np.stack([np.cos(angles), np.sin(angles)], 1)
    target = np.array([0, 0, 0, 1, 1, 1])
    assert vote(features, target, np.arange(6), 2).tolist() == target.tolist()
    # Two clips of one video, alone with their class: no other video can speak for them.
    alone = np.array([0, 1, 1, 2, 2, 2])
    assert vote(features, np.array([0, 2, 2, 1, 1, 1]), alone, 1).tolist()[1:3] == [0, 0]


def test_the_result_has_its_prior_and_its_interval(trained: Path, scenes: Path, tmp_path: Path) -> None:
    found = knn(trained, scenes, label="shape", out=tmp_path / "knn.json", neighbours=5)
    assert found == json.loads((tmp_path / "knn.json").read_text())
    assert found["prior"] == 0.5
    assert 0 <= found["interval"][0] < found["accuracy"] < found["interval"][1] <= 1
    assert found["protocol"]["clips"] == 24


def test_results_go_to_the_record_of_the_run(trained: Path, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    found = knn(run, scenes, label="shape", out=tmp_path / "knn.json", baselines=True)
    assert [row["features"] for row in found["rows"]] == ["pretrained", "random init", "pixels", "prior"]
    with pytest.raises(BadInput, match="no run with a record at W&B"):
        publish(found, run)
    settings = json.loads((resolve(run) / "state.json").read_text())["settings"]
    settings["track"]["wandb"] = "offline"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "wandb").mkdir()
    (run / "wandb" / "id").write_text("abcd1234\n")
    publish(found, resolve(run))
    (record,) = run.glob("wandb/offline-run-*-abcd1234/*.wandb")
    wanted, deadline = b"eval/knn/shape/accuracy/random_init", time.monotonic() + 30
    while wanted not in record.read_bytes():  # W&B's service writes when it likes
        assert time.monotonic() < deadline, "not recorded in 30 s"
        time.sleep(0.1)


def test_a_video_of_the_corpus_is_nearest_to_itself(
    trained: Path, scenes: Path, write_scene: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    query = write_scene(tmp_path / "query.mp4", 20)
    found = nearest_page(trained, scenes, query, tmp_path / "near.html", count=4)
    assert found[0] == ("scene-0020", pytest.approx(1, abs=1e-3))
    likeness = [value for _, value in found]
    assert likeness == sorted(likeness, reverse=True)
    text = (tmp_path / "near.html").read_text()
    assert text.count("<figure>") == 5
    assert "query.mp4" in text


def test_bad_input_is_named(trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(BadInput, match=r"text\.mp4: not_video"):
        nearest_page(trained, scenes, tmp_path / "text.mp4", tmp_path / "near.html")
    with pytest.raises(BadInput, match="no label 'colour'"):
        knn(trained, scenes, label="colour", out=tmp_path / "knn.json")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["text.mp4"]
