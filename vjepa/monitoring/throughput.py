"""Throughput and data statistics: counted in every step, read when the record is written."""

import socket
import time
from collections import Counter
from collections.abc import Sequence

import torch

from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.estimate.estimate import accelerator_of
from vjepa.estimate.step_counts import count_step
from vjepa.methods.base import Loss
from vjepa.monitoring.stragglers import Pulse, Stragglers
from vjepa.monitoring.timers import StepTimer
from vjepa_data.errors import REASONS
from vjepa_data.reader.loader import Batch

GIB = 2**30

PULSE_EVERY_READS = 10
"""Readings between two pulses, which need an idle device."""


class Throughput:
    """Counters of this rank since the last reading."""

    def __init__(self, run: Run, world: World) -> None:
        self._run, self._world = run, world
        self._since_s = time.perf_counter()
        self._peak_clips_per_s = _peak_clips_per_s(run, world)
        self._pulse, self._stragglers = Pulse(world.device), Stragglers(run.health.straggler_ratio)
        self._hosts = world.gather(socket.gethostname())
        self._reads = 0
        self._reset()

    def count(self, batch: Batch, losses: Sequence[Loss]) -> None:
        """Count the clips and tokens of a step on this rank."""
        self._steps += 1
        self._rejected += len(batch.rejected)
        self._fell_back.update(reason if reason in REASONS else "error" for reason in batch.fell_back)
        self._sources.update(source for clips in batch.groups for source in clips.sources)
        for loss in losses:
            self._tokens += loss.tokens.total
            self._visible += loss.tokens.visible
            self._hidden += loss.tokens.hidden

    def read(self, timer: StepTimer) -> dict[str, float]:
        """Return the metrics since the last reading. Waits for the device. All ranks must call it together."""
        seconds = timer.read()
        now_s = time.perf_counter()
        wall_s, self._since_s = now_s - self._since_s, now_s
        steps = self._steps
        spent = {f"time/{name}_s": value / steps for name, value in seconds.items()}
        waits, pulses, rejected, fell_back, sources = self._gather(seconds.get("data", 0.0) / steps)
        if self._world.is_first:
            self._stragglers.see("waiting for data", waits, self._hosts, at_least_s=0.1 * wall_s / steps)
            self._stragglers.see("a matrix product", pulses, self._hosts, at_least_s=0.0)
        clips_per_s = self._run.batch_size * steps / wall_s
        numbers = {
            "speed/clips_per_s": clips_per_s,
            "time/step_s": wall_s / steps,
            **spent,
            "time/slowest_data_s": max(waits),
            "time/slowest_data_rank": waits.index(max(waits)),
            "time/slowest_pulse_s": max(pulses),
            "time/slowest_pulse_rank": pulses.index(max(pulses)),
            "data/rejected": rejected,
            **{f"data/fell_back_{reason}": count for reason, count in sorted(fell_back.items())},
            **{f"data/source_{source}_share": count / sources.total() for source, count in sorted(sources.items())},
        }
        if self._tokens:
            numbers["masks/visible_share"] = self._visible / self._tokens
            numbers["masks/hidden_share"] = self._hidden / self._tokens
        if self._peak_clips_per_s:
            numbers["speed/mfu"] = clips_per_s / self._peak_clips_per_s
        if self._world.device.type == "cuda":
            memory = torch.cuda.memory_stats(self._world.device)
            numbers["memory/allocated_gib"] = memory["allocated_bytes.all.peak"] / GIB
            numbers["memory/reserved_gib"] = memory["reserved_bytes.all.peak"] / GIB
            numbers["memory/retries"] = memory["num_alloc_retries"]
            torch.cuda.reset_peak_memory_stats(self._world.device)
        self._reset()
        return numbers

    def _gather(self, wait_s: float) -> tuple[list[float], list[float], int, Counter[str], Counter[int]]:
        """Gather the waits and pulses of all ranks, and count rejects, fall-backs by reason and clips by source."""
        if self._reads % PULSE_EVERY_READS == 0:
            self._pulse_s = self._pulse.measure_s()
        self._reads += 1
        sources = range(len(self._run.data.sources))
        everyone = self._world.gather_numbers(
            (
                wait_s,
                self._pulse_s,
                self._rejected,
                *(self._fell_back[reason] for reason in REASONS),
                *(self._sources[source] for source in sources),
            )
        )
        waits, pulses, *counts = zip(*everyone, strict=True)
        rejected, *sums = (round(sum(each)) for each in counts)
        fell_back = Counter(dict(zip(REASONS, sums, strict=False)))
        seen = Counter(dict(zip(sources, sums[len(REASONS) :], strict=True)))
        return list(waits), list(pulses), rejected, +fell_back, +seen

    def _reset(self) -> None:
        self._steps = self._rejected = self._tokens = self._visible = self._hidden = 0
        self._sources: Counter[int] = Counter()
        self._fell_back: Counter[str] = Counter()


def _peak_clips_per_s(run: Run, world: World) -> float | None:
    """Return the clips per second at the peak of all devices, by `vjepa.estimate`.

    None where an MFU is meaningless: on a CPU, on a GPU of unknown peak, or in fp32.
    """
    if world.device.type != "cuda" or run.precision != "bf16":
        return None
    accelerator = accelerator_of(torch.cuda.get_device_name(world.device))
    if accelerator is None:
        return None
    return world.size * accelerator.flops / count_step(run).flops_per_clip
