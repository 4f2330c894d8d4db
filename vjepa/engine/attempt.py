"""The state of an attempt at a run, and its record: metrics, monitors, checkpoints."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vjepa.checkpoints import checkpoint
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.checkpoints.run_folder import settings_hash, versions
from vjepa.config import Run
from vjepa.distributed.sharding import local_shards
from vjepa.distributed.world import World
from vjepa.engine.optimizer import Update
from vjepa.engine.schedule import Rates
from vjepa.engine.skipped_batches import SkippedBatches
from vjepa.methods.base import Loss, Method, Networks
from vjepa.monitoring.collapse import drift, monitor
from vjepa.monitoring.health import HealthMonitor
from vjepa.monitoring.logger import RunLogger
from vjepa.monitoring.periodic import PeriodicTasks
from vjepa.monitoring.stall_watchdog import StallWatchdog
from vjepa.monitoring.throughput import Throughput
from vjepa.monitoring.timers import StepTimer
from vjepa_data.reader.batch import Batch
from vjepa_data.signal_spec import SignalSpec


@dataclass
class Attempt:
    """The objects that an attempt works with.

    The state that must survive it is in `checkpoint.collect_tensors`, the step and the skipped batches.
    """

    run: Run
    world: World
    method: Method
    networks: Networks
    optimizer: torch.optim.AdamW
    batches: Iterator[Batch]
    step: int
    """Updates made in all attempts. The next update uses the batch and the masks of this step, unless batches were
    skipped."""

    skipped: SkippedBatches
    checkpoints: CheckpointManager
    logger: RunLogger
    health: HealthMonitor
    watchdog: StallWatchdog
    timer: StepTimer
    manifests: list[str]
    signals: dict[str, SignalSpec]
    throughput: Throughput
    periodic: PeriodicTasks

    def record(
        self, metrics: Mapping[str, Tensor], losses: Sequence[Loss], rates: Rates, update: Update, batch: Batch
    ) -> None:
        """Record the metrics of a step. Periodically write them, run diagnostics and collect garbage.

        Args:
            metrics: the loss and its parts, summed over ranks.
            losses: this rank's micro-batches.
            rates: rates of the update.
            update: result of the update.
            batch: this rank's clips.
        """
        step, run = self.step, self.run
        self.watchdog.beat(f"making step {step + 1}", step=step)
        self.logger.add(
            step,
            {
                **{f"loss/{name}": value for name, value in metrics.items()},
                "optim/lr": rates.lr,
                "optim/weight_decay": rates.weight_decay,
                "optim/ema": rates.ema,
                "optim/grad_norm": update.grad_norm,
                "optim/applied": update.applied,
            },
        )
        self.throughput.count(batch, losses)
        if step % run.track.monitor_every_steps == 0:
            self.logger.amend(self.monitor(losses))
        with self.timer.host("look"):
            self.logger.amend(self.periodic.run_if_due(step, batch))
        if self.logger.is_due(step):
            self.write()
        if step % run.parallel.collect_every_steps == 0:
            gc.collect()
            # The remaining objects stay for good (modules, compiled code). To look through them would take a second
            # each time.
            gc.freeze()

    def monitor(self, losses: Sequence[Loss]) -> dict[str, Tensor]:
        """Measure the spread of the features, and how far the averages are from their networks."""
        features = torch.cat([loss.features for loss in losses])
        found = monitor(features, self.world.sum, decompose=self.world.is_first)
        for name, average in self.networks.averages.items():
            network = self.networks.trained[average.of]
            key = "drift" if name == "target" else f"drift_{name}"
            found[key] = drift(local_shards(average.network), local_shards(network), self.world.sum)
        # Rank 0 alone decomposes: results may differ in their last bits between GPUs, and ranks must come to one
        # verdict on a collapse.
        agreed = self.world.from_first(torch.stack(list(found.values())))
        return {f"monitor/{name}": value for name, value in zip(found, agreed, strict=True)}

    def write(self) -> None:
        """Write the records of the last steps and check the health of the run."""
        self.health.check(self.logger.write(self.throughput.read(self.timer)))

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is already saved.

        Records are written first, because an attempt that resumes from the checkpoint does not repeat these steps.
        """
        if self.logger.is_behind:
            self.write()
        self.watchdog.beat(f"saving step {self.step}", patience=10)
        with self.timer.host("save"):
            self.checkpoints.save(
                checkpoint.collect_tensors(self.networks, self.optimizer),
                checkpoint.CheckpointMetadata(
                    step=self.step,
                    world=self.world.size,
                    settings=self.run.model_dump(mode="json"),
                    settings_hash=settings_hash(self.run),
                    manifests=self.manifests,
                    wandb_id=self.logger.wandb_id,
                    versions=versions(),
                    passed_over=self.skipped,
                    signals={name: spec.model_dump(mode="json") for name, spec in self.signals.items()},
                ),
            )
