"""What may change between two attempts of one run: what leaves the steps already made as they were."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from vjepa.config import Run
from vjepa.engine.schedule import rates_at
from vjepa_data.settings import BadInput

# Who, where, how fast, how often recorded. Where shards lie may change too: their hash says whether they are the same.
HARMLESS = ("name", "parallel.", "loader.", "checkpoint.", "track.", "health.", "data.rejects.", "start")
# Numbers of the schedule: harmless if they would have given the rates that were used.
SCHEDULE = (
    "steps",
    "optim.lr",
    "optim.start_lr",
    "optim.final_lr",
    "optim.warmup_steps",
    "optim.decay",
    "optim.weight_decay",
    "optim.final_weight_decay",
    "optim.ema",
    "optim.final_ema",
)


def check_changes(
    then: Mapping[str, Any], run: Run, *, step: int, manifests: Sequence[str], manifests_then: Sequence[str]
) -> dict[str, list[Any]]:
    """Compare the settings of a checkpoint with those that it should go on with.

    Args:
        then: settings in the checkpoint, resolved.
        run: settings now.
        step: updates made until the checkpoint.
        manifests: hashes of the corpora now.
        manifests_then: and then.

    Returns:
        Harmless changes, to be recorded: {name: [then, now]}.

    Raises:
        BadInput: a change would make the steps already made those of another run.
    """
    if list(manifests) != list(manifests_then):
        raise BadInput(
            f"the corpora changed since step {step} (their manifests were {list(manifests_then)}, are "
            f"{list(manifests)}); bring the old ones back, or give another folder with --out (and start=CHECKPOINT to "
            f"begin it from these weights)"
        )
    before, now = dict(_flatten(then)), dict(_flatten(run.model_dump(mode="json")))
    changes = {name: [before[name], now.get(name)] for name in before if before[name] != now.get(name)}
    for name, (old, new) in changes.items():
        if name.startswith(HARMLESS) or (name.startswith("data.sources.") and name.endswith(".shards")):
            continue
        if name in SCHEDULE and _same_past(then, run, step):
            continue
        why = "other rates would have been used" if name in SCHEDULE else "it would be another run"
        raise BadInput(
            f"{name} was {old} when step {step} was saved and is {new} now: {why}; set it back, or give another folder "
            f"with --out (and start=CHECKPOINT to begin it from these weights)"
        )
    return changes


def _same_past(then: Mapping[str, Any], run: Run, step: int) -> bool:
    """Whether both settings give the same rates for all steps that were made."""
    try:
        old = Run.model_validate(then)
    except ValidationError:  # written by another version
        return False
    return all(rates_at(s, old) == rates_at(s, run) for s in range(step))


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(one, Mapping) for one in tree):
        items = enumerate(tree)
    else:
        yield prefix.removesuffix("."), tree
        return
    for name, value in items:
        yield from _flatten(value, f"{prefix}{name}.")
