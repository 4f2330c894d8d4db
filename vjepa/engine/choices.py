"""Choices that depend on the machine: measured once by rank 0, kept in the run folder, used by all ranks and attempts.

RUN/choices.json    {"decoder": {"choice": "pyav", "measured": {...}}, "attention": {...}}
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vjepa.atomic import new_file
from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.nn.attention import Backend, measure, refusal
from vjepa.nn.grid import Grid
from vjepa_data.reader.decoder_choice import choose_decoder
from vjepa_data.reader.plan import Plan
from vjepa_data.settings import Loader

log = logging.getLogger(__name__)

Measure = Callable[[], tuple[str, Mapping[str, Any]]]
"""Returns a choice, and everything that was measured."""


def decoder_of(run: Run, plan: Plan, folder: Path, world: World) -> Loader:
    """Return the settings of the loader with a decoder in the place of `auto`."""
    if run.loader.decoder != "auto":
        return run.loader

    def measured() -> tuple[str, Mapping[str, Any]]:
        found = choose_decoder(plan, run.data, run.loader)
        return found.decoder, {"cpu_ms": found.cpu_ms, "refused": found.refused}

    name = world.first(lambda: _once(folder, "decoder", measured))
    return Loader.model_validate(run.loader.model_dump() | {"decoder": name})


def attention_of(run: Run, folder: Path, world: World) -> Backend | None:
    """Return the attention backend for `auto` where more than one works on all ranks, else None.

    The others are compared on the shapes of the first step. A later attempt takes the choice of the first, so that its
    results are the same.
    """
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    if run.parallel.attention != "auto" or world.device.type != "cuda":
        return None
    shapes = step_shapes(run, clips=run.batch_size // world.size // run.parallel.accumulate)
    widths = [width for _, _, width in shapes]
    named: tuple[Backend, ...] = ("varlen", "xformers")
    own: list[Backend] = [
        name
        for name in named
        if refusal(
            name, world.device, dtype, head_widths=widths, compiled=run.parallel.compile, causal=run.model.causal
        )
        is None
    ]
    usable: list[Backend] = [name for name in own if all(name in others for others in world.gather(own))]
    if not usable or all(len(runs) == 1 for runs, _, _ in shapes):
        return "sdpa"
    candidates: list[Backend] = ["sdpa", *usable]
    return world.first(lambda: _backend(folder, candidates, shapes, world.device, dtype))


def step_shapes(run: Run, *, clips: int) -> list[tuple[list[tuple[int, int]], int, int]]:
    """Return the sequences of a step in each stack that attends: runs, heads, and channels of a head.

    A method without masks has runs of one length, which every backend computes as sdpa does.

    Args:
        run: the run.
        clips: clips of a micro-batch of a rank.
    """
    from vjepa.methods.masking import sample_masks

    px, size = run.data.crop.px, run.model
    grid = Grid.of(run.data.clip.frames, px, px, size)
    masks = sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=0, slots=range(clips))
    seen = [(len(mask.rows), mask.visible.shape[1]) for mask in masks] or [(clips, grid.tokens)]
    asked = [(len(mask.rows), mask.visible.shape[1] + mask.hidden.shape[1]) for mask in masks] or seen
    stacks = ((seen, size.encoder), (asked, size.predictor))
    return [(runs, stack.heads, stack.width // stack.heads) for runs, stack in stacks]


def _backend(
    folder: Path,
    candidates: list[Backend],
    shapes: list[tuple[list[tuple[int, int]], int, int]],
    device: torch.device,
    dtype: torch.dtype,
) -> Backend:
    """Return the choice of an earlier attempt if it still works, else the fastest backend."""

    def measured() -> tuple[str, Mapping[str, Any]]:
        ms = {
            name: sum(
                measure(name, runs, heads=heads, head_width=width, device=device, dtype=dtype)
                for runs, heads, width in shapes
            )
            for name in candidates
        }
        return min(ms, key=lambda name: ms[name]), {"ms": ms}

    name = _once(folder, "attention", measured, among=candidates)
    return next(each for each in candidates if each == name)


def _once(folder: Path, name: str, measure: Measure, among: list[Any] | None = None) -> str:
    """Return the choice that the run folder records. Measure and record one if there is none that is possible."""
    file = folder / "choices.json"
    made = json.loads(file.read_text()) if file.is_file() else {}
    if name in made and (among is None or made[name]["choice"] in among):
        return made[name]["choice"]
    choice, measured = measure()
    made[name] = {"choice": choice, "measured": measured}
    with new_file(file, overwrite=True) as partial:
        partial.write_text(json.dumps(made, indent=1) + "\n")
    log.info("%s: %s, measured here: %s", name, choice, json.dumps(measured))
    return choice
