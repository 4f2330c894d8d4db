"""Before the first step all ranks compare what they are about to do, by a few hashes, and name who differs."""

import hashlib
import importlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from vjepa.checkpoints.run_folder import settings_hash
from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid
from vjepa_data.reader.clip_times import EligibleSamples
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.reader.plan import Plan
from vjepa_data.settings import BadInput

ROOMS = ("vjepa", "vjepa_data", "vjepa_launch")


def check_alike(world: World, facts: Mapping[str, str]) -> None:
    """Make sure that all ranks are about to do the same thing.

    Args:
        world: the ranks.
        facts: what must be equal everywhere, by what it is called.

    Raises:
        BadInput: on every rank, naming the ranks that differ from most others, and in what.
    """
    everyone = world.gather(dict(facts))
    for name in facts:
        values = [one[name] for one in everyone]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            raise BadInput(
                f"rank {', '.join(map(str, odd[:8]))} differs from the others in {name} "
                f"({values[odd[0]]} where the others have {usual}); start all ranks with the same one"
            )


def check_program(run: Run, world: World) -> None:
    """Make sure that all ranks have the same settings, code and torch.

    Raises:
        BadInput: see `check_alike`.
    """
    check_alike(world, {"settings": settings_hash(run), "code": code_digest(), "torch": torch.__version__})


def check_data(run: Run, world: World, plan: Plan, *, number: int) -> list[str]:
    """Make sure that all ranks see the same corpora, plan and first batch.

    Args:
        run: the run.
        world: the ranks.
        plan: of this rank.
        number: of the first batch.

    Returns:
        Hash of the manifest of each source.

    Raises:
        BadInput: see `check_alike`.
    """
    manifests = [cast(EligibleSamples, population).index.hash for population in plan.populations]
    check_alike(
        world,
        {
            "the corpora": str(manifests),
            "the plan of samples": plan.fingerprint,
            "the first batch": first_batch(run, plan, number=number),
        },
    )
    return manifests


def code_digest() -> str:
    """One word for all code of ours that this process would run, of the three rooms."""
    hasher = hashlib.blake2b(digest_size=8)
    for room in ROOMS:
        place = Path(str(importlib.import_module(room).__file__)).parent
        for file in sorted(place.rglob("*.py")):
            hasher.update(str(file.relative_to(place)).encode() + file.read_bytes())
    return hasher.hexdigest()


def first_batch(run: Run, plan: Plan, *, number: int) -> str:
    """One word for a batch as this rank would see it: which samples, their pixels, what is hidden of them.

    Pixels are those of the first lane alone, decoded by every rank: another version of a decoder or a scaler shows.

    Args:
        run: the run.
        plan: of its samples.
        number: of the batch.

    Raises:
        BadInput: the data cannot be read.
    """
    loader = run.loader.model_copy(update={"workers": 0})
    draws = [str(plan.draw(number, slot)) for slot in range(run.batch_size)]
    with ClipLoader(
        run.data, loader, seed=run.seed, batch_size=run.batch_size, rank=0, world=plan.lanes, step=number, plan=plan
    ) as clips:
        batch = next(clips).on(torch.device("cpu"))  # scaled there, whoever scales later
    hasher = hashlib.blake2b("\n".join(draws).encode(), digest_size=8)
    for group in batch.groups:
        hasher.update(group.frames.numpy().tobytes())
        still = group.frames.shape[1] == 1 and not run.model.still_tokens
        frames = run.model.tubelet_frames if still else group.frames.shape[1]
        grid = Grid.of(frames, run.data.crop.px, run.data.crop.px, run.model)
        for mask in sample_masks(run.masks, grid, seed=run.seed, step=number, slots=group.slots):
            hasher.update(torch.cat((mask.visible, mask.hidden), dim=1).numpy().tobytes())
    return hasher.hexdigest()


def _word(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
