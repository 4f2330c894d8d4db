"""Would a run work on this machine? `vjepa doctor` looks at what most often breaks one. Never imports torch itself."""

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

from vjepa_launch import slurm

Level = Literal["ok", "note", "bad"]

PACKAGES = ("torch", "xformers", "decord", "webdataset", "submitit", "wandb", "pyarrow")
SHARED_MEMORY_GIB = 1.0
"""Loader workers hand batches over through shared memory; containers often have 64 MiB."""
OPEN_FILES = 4096
CLOCK_S = 2.0
DISK_MIB = 64
DISK_MIB_PER_S = 20.0
"""Below this a checkpoint of a ViT-L (5 GB with its optimizer) takes more than four minutes."""

# In a process of its own: it may crash, hang, or take memory that is never given back.
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
"""A GPU below this share of the fastest one beside it holds all others back."""


@dataclass(frozen=True)
class Measure:
    """How much of something there is, to be compared between nodes; more is better."""

    value: float
    unit: str
    least: float = 0.5
    """A node below this share of the usual stands out."""
    outlier: Level = "note"
    """What that means: `bad` if it holds all others back."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    level: Level
    found: str
    measure: Measure | None = None


Look = Callable[[], list[Finding]]


def examine(folder: Path, more: Sequence[Look] = ()) -> list[Finding]:
    """Look at everything, in the order of the table.

    Args:
        folder: where runs are kept; a file is written there and removed.
        more: what else to look at; this room knows neither torch nor data.
    """
    looks: Sequence[Look] = (
        _versions,
        _torch,
        _shared_memory,
        _open_files,
        lambda: _disk(folder),
        _scheduler,
        _wandb,
        *more,
    )
    return [finding for look in looks for finding in look()]


def table(findings: Sequence[Finding]) -> str:
    """Findings as text, a line each."""
    width = max(len(finding.what) for finding in findings)
    return "\n".join(f"{finding.level:4}  {finding.what:{width}}  {finding.found}" for finding in findings)


def _versions() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    findings = [Finding("python", "ok" if sys.version_info >= (3, 11) else "bad", f"{version}")]
    for name in PACKAGES:
        try:
            findings.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "bad", "not installed; install vjepa-pretrain with its dependencies"))
    return findings


def _torch() -> list[Finding]:
    command = [sys.executable, "-c", TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return [Finding("torch runs", "bad", f"no answer within {TORCH_TIMEOUT_S:.0f} s; a GPU may hang (nvidia-smi)")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding("torch runs", "bad", last)]
    first, *rows = [line.split("|") for line in done.stdout.splitlines()]
    return [Finding("torch runs", "ok", f"{first[0]}, CUDA {first[1]}"), *_gpus(rows)]


def _gpus(rows: Sequence[Sequence[str]]) -> list[Finding]:
    seen = _count_devices()
    if not rows:
        level: Level = "bad" if seen else "note"
        found = f"{seen} in the machine, and torch sees none; its build or the driver does not fit" if seen else "none"
        return [Finding("GPUs", level, found)]
    best = max(float(tflops) for _, tflops in rows)
    findings = []
    for index, (name, tflops) in enumerate(rows):
        slow = float(tflops) < SLOWER_THAN_THE_BEST * best
        text = f"{name}, {tflops} TFLOP/s bf16" + (f", where the best here has {best:.0f}" if slow else "")
        findings.append(
            Finding(
                f"GPU {index}",
                "bad" if slow else "ok",
                text,
                Measure(float(tflops), "TFLOP/s", SLOWER_THAN_THE_BEST, "bad"),
            )
        )
    if seen > len(rows):
        findings.append(Finding("GPUs", "note", f"{seen} in the machine, {len(rows)} visible"))
    return findings


def _count_devices() -> int:
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def _shared_memory() -> list[Finding]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return [Finding("shared memory", "bad", "there is no /dev/shm, through which loader workers hand batches over")]
    gib = shutil.disk_usage(shared).free / 2**30
    text = f"{gib:.1f} GiB free" + ("" if gib >= SHARED_MEMORY_GIB else "; in a container, give --shm-size=16g")
    return [Finding("shared memory", "ok" if gib >= SHARED_MEMORY_GIB else "bad", text, Measure(gib, "GiB free"))]


def _open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    text = f"{soft} (at most {hard})" + ("" if enough else f"; add `ulimit -n {OPEN_FILES}` to the profile's setup")
    return [Finding("open files", "ok" if enough else "note", text)]


def _disk(folder: Path) -> list[Finding]:
    """How fast the disk of the runs takes data, and whether it has our time."""
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
        apart_s = abs(probe.stat().st_mtime - time.time())
    except OSError as error:
        return [Finding("disk", "bad", f"{folder} cannot be written to ({error.strerror})")]
    finally:
        if probe.exists():
            probe.unlink()
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{speed:.0f} MiB/s written to {folder.resolve()}, {free:.0f} GiB free"
    clock = f"{apart_s:.1f} s from that of the disk" + ("" if apart_s < CLOCK_S else "; ages of runs will be wrong")
    return [
        Finding("disk", "ok" if speed >= DISK_MIB_PER_S else "note", text, Measure(speed, "MiB/s written")),
        Finding("clock", "ok" if apart_s < CLOCK_S else "note", clock),
    ]


def _scheduler() -> list[Finding]:
    if shutil.which("squeue") is None:
        return [Finding("SLURM", "note", "not installed here; runs are launched with --on local")]
    start = time.perf_counter()
    try:
        mine = slurm.states()
    except slurm.SchedulerUnreachable as error:
        return [Finding("SLURM", "bad", str(error))]
    return [Finding("SLURM", "ok", f"answers in {time.perf_counter() - start:.0f} s, {len(mine)} jobs of yours")]


def _wandb() -> list[Finding]:
    try:
        socket.create_connection(("api.wandb.ai", 443), timeout=5).close()
    except OSError:
        return [Finding("W&B", "note", "api.wandb.ai is not reached from here; runs are recorded offline")]
    return [Finding("W&B", "ok", "api.wandb.ai is reached")]
