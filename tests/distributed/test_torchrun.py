"""`vjepa train` as people start it: several processes by torchrun, of which one prints."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vjepa.config import Run
from vjepa_data.config_files import dump_settings

MakeRun = Callable[..., Run]


def test_two_ranks_print_once(tiny_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "unwanted").write_text("tiny-003\n")
    source = {"shards": str(tiny_run().data.sources[0].shards), "without": str(tmp_path / "unwanted")}
    run = tiny_run(steps=4, data={"sources": [source]}, loader={"workers": 1, "start_method": "spawn"})
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_settings(run))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*torchrun, "-m", "vjepa", "train", str(config), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line.partition(" ")[2] for line in (done.stdout + done.stderr).splitlines() if "vjepa" in line]
    for once in ("step 4/4", "1 of 20 samples are left out"):
        assert len([line for line in said if once in line]) == 1, once
    assert len(said) == len(set(said)), said
