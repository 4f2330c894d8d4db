"""What is looked at now and then, beside the numbers of every step: pictures, a probe, a trace."""

from collections.abc import Mapping
from pathlib import Path

from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.methods import Models
from vjepa.monitoring import sample_pictures
from vjepa.monitoring.logger import RunLogger
from vjepa.monitoring.online_probe import ProbeRunner
from vjepa.monitoring.profiler import Profiler
from vjepa_data.reader.loader import Batch


class PeriodicTasks:
    """Looks at the target encoder at the steps that the settings name. All ranks must ask it together."""

    def __init__(self, run: Run, folder: Path, world: World, models: Models, track: RunLogger) -> None:
        self._run, self._folder, self._world, self._models, self._track = run, folder, world, models, track
        self._probe = ProbeRunner(run.track.probe, run, world) if run.track.probe else None
        self._profiler = Profiler(run.track.profile, folder, world)

    def look(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Do what is due after so many updates.

        Args:
            step: updates made.
            batch: the last one.

        Returns:
            Numbers for the record of this step.
        """
        self._profiler.after(step)
        every = self._run.track.pictures_every_steps
        if every and step % every == 0:
            picture = sample_pictures.look(self._models.target, batch, self._run, self._world.device)
            if self._world.is_first:
                self._track.show(sample_pictures.write(picture, self._folder, step), step)
        if self._probe and self._probe.is_due(step):
            return self._probe.measure(self._models.target)
        return {}

    def close(self) -> None:
        """Write what is still open."""
        self._profiler.close()
