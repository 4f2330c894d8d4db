"""Settings of a cluster profile: where a run is executed. They are not part of the run. Never imports torch."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OURS: Mapping[str, str] = {
    "array": "a sweep file submits an array",
    "clusters": "squeue would look for the job on this cluster; launch on a login node of the other cluster",
    "error": "`vjepa runs logs` reads the output in the run folder",
    "output": "`vjepa runs logs` reads the output in the run folder",
    "parsable": "submitit reads the job id in sbatch's usual answer",
    "quiet": "submitit reads the job id in sbatch's usual answer",
    "test-only": "use `vjepa launch --dry-run`",
    "wait": "`vjepa runs logs RUN -f` waits for the end",
}
"""Options of sbatch that a profile cannot set, and why."""


class BadLaunch(ValueError):
    """An error that the user can fix (exit code 2). The message names the fault, the given value and the remedy."""


class LaunchSettings(BaseModel):
    """A frozen group of settings that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Restart(LaunchSettings):
    """When a run is restarted after an attempt that failed, or that saved and stopped."""

    attempts: int = Field(default=3, ge=1)
    """Consecutive failed attempts without a new checkpoint after which the run ends."""

    idle_attempts: int = Field(default=5, ge=1)
    """Consecutive attempts without a new checkpoint after which the run ends, also if the scheduler ended them. The run
    then takes longer to start, or to save, than the time that it gets."""

    node_failures: int = Field(default=2, ge=1)
    """Failures that begin on a node before it is excluded, as long as enough other nodes remain."""

    stall_min: float = Field(default=60.0, gt=0)
    """Minutes without a new line in `metrics.jsonl` after which a rank counts as stalled. It is aborted, the stacks of
    its threads are written to the log, and the attempt counts as failed. Must be longer than the start of a run
    (including compilation) and longer than the interval between two lines."""


class Cluster(LaunchSettings):
    """A profile of a cluster, or of this machine: the resources of a job, and the environment of its processes."""

    executor: Literal["local", "slurm"]
    """`slurm` submits a batch job, `local` starts a supervisor in the background on this machine."""

    nodes: int = Field(default=1, ge=1)
    """Number of machines. The command line can override it."""

    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs to request on each node. 0 requests none. On this machine it keeps the GPUs that are visible."""

    tasks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node. By default a rank per GPU, or one rank without GPUs."""

    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPU cores of each rank, including its loader workers. By default the cluster decides."""

    memory_gib: int | None = Field(default=None, ge=0)
    """Memory of each node. 0 requests all of it. By default the cluster decides."""

    hours: float = Field(default=24.0, gt=0)
    """Time limit of a job. A longer run is requeued as often as needed. Ignored on this machine."""

    notice_s: int = Field(default=300, ge=10)
    """Seconds before the time limit at which the ranks are told to save. Must be longer than a step and two saves.
    SLURM checks its clock every 30 s, and may send the signal up to a minute early."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None

    constraint: str | None = None
    """Features that the nodes must have, in SLURM's syntax (`h100&ib`)."""

    exclude: tuple[str, ...] = ()
    """Nodes to avoid."""

    sbatch: dict[str, str | int | bool] = {}
    """Further options of sbatch: `{reservation: icml, switches: 1}`. `true` gives the option without a value."""

    srun: tuple[str, ...] = ()
    """Further arguments of srun (`--cpu-bind=none`)."""

    container_image: str | None = None
    """Image for pyxis (`--container-image`), or for apptainer. `python` is then the interpreter inside the image."""

    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Program that runs the image: SLURM's plugin pyxis, or `apptainer exec`, which must be on the nodes' path."""

    container_mounts: tuple[str, ...] = ()
    """Folders to mount in the container under the same paths. They must include the run folder and the data."""

    python: str | None = None
    """Interpreter on the nodes. By default the interpreter that launches, which must lie on a shared disk."""

    environment: dict[str, str] = {}
    """Variables of every process. They override the defaults (`NCCL_SOCKET_IFNAME`, `HF_HOME`)."""

    setup: tuple[str, ...] = ()
    """Shell lines to run before the processes start (`module load cuda/13.0`)."""

    restart: Restart = Restart()

    @property
    def ranks_per_node(self) -> int:
        """Return the number of ranks on a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @model_validator(mode="after")
    def _check_consistency(self) -> "Cluster":
        if self.executor == "local" and self.nodes > 1:
            raise ValueError(f"nodes ({self.nodes}) must be 1 on this machine; use executor: slurm, or torchrun")
        if self.container_mounts and not self.container_image:
            raise ValueError("container_mounts requires container_image")
        refused = [name for name in self.sbatch if name.replace("_", "-") in OURS]
        if refused:
            raise ValueError(f"sbatch cannot set {refused[0]}: {OURS[refused[0].replace('_', '-')]}")
        if self.notice_s >= self.hours * 3600:
            raise ValueError(f"notice_s ({self.notice_s}) must be shorter than hours ({self.hours})")
        return self
