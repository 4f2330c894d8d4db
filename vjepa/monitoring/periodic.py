"""Diagnostics that run periodically: pictures, an online probe, planning, surprise, a profiler trace."""

from collections.abc import Mapping
from pathlib import Path

from vjepa.config import Run
from vjepa.distributed.sharding import free_gathered
from vjepa.distributed.world import World
from vjepa.methods.base import Networks
from vjepa.monitoring import sample_pictures
from vjepa.monitoring.logger import RunLogger
from vjepa.monitoring.online_plan import PlanRunner
from vjepa.monitoring.online_probe import ProbeRunner
from vjepa.monitoring.online_surprise import SurpriseRunner
from vjepa.monitoring.profiler import Profiler
from vjepa_data.reader.loader import Batch


class PeriodicTasks:
    """Runs diagnostics on the exported encoder at the steps in the settings. All ranks must call it together."""

    def __init__(self, run: Run, folder: Path, world: World, networks: Networks, logger: RunLogger) -> None:
        self._run, self._folder, self._world, self._logger = run, folder, world, logger
        self._encoder = networks[networks.exported]
        self._probe = ProbeRunner(run.track.probe, run, world) if run.track.probe else None
        self._plan = PlanRunner(run.track.plan, run, world, networks) if run.track.plan else None
        self._surprise = SurpriseRunner(run.track.surprise, run, world, networks) if run.track.surprise else None
        self._profiler = Profiler(run.track.profile, folder, world)

    def run_if_due(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Run the diagnostics that are due after `step` updates.

        Args:
            step: updates made.
            batch: the last batch.

        Returns:
            Metrics for the record of this step.
        """
        self._profiler.after(step)
        every = self._run.track.pictures_every_steps
        if every and step % every == 0:
            picture = sample_pictures.draw(self._encoder, batch, self._run, self._world.device)
            free_gathered(self._encoder)
            if self._world.is_first:
                self._logger.show(sample_pictures.write(picture, self._folder, step), step)
        metrics: dict[str, float] = {}
        if self._probe and self._probe.is_due(step):
            metrics |= self._probe.measure(self._encoder)
            free_gathered(self._encoder)
        if self._plan and self._plan.is_due(step):
            metrics |= self._plan.measure()
        if self._surprise and self._surprise.is_due(step):
            metrics |= self._surprise.measure()
        return metrics

    def close(self) -> None:
        """Write an unfinished trace."""
        self._profiler.close()
