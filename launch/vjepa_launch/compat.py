"""Private parts of submitit that this package uses. tests/launch/test_compat.py fails when an upgrade changes them.

submitit has no public way to render a batch script without submitting it, to launch a rank from a custom command line,
or to wait for the controller of a local job.
"""

import threading
from pathlib import Path
from typing import Any

from submitit.local.local import LocalJob
from submitit.slurm.slurm import _make_sbatch_string

RANK_MODULE = "submitit.core._submit"
"""`python -m RANK_MODULE FOLDER` unpickles the job in FOLDER and calls it."""

CONTROLLER_MODULE = "submitit.local._local"
"""`python -m CONTROLLER_MODULE FOLDER` is the process of a local job. It starts the supervisor as its child."""


def batch_script(*, command: str, folder: Path, parameters: dict[str, Any]) -> str:
    """Return the batch script that `SlurmExecutor` would submit for `command` with these parameters."""
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def reap_in_background(job: LocalJob[Any]) -> None:
    """Wait for the controller of a local job in a thread, so that it does not remain a zombie."""
    assert job._process is not None
    threading.Thread(target=job._process.wait, daemon=True).start()
