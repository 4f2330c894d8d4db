"""A shard build as an array on a real SLURM."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from vjepa.cli import main
from vjepa_data.builder.shard import shard
from vjepa_data.config_files import load_settings
from vjepa_data.corpus.format import read_manifest
from vjepa_data.spec import Spec
from vjepa_data.synthetic.physics import write_corpus
from vjepa_launch import status
from vjepa_launch.drill.drill_run import DrillRun

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]


def test_the_same_command_finishes_an_array_that_lost_a_task(
    slurm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, corpus, profile = tmp_path / "videos", tmp_path / "corpus", tmp_path / "profile.yaml"
    write_corpus(videos, videos=24, seed=0)
    profile.write_text(yaml.safe_dump({"executor": "slurm", "nodes": 2, "cpus_per_task": 1, "hours": 1}))
    settings = ["name=tiny", "shard_samples=4"]
    command = ["shard", str(videos), "--out", str(corpus), "--on", str(profile), *settings]

    assert main([*command, "--dry-run"]) == 0
    assert "#SBATCH --array=0-1%2" in capsys.readouterr().out
    assert not corpus.exists()

    assert main(command) == 0
    lost, finished = tasks = [DrillRun.of(tmp_path / "corpus.jobs" / f"task-0000{number}") for number in range(2)]
    lost.wait_for((corpus / "status" / "task-00000-of-00002.json").exists, 300)
    lost.cancel()
    for task in tasks:
        task.wait(300)
    assert (lost.outcomes(), finished.outcomes()) == (["cancelled"], ["done"]), lost.log()

    assert main(command) == 0
    assert DrillRun.of(lost.folder).wait(300)["outcome"] == "done"
    assert main(["shard", "--status", "--out", str(corpus)]) == 0
    assert "task 0 of 2" in capsys.readouterr().out
    assert main(command) == 2  # nothing left to launch
    statuses, _ = status.read_all(status.find_runs(tmp_path / "corpus.jobs"))
    assert [(run.name, run.state, run.attempts) for run in statuses] == [
        ("task-00000", "done", 2),
        ("task-00001", "done", 1),
    ]

    spec = load_settings(Spec, None, settings).settings
    single = shard([str(videos)], tmp_path / "single", spec=spec, workers=len(os.sched_getaffinity(0)))
    assert read_manifest(corpus).hash == single.hash
