"""Benchmark of the loader: its rate on this machine, the cost of each stage, and the workers that a GPU needs."""

import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from vjepa_data.corpus.index import Sample
from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.decoding.decode_worker_main import keep_memory
from vjepa_data.errors import Unreadable
from vjepa_data.reader import crops
from vjepa_data.reader.loader import ClipLoader, open_plan
from vjepa_data.reader.pipeline import Choice, choose, index_of
from vjepa_data.reader.plan import Draw
from vjepa_data.settings import BadInput, Data, Loader

T = TypeVar("T")
DRAWN_AT_ONCE = 10  # clips; a worker draws all clips of a step at once
HEADROOM = 1.3  # a loader without reserve makes the GPU wait at every delay


@dataclass(frozen=True)
class Stages:
    """CPU milliseconds per clip of each stage, measured in sequence in a single process and its decode worker."""

    plan: float
    """Drawing the sample, frames and crop."""
    read: float
    """Reading and verifying the bytes, including the JSON."""
    decode: float
    """Time of the decode worker: receiving the bytes, decoding, returning the frames."""
    ask: float
    """Sending the bytes to the decode worker and waiting for it."""
    crop: float
    """Cutting out, scaling, flipping, and writing into the batch."""
    megabytes: float
    """Size of an encoded clip."""

    @property
    def total(self) -> float:
        return self.plan + self.read + self.decode + self.ask + self.crop


@dataclass(frozen=True)
class Rate:
    """The rate of the complete loader."""

    workers: int
    first_batch_s: float
    clips_per_s: float
    cpu_ms: float
    """CPU milliseconds per clip of all its processes."""
    waits_ms: tuple[float, ...]
    """Wait of each step for its batch, at the simulated demand."""


def measure_stages(data: Data, loader: Loader, *, seed: int, batch_size: int, clips: int = 100) -> Stages:
    """Measure the CPU time of each stage with some clips, stage by stage."""
    plan = open_plan(data, seed=seed, batch_size=batch_size, loader=loader)
    decoder = DecodeWorker(loader.fixed_decoder, timeout_s=loader.decode_timeout_s)
    spent: dict[str, float] = {"plan": 0.0, "read": 0.0, "ask": 0.0, "crop": 0.0}
    out: dict[int, torch.Tensor] = {}
    size = 0

    def charge(stage: str, work: Callable[[], T]) -> T:
        began = time.process_time()
        result = work()
        spent[stage] += time.process_time() - began
        return result

    def ask(sample: Sample, choice: Choice, expect: Expect) -> np.ndarray:
        box = choice.box
        part = (box.top, box.left, box.height, box.width)
        decoder.begin(sample.video, choice.times.frames, expect, suffix=sample.suffix, part=part)
        return decoder.finish()

    def draw_some(first: int) -> list[tuple[Draw, Choice]]:
        places = [divmod(number, batch_size) for number in range(first, first + DRAWN_AT_ONCE)]
        draws = [plan.draw(*place) for place in places]
        return [(d, choose(plan, data.crop, d, step=s, slot=b)) for d, (s, b) in zip(draws, places, strict=True)]

    def measure(draw: Draw, choice: Choice) -> bool:
        nonlocal size
        index, i = index_of(plan, draw), draw.sample
        expect = Expect(int(index.frames[i]), int(index.width[i]), int(index.height[i]))
        try:
            sample = charge("read", lambda: index.read(i))
            frames = charge("ask", lambda: ask(sample, choice, expect))
        except Unreadable:  # the loader would replace the sample
            return False
        row = out.setdefault(len(frames), torch.empty(len(frames), data.crop.px, data.crop.px, 3, dtype=torch.uint8))
        charge("crop", lambda: row.copy_(crops.cut_out(frames, choice.box.inside(choice.box), data.crop.px)))
        size += len(sample.video) + len(sample.json)
        return True

    keep_memory()  # as workers do
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for drawn in draw_some(0)[:5]:
        measure(*drawn)
    spent, size = dict.fromkeys(spent, 0.0), 0
    before = cpu_seconds({decoder.pid})
    good = number = 0
    drawn = []
    while good < clips:
        drawn = drawn or charge("plan", functools.partial(draw_some, number))
        good += measure(*drawn.pop(0))
        number += 1
        if number == 2 * clips + 100:
            raise BadInput(f"{number - good} of {number} samples are unreadable; check the data with `vjepa verify`")
    decode = (cpu_seconds({decoder.pid}) - before) * 1000 / clips
    decoder.close()
    torch.set_num_threads(threads)
    ms = {stage: seconds * 1000 / clips for stage, seconds in spent.items()}
    return Stages(ms["plan"], ms["read"], decode, ms["ask"], ms["crop"], size / clips / 1e6)


