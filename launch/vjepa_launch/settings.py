"""Where a run happens: a profile per cluster. Not part of the run, and never imports torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class BadInput(ValueError):
    """Something a user can fix: what is wrong, what we got, what to do. The command line exits with 2."""


class Settings(BaseModel):
    """A frozen group of settings that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Restart(Settings):
    """What happens to a run whose processes failed. A run that stopped in good order is always requeued."""

    attempts: int = Field(default=3, ge=1)
    """Failed attempts in a row without a new checkpoint after which the run stops, and says so."""

    node_failures: int = Field(default=2, ge=1)
    """Failures that begin on one node before the node is excluded, as long as enough others remain."""

    stall_min: float = Field(default=60.0, gt=0)
    """Minutes without a new line in `metrics.jsonl` after which the processes are taken to hang: their stacks are
    written to the log, they are ended, and the attempt counts as failed. Must be longer than the start of a run
    (compilation included) and than the time between two records."""


class Cluster(Settings):
    """One cluster, or this machine: what a job asks for, and what its processes need to know."""

    executor: Literal["local", "slurm"]
    """`slurm` submits a batch job; `local` starts a supervisor in the background on this machine."""

    nodes: int = Field(default=1, ge=1)
    """Machines; the command line may say otherwise."""

    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs asked of each node. 0 asks for none; on this machine it leaves whatever is visible."""

    tasks_per_node: int | None = Field(default=None, ge=1)
    """Ranks on each node; by default one per GPU, and at least one."""

    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPU cores of each rank, its loader workers included; by default the cluster's."""

    memory_gib: int | None = Field(default=None, ge=0)
    """Memory of each node; 0 asks for all of it, and by default the cluster decides."""

    hours: float = Field(default=24.0, gt=0)
    """Time limit of a job. A run that needs longer is requeued as often as it takes. Ignored on this machine."""

    notice_s: int = Field(default=300, ge=10)
    """Seconds before the time limit at which the ranks are told to save: more than a step and two saves. SLURM looks
    at its clock every 30 s, and may tell them up to a minute early."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None

    constraint: str | None = None
    """Features that the nodes must have, in SLURM's syntax (`h100&ib`)."""

    exclude: tuple[str, ...] = ()
    """Nodes to stay away from."""

    sbatch: dict[str, str | int | bool] = {}
    """Any other option of sbatch: `{reservation: icml, switches: 1}`. `true` gives the option without a value."""

    srun: tuple[str, ...] = ()
    """Any other argument of srun (`--cpu-bind=none`)."""

    container_image: str | None = None
    """Image for pyxis (`--container-image`). `python` is then the one inside."""

    container_mounts: tuple[str, ...] = ()
    """Folders mounted in the container; the run folder's and the data's must be among them, under the same paths."""

    python: str | None = None
    """Interpreter on the nodes; by default the one that launches, which must lie on a shared disk."""

    environment: dict[str, str] = {}
    """Variables of every process, over our own (`NCCL_SOCKET_IFNAME`, `HF_HOME`)."""

    setup: tuple[str, ...] = ()
    """Shell lines before the processes start (`module load cuda/13.0`)."""

    restart: Restart = Restart()

    @property
    def ranks_per_node(self) -> int:
        """Tasks on one node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @model_validator(mode="after")
    def _fits(self) -> "Cluster":
        if self.executor == "local" and self.nodes > 1:
            raise ValueError(f"nodes ({self.nodes}) must be 1 on this machine; use executor: slurm, or torchrun")
        if self.container_mounts and not self.container_image:
            raise ValueError("container_mounts needs container_image")
        if self.notice_s >= self.hours * 3600:
            raise ValueError(f"notice_s ({self.notice_s}) must be shorter than hours ({self.hours})")
        return self
