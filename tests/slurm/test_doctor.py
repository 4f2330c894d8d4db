"""The doctor on every node of a real SLURM."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vjepa.cli import main

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]


def test_the_doctor_lists_the_node_that_differs(
    slurm: Any, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = slurm.nodes[1]
    python, profile = tmp_path / "python", tmp_path / "profile.yaml"
    python.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" = {odd} ] && ulimit -Sn 512\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = {"executor": "slurm", "nodes": 2, "tasks_per_node": 2, "cpus_per_task": 1, "hours": 1}
    profile.write_text(yaml.safe_dump({**settings, "python": str(python)}))
    shards = f"data.sources.0.shards={tiny_corpus}"
    code = main(["doctor", "demo", shards, "data.clip.fps=4", "--folder", str(tmp_path / "runs"), "--on", str(profile)])
    output = capsys.readouterr().out
    assert code == 0, output
    # Version, limit, exchange within and between nodes, corpus: one line each, and one for the node that differs.
    for line in (
        rf"ok +python +2 nodes: {sys.version_info[0]}\.{sys.version_info[1]}",
        r"ok +open files +1 node: ",
        rf"note +open files +{odd}: 512 ",
        r"ok +exchange here +\d nodes?: .* GB/s",
        r"ok +exchange of all ranks +\d nodes?: .* GB/s",
        r"ok +shards 0 +\d nodes?: .* MiB/s read",
        r"ok +clips +\d nodes?: .* clips/s for each core",
    ):
        assert re.search(f"^{line}", output, re.MULTILINE), f"{line}\n{output}"
