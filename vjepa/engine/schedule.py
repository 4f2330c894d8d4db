"""Schedules of the rates: pure functions of the step, without state."""

import math
from dataclasses import dataclass

from vjepa.config import Optim, Run


@dataclass(frozen=True)
class Rates:
    """Rates of an optimizer update."""

    lr: float
    weight_decay: float
    ema: float


def rates_at(step: int, run: Run) -> Rates:
    """Return the rates of the update made in `step`, counted from 0.

        lr     start_lr /‾‾‾ cosine | linear | constant \\ final_lr
               0      warmup_steps                 steps - 1

    The first update uses `start_lr`, the first after the warm-up `lr`, the last `final_lr`. The ends are reached,
    unlike in V-JEPA 2, which stretches its schedules by 1.25.

    Args:
        step: number of earlier updates, in 0 .. steps - 1.
        run: the run, for `steps` and `optim`.

    Source: V-JEPA 2 (arXiv:2506.09985), section 2: linear warm-up, constant rate, linear cooldown. The cosine is from
    V-JEPA (arXiv:2404.08471).
    """
    optim, last = run.optim, run.steps - 1
    done = step / last if last else 1.0
    return Rates(
        lr=_lr(step, last, optim),
        weight_decay=_cosine(optim.weight_decay, _or(optim.final_weight_decay, optim.weight_decay), done),
        ema=_linear(optim.ema, _or(optim.final_ema, optim.ema), done),
    )


def _lr(step: int, last: int, optim: Optim) -> float:
    if step < optim.warmup_steps:
        return _linear(optim.start_lr, optim.lr, step / optim.warmup_steps)
    if optim.decay == "constant":
        return optim.lr
    left = last - optim.warmup_steps
    done = (step - optim.warmup_steps) / left if left > 0 else 1.0
    shape = _cosine if optim.decay == "cosine" else _linear
    return shape(optim.lr, optim.final_lr, done)


def _linear(start: float, end: float, done: float) -> float:
    return start + (end - start) * done


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
