"""Where one process of a job stands: its rank, its node, and how to find rank 0."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import submitit


@dataclass(frozen=True)
class ProcessInfo:
    """Where a supervisor stands. On SLURM it has one rank to look after, on this machine all of them."""

    job: str
    """Job id; `22_0` for an element of an array."""
    restart: int
    """How often the job was requeued."""
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: str
    """Name of this node, as the scheduler knows it."""
    nodes: tuple[str, ...]
    slurm: bool

    @property
    def attempt(self) -> str:
        """A name for this start of the job."""
        return f"{self.job}.{self.restart}"

    @staticmethod
    def here() -> "ProcessInfo":
        """Read the place from the variables that submitit and SLURM set."""
        job = submitit.JobEnvironment()
        slurm = job.name() == "slurm"
        return ProcessInfo(
            job=job.job_id,
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0) if slurm else 0,
            rank=job.global_rank,
            world=job.num_tasks,
            local_rank=job.local_rank,
            local_world=max(1, job.num_tasks // job.num_nodes),
            node=os.environ.get("SLURMD_NODENAME") or job.hostname if slurm else job.hostname,
            nodes=tuple(job.hostnames),
            slurm=slurm,
        )


def address_of(node: str) -> str:
    """An address under which other nodes reach the first node of a job.

    Names of nodes need not resolve: SLURM has its own table. The scheduler is not asked, which a thousand ranks would
    do at once: the batch script runs on the first node, and srun tells its own address to every rank.
    """
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", node)
    return node


def common_environment(run: Path) -> dict[str, str]:
    """Variables of every process of a run, beside those that say which rank it is.

    What is here has a reason: one thread per process, since loader workers multiply; memory that can grow in place;
    a hang that ends with stacks and a record of collectives in place of silence; compiled kernels that outlive a
    restart; a crash in native code that leaves a Python stack.
    """
    return {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_FR_DUMP_TEMP_FILE": str(run / "launch" / "collectives_"),
        "TORCHINDUCTOR_CACHE_DIR": str(run / "launch" / "inductor"),
        "NCCL_DEBUG": "WARN",
    }


def path_environment(code: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables that put the frozen code before anything else, the working folder included."""
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), inherited.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
    }


def rank_environment(place: ProcessInfo, rank: int, address: str, port: int) -> dict[str, str]:
    """Variables that torch.distributed reads, for one rank on this node."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(rank if not place.slurm else place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
