"""The training loop: an optimizer update per step, in the order in which things happen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vjepa.config import Run
from vjepa.distributed.sharding import forget_forwards, mark_updated, synchronise_gradients
from vjepa.distributed.world import World
from vjepa.engine.attempt import Attempt
from vjepa.engine.optimizer import update_weights
from vjepa.engine.schedule import rates_at
from vjepa.engine.signals import STOPPED, Stop
from vjepa.methods.base import Loss


def train_steps(run: Run, attempt: Attempt, stop: Stop) -> int:
    """Train until the last step or until a stop is requested.

    Returns:
        Exit code: 0 done, 75 saved and stopped (requeue to resume).
    """
    method, networks, world, timer = attempt.method, attempt.networks, attempt.world, attempt.timer
    while attempt.step < run.steps and not stop.agreed():
        batch, rates = next(attempt.batches), rates_at(attempt.step, run)
        losses: list[Loss] = []
        for part in batch.split(run.parallel.accumulate):
            with timer.part("prepare"):
                inputs = method.prepare(part, world.device)
            with timer.part("forward"):
                loss = method.loss(networks, inputs, step=attempt.step)
            with timer.part("backward"):
                synchronise_gradients(networks, now=len(losses) + 1 == run.parallel.accumulate)
                (loss.value * world.size).backward()  # FSDP2 averages over ranks, and our loss is a sum
            losses.append(loss)
        forget_forwards(networks)
        metrics = sum_metrics(losses, world, stop)
        with timer.part("optimizer"):
            update = update_weights(attempt.optimizer, metrics["total"], rates, clip_norm=run.optim.clip_norm)
            method.after_update(networks, ema=rates.ema, applied=update.applied)
            mark_updated(networks, world.device)
        attempt.step += 1
        attempt.record(metrics, losses, rates, update, batch)
        if attempt.checkpoints.is_due(attempt.step):
            attempt.save()
    attempt.save()
    return 0 if attempt.step == run.steps else STOPPED


def sum_metrics(losses: Sequence[Loss], world: World, stop: Stop | None = None) -> dict[str, Tensor]:
    """Sum the loss and its named parts over micro-batches and ranks, and the votes to stop, in one message.

    Returns:
        `total` and the names of `Loss.metrics` and `Loss.ratios`. With `baseline`, `explained` is the share that the
        model explains.
    """
    names = ["total", *losses[0].metrics]
    assert all([*loss.metrics] == names[1:] for loss in losses), "micro-batches report different metrics"
    parts = torch.stack([torch.stack([loss.value.detach(), *loss.metrics.values()]) for loss in losses])
    numbers = parts.sum(0)
    if stop is not None and world.size > 1:
        *sums, votes = world.sum(torch.cat((numbers, numbers.new_full((1,), stop.vote))))
        stop.count(votes)
    else:
        sums = world.sum(numbers)
    metrics = dict(zip(names, sums, strict=True))
    metrics |= {name: metrics[over] / metrics[under] for name, (over, under) in losses[0].ratios.items()}
    if "baseline" in metrics:
        metrics["explained"] = 1 - metrics["total"] / metrics.pop("baseline")
    return metrics
