"""Roll back to the last healthy checkpoint: set later checkpoints aside and perhaps skip their batches."""

import logging
from pathlib import Path

from vjepa.checkpoints import storage
from vjepa.checkpoints.checkpoint import checkpoint_dir, list_checkpoints, step_of
from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.engine import skipped_batches

log = logging.getLogger(__name__)


def roll_back(run: Run, folder: Path, world: World, *, healthy: int, last: int) -> None:
    """Make the run resume from its last healthy checkpoint, or from the start if it has none.

    Later checkpoints are kept under another name, for inspection.

    Args:
        run: the run.
        folder: folder of the run.
        world: the ranks, all of which must call this.
        healthy: last step known to be healthy.
        last: step at which the problem was detected.
    """

    def go_back() -> int:
        found = list_checkpoints(checkpoint_dir(folder, run.checkpoint))
        for path in found:
            if step_of(path) > healthy:
                storage.set_aside(path, name="unhealthy")
        for note in (folder / "checkpoints").glob("step_*"):
            if note.is_file() and step_of(note) > healthy:
                note.unlink()
        step = max((step_of(path) for path in found if step_of(path) <= healthy), default=0)
        if run.health.after_roll_back == "pass_over":
            skipped_batches.add(folder, at=step, count=last - step)
        return step

    step = world.first(go_back)
    log.warning(
        "going back to step %d: %s",
        step,
        f"its next {last - step} batches are skipped"
        if run.health.after_roll_back == "pass_over"
        else "the same batches once more",
    )
