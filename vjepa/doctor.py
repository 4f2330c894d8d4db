"""Checks of `vjepa doctor` that need torch or our data: all-reduce bandwidth, reading speed, decoding speed.

torchrun --standalone --nproc-per-node 8 -m vjepa.doctor      # prints the bandwidth as a line of JSON
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from vjepa.config import Run
from vjepa.distributed.world import choose_interface
from vjepa_data.corpus.index import Index
from vjepa_data.errors import BadInput
from vjepa_data.reader.bench import measure_stages
from vjepa_launch.doctor.machine import SLOWER_THAN_THE_BEST, Check, Finding, Measure

GPU_MIB, CPU_MIB = 1024, 32
"""Size of the tensor. Large, so that bandwidth dominates latency."""

REPEATS = 10
WAIT_S = 900.0
"""Time-out for the other ranks, whose nodes may still be under examination."""

READ_MIB, READ_S = 256, 10.0
CLIPS = 20


def checks(run: Run | None) -> list[Check]:
    """List the checks of a machine. With a run, its corpora are read and decoded too."""
    devices = max(2, torch.cuda.device_count())
    found: list[Check] = [partial(check_exchange_between_devices, devices)]
    if run is not None:
        found += [
            partial(check_corpora, "shards", read_shards, run),
            partial(check_corpora, "clips", decode_clips, run),
        ]
    return found


def check_exchange_between_devices(processes: int) -> list[Finding]:
    """Measure all-reduce between the GPUs of this machine (NCCL), or between processes without GPUs (gloo)."""
    name = "exchange here"
    if torch.cuda.device_count() == 1:
        return [Finding(name, "ok", "one GPU, so no exchange")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return _check_exchange(name, [*torchrun, "-m", "vjepa.doctor"], dict(os.environ))


def check_exchange_between_ranks() -> list[Finding]:
    """Measure all-reduce between all ranks of this job. Only the first rank of each node returns a finding."""
    return _check_exchange("exchange of all ranks", [sys.executable, "-m", "vjepa.doctor"], dict(os.environ))


def _check_exchange(name: str, command: list[str], environment: dict[str, str]) -> list[Finding]:
    """Measure all-reduce in child processes, which a time-out ends if the process group hangs."""
    environment.setdefault("OMP_NUM_THREADS", "1")
    timeout_s = WAIT_S + 300
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return [Finding(name, "bad", f"no result within {timeout_s:.0f} s; set NCCL_DEBUG=INFO to see where it waits")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding(name, "bad", last)]
    if not done.stdout.strip():
        return []
    result = json.loads(done.stdout.splitlines()[-1])
    text = f"{result['gb_per_s']:.2f} GB/s all-reduce between {result['ranks']} ranks, {result['backend']}"
    measure = Measure(result["gb_per_s"], "GB/s")
    if result["backend"] == "nccl":  # a slow node slows down all ranks
        measure = replace(measure, least=SLOWER_THAN_THE_BEST, outlier="bad")
    return [Finding(name, "ok", text, measure)]


def measure_all_reduce(mib: int, device: torch.device) -> float:
    """Measure the bus bandwidth of an all-reduce between all ranks, GB/s. It does not depend on the number of ranks.

    Source: 2 (n - 1) / n * size / time, as in nccl-tests (doc/PERFORMANCE.md).
    """
    size = dist.get_world_size()
    numbers = torch.ones(mib * 2**18, device=device)
    spent = 0.0
    for repeat in range(-2, REPEATS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat >= 0:
            spent += time.perf_counter() - started
        numbers.fill_(1.0)
    return 2 * (size - 1) / size * numbers.nbytes * REPEATS / spent / 1e9


def check_corpora(name: str, check: Callable[[Run], list[Finding]], run: Run) -> list[Finding]:
    """Run a check of the corpora of a run. An unusable corpus is a finding."""
    try:
        return check(run)
    except BadInput as error:
        return [Finding(name, "bad", str(error))]


def read_shards(run: Run) -> list[Finding]:
    """Measure random reads of samples of each source, as in training. Reads from a cache count too."""
    findings = []
    for number, source in enumerate(run.data.sources):
        index = Index(source.shards, source.split, part_s=source.part_s)
        size, samples, started = 0, 0, time.perf_counter()
        while size < READ_MIB * 2**20 and time.perf_counter() - started < READ_S:
            # Steps of a large prime visit every sample once, each far from the previous sample.
            size += len(index.read(samples * 7919 % len(index)).video)
            samples += 1
        rate = size / 2**20 / (time.perf_counter() - started)
        text = f"{rate:,.0f} MiB/s in {samples:,} reads of samples of {source.shards}"
        findings.append(Finding(f"shards {number}", "ok", text, Measure(rate, "MiB/s read")))
    return findings


def decode_clips(run: Run) -> list[Finding]:
    """Measure the clips per second that a core decodes for a run."""
    stages = measure_stages(run.data, run.loader, seed=run.seed, batch_size=run.batch_size, clips=CLIPS)
    rate = 1000 / stages.total
    text = f"{rate:.1f} clips/s for each core, {stages.total:.1f} CPU-ms a clip ({stages.decode:.1f} of them decoding)"
    return [Finding("clips", "ok", text, Measure(rate, "clips/s for each core", least=0.7))]


def main() -> None:
    """Run a rank of the all-reduce, over NCCL on GPUs and gloo everywhere, as started by torchrun or the launcher."""
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"]) if torch.cuda.device_count() > 1 else 0
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    choose_interface()
    dist.init_process_group(backend, timeout=timedelta(seconds=WAIT_S), device_id=device if on_gpu else None)
    # Training uses gloo in addition to NCCL, on an interface of its own choice: see `vjepa.distributed.world`.
    dist.all_reduce(torch.ones(1), group=dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_S)))
    rate = measure_all_reduce(GPU_MIB if on_gpu else CPU_MIB, device)
    if os.environ["LOCAL_RANK"] == "0":
        print(json.dumps({"gb_per_s": rate, "ranks": dist.get_world_size(), "backend": backend}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
