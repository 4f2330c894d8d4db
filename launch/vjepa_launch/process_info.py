"""The rank, node, environment variables and state of a process of a job."""

import hashlib
import os
import signal
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import submitit


@dataclass(frozen=True)
class ProcessInfo:
    """The position of a supervisor in its job. On SLURM it supervises one rank, on a single machine all ranks."""

    job: str
    """Job id, such as `22_0` for an element of an array."""
    restart: int
    """Number of times that the job was requeued."""
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: str
    """Name of this node in the scheduler."""
    nodes: tuple[str, ...]
    slurm: bool

    @property
    def attempt(self) -> str:
        """Name of this start of the job."""
        return f"{self.job}.{self.restart}"

    @staticmethod
    def from_environment() -> "ProcessInfo":
        """Read the variables that submitit and SLURM set."""
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


def process_state(pid: int) -> str:
    """Return the state letter of /proc/PID/stat (R running, S sleeping, T suspended, Z zombie), or "" if none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def ignores_usr2(pid: int) -> bool:
    """Return whether a process ignores SIGUSR2, as ranks do until they have a handler."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:")), 0)
    return bool(mask >> (signal.SIGUSR2 - 1) & 1)


def reachable_address(first_node: str) -> str:
    """Return an address of the job's first node that other nodes can connect to.

    Node names need not resolve, because SLURM has its own table. srun gives its own address to every rank, and it runs
    on the first node. So a thousand ranks need not query the scheduler at once.
    """
    try:
        socket.getaddrinfo(first_node, None)
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", first_node)
    return first_node


def common_environment(run: Path, *, cores: int | None = None) -> dict[str, str]:
    """Return the variables that all ranks of a run share.

    Args:
        run: the run folder.
        cores: CPU cores of a rank, if known.

    They give a single thread per process (loader workers multiply), GPU memory segments that can grow, stacks and a
    record of collectives when NCCL times out, compiled kernels that survive a restart on the same node, and a Python
    stack for crashes in native code. Compiled kernels are kept on the disk of each node: in the run folder, every rank
    would write some hundred small files to the shared disk.
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
        "TORCHINDUCTOR_CACHE_DIR": str(node_cache(run) / "inductor"),
        "NCCL_DEBUG": "WARN",
        # By default each rank starts 32 processes that compile.
        **({"TORCHINDUCTOR_COMPILE_THREADS": str(cores)} if cores else {}),
    }


def node_cache(run: Path) -> Path:
    """Return the folder of a run on the disk of a node, the same for each attempt of the same user."""
    name = hashlib.blake2b(os.fsencode(run), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"vjepa-{os.getuid()}" / name


def code_environment(code: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that put the frozen code first on the path, before the working folder.

    The trainer compares `VJEPA_CODE` with the code that it runs.
    """
    rest = [entry for entry in inherited.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", str(code))]
    return {
        "PYTHONPATH": os.pathsep.join([str(code), *rest]),
        "PYTHONSAFEPATH": "1",
        "VJEPA_CODE": str(code),
    }


def rank_environment(info: ProcessInfo, rank: int, address: str, port: int) -> dict[str, str]:
    """Return the variables that torch.distributed reads, for a rank on this node."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(info.world),
        "LOCAL_RANK": str(info.local_rank if info.slurm else rank),
        "LOCAL_WORLD_SIZE": str(info.local_world),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
