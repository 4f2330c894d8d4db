"""Train one model: the pieces are built here, and `learn` is the whole of it, in the order things happen."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vjepa.checkpoints import checkpoint
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.checkpoints.run_folder import occupy, record_attempt, settings_hash, versions, write_settings
from vjepa.checkpoints.storage import to_path
from vjepa.config import Run
from vjepa.distributed.world import World, join, local_parts, materialise, send_gradients, shard
from vjepa.engine import skipped_batches
from vjepa.engine.optimizer import Update, build_optimizer, update_weights
from vjepa.engine.rank_consistency import check_data, check_program
from vjepa.engine.resume import check_changes
from vjepa.engine.rollback import roll_back
from vjepa.engine.schedule import Rates, rates_at
from vjepa.engine.signals import STOPPED, Stop, stop_signals
from vjepa.methods import Loss, Models, build, jepa_loss, prepare_batch, update_target
from vjepa.monitoring.collapse import drift, monitor
from vjepa.monitoring.health import HealthMonitor, Unhealthy, read_history
from vjepa.monitoring.logger import RunLogger, logging_to
from vjepa.monitoring.periodic import PeriodicTasks
from vjepa.monitoring.stall_watchdog import Watchdog, watchdog
from vjepa.monitoring.throughput import Meter
from vjepa.monitoring.timers import Clock
from vjepa.nn.attention import choose
from vjepa_data.reader.device_prefetch import ahead
from vjepa_data.reader.loader import Batch, ClipLoader
from vjepa_data.reader.pipeline import open_plan
from vjepa_data.reader.plan import Plan

log = logging.getLogger(__name__)

MEMORY_ADVICE = (
    "The device is full. In this order: parallel.accumulate=2 (or more) halves the clips at work, not the result; "
    "parallel.recompute=selective, then full, trades work for memory; parallel.replicate=1 shards over all ranks; "
    "parallel.offload=true keeps what is not at work in the memory of the host. "
    "`vjepa estimate` says what each would need."
)


def train(run: Run, folder: Path) -> int:
    """Train one model, from wherever the last attempt stopped to the last step.

    Args:
        run: all settings.
        folder: of the run; one that holds checkpoints is continued.

    Returns:
        Exit code: 0 done, 75 stopped in good order and wishing to go on.

    Raises:
        BadInput: the folder is in use, the data is missing, settings do not fit the checkpoint.
        Unhealthy: the run went wrong, also after going back to a checkpoint.
    """
    with (
        join(run.parallel) as world,
        occupy(folder, world),
        logging_to(folder / "log.txt", world),
        stop_signals(world) as stop,
    ):
        for left in reversed(range(run.health.roll_backs + 1)):
            try:
                with start(run, folder, world) as attempt:
                    return learn(run, attempt, stop)
            except Unhealthy as error:
                if not left:
                    raise
                log.warning("%s", error)
                roll_back(run, folder, world, healthy=error.healthy, last=error.last)
            except torch.OutOfMemoryError as error:
                error.add_note(MEMORY_ADVICE)
                raise
    raise AssertionError("not reached")


def learn(run: Run, now: "Attempt", stop: Stop) -> int:
    """V-JEPA 2, step by step, until the last one or until asked to stop."""
    models, world = now.models, now.world
    while now.step < run.steps and not stop.agreed():
        batch, rates = next(now.batches), rates_at(now.step, run)
        losses: list[Loss] = []
        for part in batch.split(run.parallel.accumulate):
            with now.clock.part("prepare"):
                puzzles = prepare_batch(run, part, world.device)
            loss = jepa_loss(models, puzzles, run, step=now.step)
            send_gradients(models, now=len(losses) + 1 == run.parallel.accumulate)
            (loss.value * world.size).backward()  # FSDP2 takes the mean over ranks, where ours is a sum
            losses.append(loss)
        total = world.sum(torch.stack([loss.numbers for loss in losses]).sum(0))
        update = update_weights(now.optimizer, total[0], rates, clip_norm=run.optim.clip_norm)
        update_target(models, rates.ema, applied=update.applied)
        now.step += 1
        now.record(total, losses, rates, update, batch)
        if now.saver.is_due(now.step):
            now.save()
    now.save()
    return 0 if now.step == run.steps else STOPPED


@dataclass
class Attempt:
    """Everything one attempt works with; what must survive it is in `checkpoint.tensors_of` and the step."""

    run: Run
    world: World
    models: Models
    optimizer: torch.optim.AdamW
    batches: Iterator[Batch]
    step: int
    """Updates made, in all attempts; the next one uses the batch and the masks of this step, unless some are passed
    over."""

    passed_over: skipped_batches.PassedOver
    saver: CheckpointManager
    track: RunLogger
    nurse: HealthMonitor
    dog: Watchdog
    clock: Clock
    manifests: list[str]
    meter: Meter
    observer: PeriodicTasks

    def record(self, total: Tensor, losses: Sequence[Loss], rates: Rates, update: Update, batch: Batch) -> None:
        """Keep the numbers of a step; now and then write them down, look at them, and sweep up."""
        step, run = self.step, self.run
        self.dog.beat(f"making step {step + 1}", step=step)
        self.track.add(
            step,
            {
                "loss/prediction": total[0],
                "loss/explained": 1 - total[0] / total[1],
                **{f"loss/mask_{kind}": loss for kind, loss in enumerate(total[2:])},
                "optim/lr": rates.lr,
                "optim/weight_decay": rates.weight_decay,
                "optim/ema": rates.ema,
                "optim/grad_norm": update.grad_norm,
                "optim/applied": update.applied,
            },
        )
        self.meter.count(batch, losses)
        if step % run.track.monitor_every_steps == 0:
            self.track.amend(self.monitor(losses))
        with self.clock.aside("look"):
            self.track.amend(self.observer.look(step, batch))
        if self.track.is_due(step):
            self.write()
        if step % run.parallel.collect_every_steps == 0:
            gc.collect()

    def monitor(self, losses: Sequence[Loss]) -> dict[str, Tensor]:
        """Measure whether the features still say something, and how far the target is behind."""
        found = monitor(torch.cat([loss.features for loss in losses]), self.world.sum)
        models = self.models
        found["drift"] = drift(local_parts(models.target), local_parts(models.encoder), self.world.sum)
        return {f"monitor/{name}": value for name, value in found.items()}

    def write(self) -> None:
        """Write down what was kept of the last steps, and see whether all is well."""
        self.nurse.check(self.track.write(self.meter.read(self.clock)))

    def save(self) -> None:
        """Write a checkpoint of this step, unless the newest one is.

        The record comes first: whoever goes on from here makes none of these steps again.
        """
        if self.track.is_behind:
            self.write()
        self.dog.beat(f"saving step {self.step}")
        with self.clock.host("save"):
            self.saver.save(
                checkpoint.collect_tensors(self.models, self.optimizer),
                checkpoint.CheckpointMetadata(
                    step=self.step,
                    world=self.world.size,
                    settings=self.run.model_dump(mode="json"),
                    settings_hash=settings_hash(self.run),
                    manifests=self.manifests,
                    wandb_id=self.track.wandb_id,
                    versions=versions(),
                    passed_over=self.passed_over,
                ),
            )


@contextmanager
def start(run: Run, folder: Path, world: World) -> Iterator[Attempt]:
    """Build the pieces, bring them to where the last attempt stopped, and close them at the end."""
    check_program(run, world)
    home = checkpoint.checkpoint_dir(folder, run.checkpoint)
    newest = checkpoint.find_newest(home, world)
    if newest is None:
        world.first(lambda: checkpoint.check_moved(folder, home))
    facts = checkpoint.read_metadata(newest) if newest else None
    step = facts.step if facts else 0
    with ExitStack() as at_end:
        dog = at_end.enter_context(watchdog(run.health, folder, world))
        skips = world.first(lambda: skipped_batches.read(folder)) or (facts.passed_over if facts else ())
        plan = open_plan(run.data, seed=run.seed, batch_size=run.batch_size, loader=run.loader)
        stream = skipped_batches.Stream(
            lambda at: open_clips(run, plan, folder, world, at), step=step, passed_over=skips
        )
        clips = at_end.enter_context(closing(stream))
        manifests = check_data(run, world, plan, number=skipped_batches.batch_of(step, skips))
        changes = {}
        if facts:
            changes = check_changes(facts.settings, run, step=step, manifests=manifests, manifests_then=facts.manifests)
        models = build_models(run, world)
        optimizer = build_optimizer(models.learning, run.optim)
        origin = newest or world.first(lambda: checkpoint.resolve(to_path(run.start)) if run.start else None)
        if origin:
            checkpoint.load_into(checkpoint.collect_tensors(models, optimizer), origin, world)
        world.first(lambda: write_settings(folder, run))
        world.first(lambda: record_attempt(folder, step=step, world=world, changes=changes))
        if world.is_first:
            log.info("step %d of %d, %s", step, run.steps, f"from {origin}" if origin else "from new weights")
            for name, (old, new) in changes.items():
                log.info("changed since step %d: %s was %s, is %s", step, name, old, new)
        track = RunLogger(run, folder, world, step=step, wandb_id=facts.wandb_id if facts else None)
        at_end.push(lambda kind, *_: track.close(1 if kind else 0))
        nurse = HealthMonitor(run.health, track.alert)
        nurse.recall(world.first(lambda: read_history(folder / "metrics.jsonl")))
        clock = Clock(models, optimizer, world.device)
        at_end.callback(clock.close)
        saver = CheckpointManager(folder, run.checkpoint, world, newest=newest, on_saved=track.refer_to)
        at_end.callback(saver.wait)
        at_end.enter_context(quiet_garbage())
        yield Attempt(
            run=run,
            world=world,
            models=models,
            optimizer=optimizer,
            batches=clock.waiting("data", ahead(clips, world.device)),
            step=step,
            saver=saver,
            track=track,
            passed_over=skips,
            nurse=nurse,
            dog=dog,
            clock=clock,
            manifests=manifests,
            meter=Meter(run, world),
            observer=at_end.enter_context(closing(PeriodicTasks(run, folder, world, models, track))),
        )


def build_models(run: Run, world: World) -> Models:
    """The three networks, spread over the ranks, with the first weights of this seed."""
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    stacks = (run.model.encoder, run.model.predictor)
    attention = choose(
        run.parallel.attention,
        world.device,
        dtype,
        head_widths=[stack.width // stack.heads for stack in stacks],
        compiled=run.parallel.compile,
        causal=run.model.causal,
    )
    with torch.device("meta"):
        models = build(run, attention=attention)
    shard(models, run.parallel, mesh=world.mesh, dtype=dtype)
    materialise(models, torch.device("cpu") if run.parallel.offload else world.device, seed=run.seed)
    return models


def open_clips(run: Run, plan: Plan, folder: Path, world: World, step: int) -> ClipLoader:
    """The stream of this rank's clips, from the batch of a step on."""
    return ClipLoader(
        run.data,
        run.loader,
        seed=run.seed,
        batch_size=run.batch_size,
        rank=world.rank,
        world=world.size,
        ranks_here=world.ranks_here,
        step=step,
        folder=folder,
        stall_s=run.health.stall_s,
        plan=plan,
    )


@contextmanager
def quiet_garbage() -> Iterator[None]:
    """Let no rank stop to collect garbage when it pleases; `Attempt.record` does, on all ranks at the same step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
