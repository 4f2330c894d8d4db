"""Settings that may change between two attempts of a run, since they leave the steps already made unchanged."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vjepa.checkpoints import storage
from vjepa.checkpoints.checkpoint import check_moved
from vjepa.config import Run
from vjepa.engine.schedule import rates_at
from vjepa_data.config_files import move_renamed
from vjepa_data.settings import BadInput
from vjepa_launch.history import check_checkpoints_exist
from vjepa_launch.settings import BadLaunch

# Name, place, speed and logging. The folders of shards may change too: their hashes tell whether they are the same.
HARMLESS = ("name", "parallel.", "loader.", "checkpoint.", "track.", "health.", "data.rejects.", "start")
# Settings of the schedule: harmless if they give the rates that were used.
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
    """Compare the settings of a checkpoint with the settings of the resumed run.

    Args:
        then: resolved settings in the checkpoint.
        run: settings now.
        step: updates made until the checkpoint.
        manifests: hashes of the corpora now.
        manifests_then: hashes of the corpora in the checkpoint.

    Returns:
        Harmless changes, for the record: {name: [then, now]}.

    Raises:
        BadInput: a change does not fit the steps already made.
    """
    if list(manifests) != list(manifests_then):
        raise BadInput(
            f"the corpora changed since step {step} (their manifests were {list(manifests_then)}, are "
            f"{list(manifests)}). Restore the old corpora, or give another folder with --out (and start=CHECKPOINT to "
            f"begin from these weights)."
        )
    then = move_renamed(dict(then), Run.renamed)
    before, now = dict(_flatten(then)), dict(_flatten(run.model_dump(mode="json")))
    changes = {name: [before[name], now.get(name)] for name in before if before[name] != now.get(name)}
    for name, (old, new) in changes.items():
        if name.startswith(HARMLESS) or (name.startswith("data.sources.") and name.endswith(".shards")):
            continue
        if name.endswith(".without") and old and new and os.path.abspath(old) == os.path.abspath(new):
            continue
        if name in SCHEDULE and _same_past(then, run, step):
            continue
        why = "past steps would have used other rates" if name in SCHEDULE else "past steps would differ"
        raise BadInput(
            f"{name} was {old} when step {step} was saved and is {new} now: {why}. Set it back, or give another folder "
            f"with --out (and start=CHECKPOINT to begin it from these weights)."
        )
    return changes


def check_checkpoints(folder: Path, home: Path) -> None:
    """Check that a run without checkpoints never had any. Starting at step 0 would lose them and its record silently.

    Args:
        folder: folder of the run.
        home: folder of its checkpoints, which holds none.

    Raises:
        BadInput: there are some elsewhere, or the record of the run tells of some.
    """
    check_moved(folder, home)
    if storage.is_remote(home) and storage.children(home):
        return  # all of them were set aside
    try:
        check_checkpoints_exist(folder, home)
    except BadLaunch as error:
        raise BadInput(str(error)) from None


def _same_past(then: Mapping[str, Any], run: Run, step: int) -> bool:
    """Return whether both settings give the same rates for all steps already made."""
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
