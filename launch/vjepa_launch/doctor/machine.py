"""Check whether a run would work on this machine, for `vjepa doctor`. Never imports torch in this process."""

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from vjepa_launch import slurm, tables

Level = Literal["ok", "note", "bad"]

PACKAGES = ("torch", "xformers", "decord", "webdataset", "submitit", "wandb", "pyarrow")
SHARED_MEMORY_GIB = 1.0
"""Loader workers pass batches through shared memory. Containers often have only 64 MiB."""
OPEN_FILES = 4096
CLOCK_S = 2.0
DISK_MIB = 64
DISK_MIB_PER_S = 20.0
"""Below this, a checkpoint of a ViT-L (5 GB with its optimizer state) takes more than four minutes."""

# Runs in a separate process, because it may crash, hang, or keep GPU memory.
TORCH = """
import time, torch
print(torch.__version__, torch.version.cuda or "no CUDA", torch.cuda.device_count(), sep="|")
for index in range(torch.cuda.device_count()):
    torch.cuda.set_device(index)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    tflops = 20 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12
    print(torch.cuda.get_device_name(index), f"{tflops:.0f}", sep="|")
"""
TORCH_TIMEOUT_S = 300.0
SLOWER_THAN_THE_BEST = 0.9
"""A GPU below this share of the fastest GPU of its node slows down all ranks."""


@dataclass(frozen=True)
class Measure:
    """A measured quantity to compare between nodes. More is better."""

    value: float
    unit: str
    least: float = 0.5
    """A node below this share of the median is an outlier."""
    outlier: Level = "note"
    """Level of an outlier: `bad` if it slows down all ranks."""


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    subject: str
    level: Level
    result: str
    measure: Measure | None = None


Check = Callable[[], list[Finding]]


def examine(folder: Path, more: Sequence[Check] = ()) -> list[Finding]:
    """Run all checks, in the order of the table.

    Args:
        folder: the folder of run folders. A file is written there and removed again.
        more: further checks, since this package knows neither torch nor data.
    """
    checks: Sequence[Check] = (
        _check_versions,
        _check_torch,
        _check_shared_memory,
        _check_cores,
        _check_open_files,
        lambda: _check_disk(folder),
        _check_scheduler,
        _check_wandb,
        *more,
    )
    return [finding for check in checks for finding in check()]


def table(findings: Sequence[Finding]) -> str:
    """Return findings as text, a line each."""
    return tables.render((f"{finding.level:4}", finding.subject, finding.result) for finding in findings)


def _check_versions() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    findings = [Finding("python", "ok" if sys.version_info >= (3, 11) else "bad", version)]
    for name in PACKAGES:
        try:
            findings.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "bad", "not installed; install vjepa-pretrain with its dependencies"))
    return findings


def _check_torch() -> list[Finding]:
    command = [sys.executable, "-c", TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        text = f"no answer within {TORCH_TIMEOUT_S:.0f} s; check the GPUs with nvidia-smi"
        return [Finding("torch runs", "bad", text)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding("torch runs", "bad", last)]
    first, *rows = [line.split("|") for line in done.stdout.splitlines()]
    return [Finding("torch runs", "ok", f"{first[0]}, CUDA {first[1]}"), *_gpu_findings(rows)]


def _gpu_findings(rows: Sequence[Sequence[str]]) -> list[Finding]:
    """Return a finding for each GPU, from its name and TFLOP/s, and a note if torch does not see all GPUs."""
    installed = _count_devices()
    if not rows:
        if not installed:
            return [Finding("GPUs", "note", "none")]
        text = f"{installed} installed, but torch sees none; its build does not match the driver"
        return [Finding("GPUs", "bad", text)]
    best = max(float(tflops) for _, tflops in rows)
    findings = []
    for index, (name, tflops) in enumerate(rows):
        slow = float(tflops) < SLOWER_THAN_THE_BEST * best
        text = f"{name}, {tflops} TFLOP/s bf16" + (f"; the fastest on this machine reaches {best:.0f}" if slow else "")
        measure = Measure(float(tflops), "TFLOP/s", SLOWER_THAN_THE_BEST, "bad")
        findings.append(Finding(f"GPU {index}", "bad" if slow else "ok", text, measure))
    if installed > len(rows):
        findings.append(Finding("GPUs", "note", f"{installed} installed, {len(rows)} visible"))
    return findings


def _count_devices() -> int:
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def _check_shared_memory() -> list[Finding]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return [Finding("shared memory", "bad", "/dev/shm is missing; loader workers pass batches through it")]
    gib = shutil.disk_usage(shared).free / 2**30
    text = f"{gib:.1f} GiB free" + ("" if gib >= SHARED_MEMORY_GIB else "; start the container with --shm-size=16g")
    return [Finding("shared memory", "ok" if gib >= SHARED_MEMORY_GIB else "bad", text, Measure(gib, "GiB free"))]


def _check_cores() -> list[Finding]:
    """Compare the cores that this process may use with the cores that its job asked for (`cpus_per_task`)."""
    cores, asked = len(os.sched_getaffinity(0)), int(os.environ.get("SRUN_CPUS_PER_TASK") or 0)
    if cores < asked:
        text = f"{cores} of the {asked} that cpus_per_task asks for; see TaskPlugin, and `srun: [--cpu-bind=none]`"
        return [Finding("cores", "bad", text)]
    return [Finding("cores", "ok", f"{cores} for this process" + (f", {asked} asked for" if asked else ""))]


def _check_open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    text = f"{soft} (at most {hard})" + ("" if enough else f"; add `ulimit -n {OPEN_FILES}` to the profile's setup")
    return [Finding("open files", "ok" if enough else "note", text)]


def _check_disk(folder: Path) -> list[Finding]:
    """Measure the write speed of the disk of the runs, and compare its clock with the clock of this machine."""
    probe = folder / f".doctor.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(DISK_MIB):
                file.write(os.urandom(2**20))
            file.flush()
            os.fsync(file.fileno())
        speed = DISK_MIB / (time.perf_counter() - start)
        skew_s = abs(probe.stat().st_mtime - time.time())
    except OSError as error:
        return [Finding("disk", "bad", f"cannot write to {folder} ({error.strerror})")]
    finally:
        if probe.exists():
            probe.unlink()
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{speed:.0f} MiB/s written to {folder.resolve()}, {free:.0f} GiB free"
    clock = f"differs by {skew_s:.1f} s from the disk's" + ("" if skew_s < CLOCK_S else "; ages of runs will be wrong")
    return [
        Finding("disk", "ok" if speed >= DISK_MIB_PER_S else "note", text, Measure(speed, "MiB/s written")),
        Finding("clock", "ok" if skew_s < CLOCK_S else "note", clock),
    ]


def _check_scheduler() -> list[Finding]:
    if shutil.which("squeue") is None:
        return [Finding("SLURM", "note", "not installed here; launch runs with --on local")]
    start = time.perf_counter()
    try:
        jobs = slurm.queued_jobs()
    except slurm.SchedulerUnreachable as error:
        return [Finding("SLURM", "bad", str(error))]
    alive = sum(job.is_alive for job in jobs.values())
    return [Finding("SLURM", "ok", f"answers in {time.perf_counter() - start:.0f} s; you have {alive} jobs")]


def _check_wandb() -> list[Finding]:
    try:
        socket.create_connection(("api.wandb.ai", 443), timeout=5).close()
    except OSError:
        return [Finding("W&B", "note", "api.wandb.ai is unreachable from here; runs are recorded offline")]
    return [Finding("W&B", "ok", "api.wandb.ai is reachable")]
