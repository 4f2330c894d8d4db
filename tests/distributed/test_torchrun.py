"""`vjepa train` as people start it: several processes by torchrun, that speak with one voice."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from vjepa.config import Run
from vjepa_data.settings_files import dump_settings

MakeRun = Callable[..., Run]


def test_two_ranks_print_once(tiny_run: MakeRun, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_settings(tiny_run(steps=4)))
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
    assert len([line for line in said if "step 4/4" in line]) == 1
    assert len(said) == len(set(said)), said
