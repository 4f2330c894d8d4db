"""Build everything that a run needs, bring it to where the last attempt stopped, and train."""

import gc
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from vjepa.checkpoints import checkpoint
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.checkpoints.run_folder import occupy, record_attempt, write_settings
from vjepa.checkpoints.storage import to_path
from vjepa.config import Run
from vjepa.distributed.failure import reporting_failures
from vjepa.distributed.sharding import check_filled, materialise, shard
from vjepa.distributed.world import World, join
from vjepa.engine import skipped_batches
from vjepa.engine.attempt import Attempt
from vjepa.engine.choices import attention_of, decoder_of
from vjepa.engine.loop import train_steps
from vjepa.engine.optimizer import build_optimizer
from vjepa.engine.rank_consistency import check_data, check_frozen_code, check_program
from vjepa.engine.resume import check_changes, check_checkpoints
from vjepa.engine.rollback import roll_back
from vjepa.engine.signals import Stop, stop_signals
from vjepa.methods.base import Method, Networks, create_method
from vjepa.monitoring.health import Collapsed, HealthMonitor, Unhealthy, read_history
from vjepa.monitoring.logger import RunLogger, logging_to
from vjepa.monitoring.periodic import PeriodicTasks
from vjepa.monitoring.stall_watchdog import StallWatchdog
from vjepa.monitoring.throughput import Throughput
from vjepa.monitoring.timers import StepTimer
from vjepa.nn.attention import Backend, choose
from vjepa.threads import available_cores
from vjepa_data.reader.device_prefetch import ahead
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.reader.pipeline import open_plan
from vjepa_data.reader.plan import Plan
from vjepa_data.reader.signals import described_signals
from vjepa_data.settings import Loader

log = logging.getLogger(__name__)

MEMORY_ADVICE = (
    "The device is out of memory. Try in this order: parallel.accumulate=2 (or more) halves the clips in memory and "
    "keeps the result; parallel.recompute=selective, then full, trades compute for memory; parallel.replicate=1 shards "
    "over all ranks; parallel.offload=true keeps shards in host memory. `vjepa estimate` says what each would need."
)


def train(run: Run, folder: Path) -> int:
    """Train a model from the end of the last attempt to the last step.

    Args:
        run: all settings.
        folder: folder of the run. A folder with checkpoints is resumed.

    Returns:
        Exit code: 0 done, 75 saved and stopped (requeue to resume).

    Raises:
        BadInput: the folder is in use, the data is missing, or settings do not fit the checkpoint.
        Unhealthy: the run diverged or collapsed, also after going back to a checkpoint.
    """
    check_frozen_code()
    run = run.with_absolute_paths()
    with join(run.parallel) as world:
        run.check_ranks(world.size)
        with occupy(folder, world), logging_to(folder / "log.txt", world), stop_signals(world) as stop:
            return train_with_roll_backs(run, folder, world, stop)


def train_with_roll_backs(run: Run, folder: Path, world: World, stop: Stop) -> int:
    """Train, and go back to a healthy checkpoint as often as the settings allow. See `train`."""
    for left in reversed(range(run.health.roll_backs + 1)):
        try:
            with start(run, folder, world) as attempt:
                return train_steps(run, attempt, stop)
        except Unhealthy as error:
            if not left:
                raise
            log.warning("%s", error)
            roll_back(run, folder, world, healthy=error.healthy, last=error.last)
        except torch.OutOfMemoryError as error:
            error.add_note(MEMORY_ADVICE)
            raise
    raise AssertionError("not reached")


