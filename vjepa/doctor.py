"""What the doctor of machines must know of torch and of our data: how fast ranks exchange, and how fast clips come.

torchrun --standalone --nproc-per-node 8 -m vjepa.doctor      all-reduce between the processes, a line of JSON
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
from vjepa_data.corpus.index import Index
from vjepa_data.reader.bench import measure_stages
from vjepa_data.settings import BadInput
from vjepa_launch.doctor.machine import SLOWER_THAN_THE_BEST, Check, Finding, Measure

GPU_MIB, CPU_MIB = 1024, 32
"""Large enough for the bandwidth to count and not the latency."""

REPEATS = 10
WAIT_S = 900.0
"""For the other ranks, whose nodes may still be looked at."""

READ_MIB, READ_S = 256, 10.0
CLIPS = 20


def looks(run: Run | None) -> list[Check]:
    """What there is to look at on one machine, with the corpora of a run if there is one."""
    exchange = partial(exchange_between_devices, max(2, torch.cuda.device_count()))
    if run is None:
        return [exchange]
    return [
        exchange,
        partial(look_at_corpora, "shards", read_shards, run),
        partial(look_at_corpora, "clips", decode_clips, run),
    ]


def exchange_between_devices(processes: int) -> list[Finding]:
    """All-reduce between the GPUs of this machine (NCCL), or between processes if it has none (gloo)."""
    what = "exchange here"
    if torch.cuda.device_count() == 1:
        return [Finding(what, "ok", "one GPU, which exchanges nothing")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return _exchange(what, [*torchrun, "-m", "vjepa.doctor"], dict(os.environ))


def exchange_between_ranks() -> list[Finding]:
    """All-reduce between all ranks of the job that we are one of; the first rank of each node knows the answer."""
    return _exchange("exchange of all ranks", [sys.executable, "-m", "vjepa.doctor"], dict(os.environ))


def _exchange(what: str, command: list[str], environment: dict[str, str]) -> list[Finding]:
    """In processes of their own: a group that hangs is ended with them."""
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=WAIT_S + 300, check=False
        )
    except subprocess.TimeoutExpired:
        return [Finding(what, "bad", f"no answer within {WAIT_S + 300:.0f} s; NCCL_DEBUG=INFO says where it waits")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding(what, "bad", last)]
    if not done.stdout.strip():
        return []
    answer = json.loads(done.stdout.splitlines()[-1])
    text = f"{answer['gb_per_s']:.2f} GB/s all-reduce between {answer['ranks']} ranks, {answer['backend']}"
    measure = Measure(answer["gb_per_s"], "GB/s")
    if answer["backend"] == "nccl":  # what one node does slowly, all wait for
        measure = replace(measure, least=SLOWER_THAN_THE_BEST, outlier="bad")
    return [Finding(what, "ok", text, measure)]


def measure_all_reduce(mib: int, device: torch.device) -> float:
    """Bus bandwidth of an all-reduce between all ranks, GB/s: what each link carries, whatever the number of ranks.

    Source: 2 (n - 1) / n times size over time, as nccl-tests counts (doc/PERFORMANCE.md).
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


def look_at_corpora(what: str, look: Callable[[Run], list[Finding]], run: Run) -> list[Finding]:
    """Whether the corpora of a run can be used here, and how fast."""
    try:
        return look(run)
    except BadInput as error:
        return [Finding(what, "bad", str(error))]


def read_shards(run: Run) -> list[Finding]:
    """Read samples of each source here and there, as training does: bytes that are cached count too."""
    findings = []
    for number, source in enumerate(run.data.sources):
        index = Index(source.shards, source.split)
        size, samples, started = 0, 0, time.perf_counter()
        while size < READ_MIB * 2**20 and time.perf_counter() - started < READ_S:
            # A stride without a common divisor comes by each sample once, far from the last.
            size += len(index.read(samples * 7919 % len(index)).video)
            samples += 1
        rate = size / 2**20 / (time.perf_counter() - started)
        text = f"{rate:,.0f} MiB/s in {samples:,} reads of samples of {source.shards}"
        findings.append(Finding(f"shards {number}", "ok", text, Measure(rate, "MiB/s read")))
    return findings


def decode_clips(run: Run) -> list[Finding]:
    """What one core makes of the clips of a run."""
    stages = measure_stages(run.data, run.loader, seed=run.seed, batch_size=run.batch_size, clips=CLIPS)
    rate = 1000 / stages.total
    text = f"{rate:.1f} clips/s for each core, {stages.total:.1f} CPU-ms a clip ({stages.decode:.1f} of them decoding)"
    return [Finding("clips", "ok", text, Measure(rate, "clips/s for each core", least=0.7))]


def main() -> None:
    """One rank of an all-reduce, as torchrun or the launcher started it."""
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"]) if torch.cuda.device_count() > 1 else 0
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=WAIT_S), device_id=device if on_gpu else None)
    rate = measure_all_reduce(GPU_MIB if on_gpu else CPU_MIB, device)
    if os.environ["LOCAL_RANK"] == "0":
        print(json.dumps({"gb_per_s": rate, "ranks": dist.get_world_size(), "backend": backend}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