def measure_rate(
    data: Data, loader: Loader, *, seed: int, batch_size: int, seconds: float = 20.0, demand: float | None = None
) -> Rate:
    """Run the loader as a trainer does, and measure rate, CPU time and waits.

    Args:
        data, loader, seed, batch_size: as of `ClipLoader`, for a single rank.
        seconds: duration of the measurement after the first batch.
        demand: clips per second that a GPU would take. Default: unlimited.
    """
    opened = time.perf_counter()
    with ClipLoader(data, loader, seed=seed, batch_size=batch_size) as batches:
        next(batches)
        first_s = time.perf_counter() - opened
        for _ in range(loader.workers * loader.prefetch_steps):  # batches made while the processes started
            next(batches)
        workers = descendants(os.getpid())
        began, cpu, clips, waits = time.perf_counter(), cpu_seconds({os.getpid()} | workers), 0, []
        while time.perf_counter() - began < seconds:
            asked = time.perf_counter()
            clips += len(next(batches))
            waits.append((time.perf_counter() - asked) * 1000)
            if demand:
                time.sleep(max(0.0, clips / demand - (time.perf_counter() - began)))
        wall = time.perf_counter() - began
        cpu = cpu_seconds({os.getpid()} | workers) - cpu
    return Rate(loader.workers, first_s, clips / wall, cpu * 1000 / clips, tuple(waits))


def describe(stages: Stages, rate: Rate, demand: float | None) -> str:
    """Describe the measurements, as `vjepa bench loader` prints them."""
    lines = ["CPU milliseconds per clip, clips in sequence"]
    for name in ("plan", "read", "ask", "decode", "crop"):
        value = getattr(stages, name)
        lines.append(f"    {name:7} {value:8.2f}   {value / stages.total:6.1%}")
    lines.append(f"    {'total':7} {stages.total:8.2f}")
    megabytes = rate.clips_per_s * stages.megabytes
    lines.append(
        f"loader.workers={rate.workers}: {rate.clips_per_s:.1f} clips/s, {megabytes:.1f} MB/s, "
        f"{rate.cpu_ms:.1f} CPU-ms per clip; first batch after {rate.first_batch_s:.1f} s"
    )
    if demand:
        waits = sorted(rate.waits_ms)
        p99 = waits[min(len(waits) - 1, int(len(waits) * 0.99))]
        lines.append(
            f"at {demand:g} clips/s a step waits {statistics.median(waits):.1f} ms (median), {p99:.1f} ms (p99)"
        )
        need = math.ceil(demand * HEADROOM * rate.cpu_ms / 1000)
        lines.append(
            f"set loader.workers={need}, and give them as many cores, for {demand:g} clips/s with {HEADROOM:g}x "
            "headroom"
        )
    return "\n".join(lines)


def descendants(pid: int) -> set[int]:
    """Return the ids of all child processes of a process, and of their children."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (text := _stat(int(entry.name))):
            parents[int(entry.name)] = int(text[1])
    found, border = set(), {pid}
    while border:
        border = {child for child, parent in parents.items() if parent in border} - found
        found |= border
    return found


def cpu_seconds(pids: set[int]) -> float:
    """Return the total user and system time of some processes."""
    ticks = sum(int(text[11]) + int(text[12]) for pid in pids if (text := _stat(pid)))
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