@contextmanager
def start(run: Run, folder: Path, world: World) -> Iterator[Attempt]:
    """Build an attempt, restore the newest checkpoint, and close everything at the end.

    The failure of a rank is reported before anything is closed, and a checkpoint being written is then not awaited.
    """
    if world.is_first:
        ranks = f"{world.size} ranks" if world.size > 1 else "1 rank"
        log.info("starting %s in %s: checking settings, code and data of %s", run.name, folder, ranks)
    check_program(run, world)
    directory = checkpoint.checkpoint_dir(folder, run.checkpoint)
    newest = checkpoint.find_newest(directory, world)
    if newest is None:
        world.first(lambda: check_checkpoints(folder, directory))
    metadata = checkpoint.read_metadata(newest) if newest else None
    step = metadata.step if metadata else 0
    agreed = (Unhealthy, Collapsed)
    with ExitStack() as at_end, reporting_failures(ranks=world.size, agreed=agreed):
        watchdog = at_end.enter_context(closing(StallWatchdog(run.health, folder, world)))
        skipped = world.first(lambda: skipped_batches.read(folder)) or (metadata.passed_over if metadata else ())
        plan = open_plan(run.data, seed=run.seed, batch_size=run.batch_size, loader=run.loader)
        loader = decoder_of(run, plan, folder, world)
        stream = skipped_batches.Stream(
            lambda batch: open_clips(run, plan, folder, world, batch, loader), step=step, skipped=skipped
        )
        clips = at_end.enter_context(closing(stream))
        manifests = check_data(run, world, plan, number=skipped_batches.batch_of(step, skipped))
        changes = {}
        if metadata:
            changes = check_changes(
                metadata.settings, run, step=step, manifests=manifests, manifests_then=metadata.manifests
            )
        origin = newest or world.first(lambda: checkpoint.resolve(to_path(run.start)) if run.start else None)
        method, networks = build_networks(run, world, attention_of(run, folder, world), draw=origin is None)
        optimizer = build_optimizer(networks.trained, run.optim)
        if origin:
            checkpoint.load_into(checkpoint.collect_tensors(networks, optimizer), origin, world)
            check_filled(networks)
        world.first(lambda: write_settings(folder, run))
        world.first(lambda: record_attempt(folder, step=step, world=world, changes=changes))
        if world.is_first:
            log.info("step %d of %d, %s", step, run.steps, f"from {origin}" if origin else "from new weights")
            for name, (old, new) in changes.items():
                log.info("changed since step %d: %s was %s, is %s", step, name, old, new)
        logger = RunLogger(run, folder, world, step=step, wandb_id=metadata.wandb_id if metadata else None)
        at_end.push(lambda kind, *_: logger.close(1 if kind else 0))
        health = HealthMonitor(run.health, logger.alert)
        health.restore(world.first(lambda: read_history(folder / "metrics.jsonl")))
        checkpoints = CheckpointManager(folder, run.checkpoint, world, newest=newest, on_saved=logger.refer_to)
        wait_after = (type(None), *agreed) if world.size > 1 else (type(None), BaseException)
        at_end.push(lambda kind, error, _: checkpoints.wait() if isinstance(error, wait_after) else None)
        at_end.enter_context(manual_garbage_collection())
        timer = StepTimer(world.device)
        yield Attempt(
            run=run,
            world=world,
            method=method,
            networks=networks,
            optimizer=optimizer,
            batches=timer.waiting("data", ahead(clips, world.device)),
            step=step,
            skipped=skipped,
            checkpoints=checkpoints,
            logger=logger,
            health=health,
            watchdog=watchdog,
            timer=timer,
            manifests=manifests,
            signals=described_signals(run.data.signals, plan),
            throughput=Throughput(run, world),
            periodic=at_end.enter_context(closing(PeriodicTasks(run, folder, world, networks, logger))),
        )


def build_networks(
    run: Run, world: World, attention: Backend | None = None, *, draw: bool = True
) -> tuple[Method, Networks]:
    """Return the method and its networks, sharded over the ranks, with the initial weights of the run's seed.

    Args:
        run: the settings.
        world: the ranks.
        attention: backend in the place of that of the settings.
        draw: whether to draw the initial weights. Otherwise a checkpoint must fill them.
    """
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    stacks = (run.model.encoder, run.model.predictor)
    attention = choose(
        attention or run.parallel.attention,
        world.device,
        dtype,
        head_widths=[stack.width // stack.heads for stack in stacks],
        compiled=run.parallel.compile,
        causal=run.model.causal,
    )
    method = create_method(run)
    with torch.device("meta"):
        networks = method.build(attention)
    shard(networks, run.parallel, mesh=world.mesh, dtype=dtype, fixed_shapes=run.has_fixed_shapes)
    home = torch.device("cpu") if run.parallel.offload else world.device
    if home != world.device:
        # `vjepa launch` gives a process one thread. AdamW on the host would take 0.3 s for 100 million parameters.
        torch.set_num_threads(max(1, available_cores() // world.ranks_here))
    materialise(networks, home, seed=run.seed if draw else None)
    return method, networks


def open_clips(
    run: Run, plan: Plan, folder: Path, world: World, batch: int, loader: Loader | None = None
) -> ClipLoader:
    """Open this rank's stream of clips at the number of a batch, with the loader of the settings or another."""
    return ClipLoader(
        run.data,
        loader or run.loader,
        seed=run.seed,
        batch_size=run.batch_size,
        rank=world.rank,
        world=world.size,
        ranks_here=world.ranks_here,
        step=batch,
        folder=folder,
        stall_s=run.health.stall_s,
        plan=plan,
    )


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Disable automatic garbage collection. `Attempt.record` collects on all ranks at the same step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
