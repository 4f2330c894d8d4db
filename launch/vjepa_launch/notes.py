"""Remarks about a launch that surprise users later: variables of the shell, and a short time limit."""

import os

from vjepa_launch.request import limit_min
from vjepa_launch.settings import Cluster

SLURM_CLOCK_S = 60
"""Time by which SLURM may send the signal too early (sbatch(1), --signal)."""

SHORT_S = 300
"""A start that has less time than this before it is told to save is worth a note."""


def on_launch(cluster: Cluster) -> list[str]:
    """Return the remarks about a launch with a profile, a line each."""
    notes = on_ignored_variables() if cluster.executor == "slurm" else []
    if os.environ.get("PYTHONPATH") and "PYTHONPATH" not in cluster.environment:
        notes.append(
            f"PYTHONPATH of this shell ({os.environ['PYTHONPATH']}) comes after the frozen code; "
            '`environment: {PYTHONPATH: ""}` in the profile leaves it out'
        )
    limit_s = limit_min(cluster) * 60
    left_s = limit_s - cluster.notice_s - SLURM_CLOCK_S
    if cluster.executor == "slurm" and left_s < SHORT_S:
        notes.append(
            f"the time limit is {limit_s // 60} min; ranks are told to save {cluster.notice_s} s before it or up to "
            f"{SLURM_CLOCK_S} s earlier, so an attempt may have only {max(0, left_s)} s to start and train"
        )
    return notes


def on_ignored_variables() -> list[str]:
    """Return a line about variables of the shell that would change a submission by hand, if there are any."""
    ignored = sorted(name for name in os.environ if name.startswith(("SBATCH_", "SRUN_")))
    verb = "is" if len(ignored) == 1 else "are"
    return [f"{', '.join(ignored)} of this shell {verb} ignored; the profile decides"] if ignored else []
