"""Choose the number of CPU threads that torch and numpy use. Runs before either is imported.

Both count the processors of the machine. In a container with a CPU quota, or with other work running, that is too many
threads, and a waiting thread spins on its core for milliseconds before it sleeps: `vjepa eval probe` then burns several
times the CPU time that it needs (benchmarks/README.md has the numbers).
"""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")

SLEEP_WHILE_WAITING = {
    "OMP_WAIT_POLICY": "PASSIVE",  # OpenMP
    "GOMP_SPINCOUNT": "0",  # GNU's OpenMP, which torch ships
    "KMP_BLOCKTIME": "0",  # Intel's OpenMP, which MKL may load
    "OPENBLAS_THREAD_TIMEOUT": "4",  # numpy's BLAS: 2**4 cycles, its minimum
}
"""Environment variables that let a waiting thread sleep at once, for each thread pool that we may load."""


def configure_threads() -> None:
    """Set the number of threads through the environment, unless the user has set OMP_NUM_THREADS.

    Child processes inherit the choice. Ranks that `torchrun` or `vjepa launch` starts get OMP_NUM_THREADS=1 from them.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    os.environ["OMP_NUM_THREADS"] = str(available_cores())
    for name, value in SLEEP_WHILE_WAITING.items():
        os.environ.setdefault(name, value)


def available_cores() -> int:
    """Count the physical cores that this process may use, at least 1: its CPU affinity, limited by its cgroup's quota.

    Two hyperthreads of a core count once, as in torch: they share the arithmetic units.
    """
    cpus = os.sched_getaffinity(0)
    cores = len({_siblings(cpu) for cpu in cpus})
    return max(1, min(cores, math.ceil(cpu_quota() or cores)))


def cpu_quota(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPUs that the cgroup of this process may use at a time, or None without a limit.

    Args:
        root: mount point of the cgroup file systems, version 1 or 2.
        own: file that names the cgroup of this process in each hierarchy.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max), and scheduler/sched-bwc.html for version 1.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        inside = top / path.lstrip("/")
        # The limit of a parent holds too. In a container `top` may itself be the cgroup that `path` names.
        quotas += [_quota(level) for level in (inside, *inside.parents) if level.is_relative_to(top)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _siblings(cpu: int) -> str:
    """Return the hyperthreads of a CPU's core, as the kernel lists them, or the CPU's own number if it does not."""
    try:
        return (TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
