"""Before the first step all ranks compare hashes of code, settings and data, and name the ranks that differ."""

import hashlib
import importlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from vjepa.checkpoints.run_folder import settings_hash
from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import clip_grid
from vjepa_data.reader.clip_times import EligibleSamples
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.reader.plan import Plan
from vjepa_data.settings import BadInput

ROOMS = ("vjepa", "vjepa_data", "vjepa_launch")


def check_alike(world: World, facts: Mapping[str, str]) -> None:
    """Check that a set of facts is equal on all ranks.

    Args:
        world: the ranks.
        facts: name of each fact and its value on this rank.

    Raises:
        BadInput: on every rank, with the ranks that differ from the majority and the fact.
    """
    everyone = world.gather(dict(facts))
    for name in facts:
        values = [one[name] for one in everyone]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            raise BadInput(
                f"rank {', '.join(map(str, odd[:8]))} differs from the other ranks in {name} "
                f"({values[odd[0]]}, elsewhere {usual}). Start all ranks with the same settings, code and data."
            )


def check_frozen_code() -> None:
    """Check that this process runs the code that was frozen for its run, if `vjepa launch` started it.

    Raises:
        BadInput: another copy of a package came first on the path.
    """
    frozen = os.environ.get("VJEPA_CODE")
    for room in ROOMS if frozen else ():
        place = Path(str(importlib.import_module(room).__file__)).resolve().parent
        if place.parent != Path(str(frozen)).resolve():
            raise BadInput(
                f"this rank runs {room} from {place.parent} and not the frozen code in {frozen}. See to PYTHONPATH, "
                f".pth files and the profile's `python` and `setup`."
            )


def check_program(run: Run, world: World) -> None:
    """Check that all ranks have the same settings, code and torch.

    Raises:
        BadInput: see `check_alike`.
    """
    check_alike(world, {"settings": settings_hash(run), "code": code_digest(), "torch": torch.__version__})


def check_data(run: Run, world: World, plan: Plan, *, number: int) -> list[str]:
    """Check that all ranks see the same corpora, plan and first batch.

    Args:
        run: the run.
        world: the ranks.
        plan: plan of this rank.
        number: number of the first batch.

    Returns:
        The hash of the manifest of each source.

    Raises:
        BadInput: see `check_alike`.
    """
    manifests = [cast(EligibleSamples, population).index.hash for population in plan.sources]
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
    """Return a hash of the code of the three packages that this process runs."""
    hasher = hashlib.blake2b(digest_size=8)
    for room in ROOMS:
        place = Path(str(importlib.import_module(room).__file__)).parent
        for file in sorted(place.rglob("*.py")):
            hasher.update(str(file.relative_to(place)).encode() + file.read_bytes())
    return hasher.hexdigest()


def first_batch(run: Run, plan: Plan, *, number: int) -> str:
    """Return a hash of a batch as this rank would see it: samples, pixels and masks.

    Every rank decodes the pixels of the first lane, so that a different version of a decoder or of the resize shows.

    Args:
        run: the run.
        plan: the plan of samples.
        number: number of the batch.

    Raises:
        BadInput: the data cannot be read.
    """
    loader = run.loader.model_copy(update={"workers": 0})
    draws = [str(plan.draw(number, slot)) for slot in range(run.batch_size)]
    with ClipLoader(
        run.data, loader, seed=run.seed, batch_size=run.batch_size, rank=0, world=plan.lanes, step=number, plan=plan
    ) as clips:
        batch = next(clips).on(torch.device("cpu"))  # resized on the CPU, wherever training resizes
    hasher = hashlib.blake2b("\n".join(draws).encode(), digest_size=8)
    for group in batch.groups:
        for tensor in group.tensors:  # the frames, then the signals
            hasher.update(tensor.numpy().tobytes())
        grid = clip_grid(group.frames.shape[1], run.data.crop.px, run.model)
        for mask in sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=number, slots=group.slots):
            hasher.update(torch.cat((mask.visible, mask.hidden), dim=1).numpy().tobytes())
    return hasher.hexdigest()
