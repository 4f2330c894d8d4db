"""Measure the time to draw masks for 24 clips of 16 frames at 256 px, by mode, and with V-JEPA 2's sampler.

    VJEPA2_REFERENCE=/path/to/vjepa2 python benchmarks/masks.py

Both kinds of a pretraining run (8 rectangles of 0.15, 2 of 0.7), one thread: the median of 50 batches, and the least.
"""

import statistics
import time
from collections.abc import Callable

import torch
from reference import folder, reference, sampler

from vjepa.methods.mask_settings import BLOCKS, CausalMask, Mask, RandomMask, ReferenceMask, TubeMask
from vjepa.methods.masking import sample_masks
from vjepa.nn.grid import Grid

GRID, CLIPS, BATCHES = Grid(8, 16, 16), 24, 50

MODES: dict[str, list[Mask]] = {
    "balanced": [*BLOCKS],
    "reference": [
        ReferenceMask(blocks=8, spatial_scale=(0.15, 0.15)),
        ReferenceMask(blocks=2, spatial_scale=(0.7, 0.7)),
    ],
    "random": [RandomMask(visible_share=0.05)] * 2,
    "tube": [TubeMask(visible_share=0.1)] * 2,
    "causal": [CausalMask(visible_tubelets=4)] * 2,
}


def main() -> None:
    torch.set_num_threads(1)
    for name, kinds in MODES.items():
        report(name, lambda step, kinds=kinds: sample_masks(kinds, GRID, seed=0, step=step, slots=range(CLIPS)))
    if folder():
        with reference():
            kinds = [sampler(kind, GRID) for kind in MODES["reference"] if isinstance(kind, ReferenceMask)]
            report("V-JEPA 2's sampler", lambda step: [kind(CLIPS) for kind in kinds])


def report(name: str, sample: Callable[[int], object]) -> None:
    times = []
    for step in range(BATCHES):
        start = time.perf_counter()
        sample(step)
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{name:20} {statistics.median(times):6.2f} ms, least {min(times):6.2f} ms")


if __name__ == "__main__":
    main()
