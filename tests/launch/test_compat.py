"""The private parts of submitit. If a test here fails after an upgrade, adapt vjepa_launch/compat.py."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit
from submitit.local.local import LocalJob

from vjepa_launch import compat


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_a_batch_script_contains_parameters_and_command(tmp_path: Path) -> None:
    parameters = {"nodes": 2, "setup": ["echo before"], "teardown": ["echo after"], "srun_args": ["--cpu-bind=none"]}
    script = compat.batch_script(command="python -m trainer", folder=tmp_path, parameters=parameters)
    assert "#SBATCH --nodes=2" in script
    before, srun, after = (line for line in script.splitlines() if line and not line.startswith(("#", "export")))
    assert (before, after) == ("echo before", "echo after")
    assert srun.startswith("srun --")  # the shield replaces `srun`
    assert "--cpu-bind=none" in srun
    assert srun.endswith("python -m trainer")


@pytest.mark.parametrize("module", [compat.RANK_MODULE, compat.CONTROLLER_MODULE])
def test_the_modules_that_submitit_runs_exist(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, check=False)
    assert "No module named" not in done.stderr, f"submitit {submitit.__version__} has no {module}"


def test_a_local_job_is_a_controller_process_that_is_reaped(tmp_path: Path) -> None:
    executor = submitit.LocalExecutor(folder=tmp_path)
    executor.update_parameters(timeout_min=1)
    job = executor.submit(sleep, 0.5)
    assert isinstance(job, LocalJob)
    process = Path(f"/proc/{job.job_id}")
    deadline = time.monotonic() + 30
    while compat.CONTROLLER_MODULE.encode() not in (process / "cmdline").read_bytes():
        assert time.monotonic() < deadline, f"submitit {submitit.__version__} starts another controller"
        time.sleep(0.01)
    compat.reap_in_background(job)
    while process.exists():
        assert time.monotonic() < deadline, "the controller was not reaped"
        time.sleep(0.05)
