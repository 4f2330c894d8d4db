"""Traces of a few steps by torch's profiler, to open in https://ui.perfetto.dev."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vjepa.config import Profile
from vjepa.distributed.world import World

log = logging.getLogger(__name__)


class Profiler:
    """Traces the steps and ranks in the settings."""

    def __init__(self, settings: Profile | None, folder: Path, world: World) -> None:
        """Args:
        settings: steps to trace. None traces nothing.
        folder: folder of the run.
        world: this rank.
        """
        self._settings = settings if settings and world.rank < settings.ranks else None
        self._folder, self._rank = folder / "profile", world.rank
        self._on_device = world.device.type == "cuda"
        self._trace: profile | None = None

    def after(self, step: int) -> None:
        """Begin or end the trace if it is due.

        Args:
            step: updates made.
        """
        if self._settings is None:
            return
        first, last = self._settings.at, self._settings.at + self._settings.steps - 1
        if step == first - 1:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._on_device
            self._trace = profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
            self._trace.start()
        if step == last:
            self.close()

    def close(self) -> None:
        """End the trace, if any, and write it."""
        if self._trace is None or self._settings is None:
            return
        if self._on_device:
            torch.cuda.synchronize()
        trace, self._trace = self._trace, None
        trace.stop()
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"step_{self._settings.at:08d}_rank_{self._rank:05d}.json.gz"
        trace.export_chrome_trace(str(file))
        log.info("%s: a trace of %d steps, for https://ui.perfetto.dev", file, self._settings.steps)
