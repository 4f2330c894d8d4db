"""The stream in words: which sample, time and crop fill the first slots of a step. A person can check it by hand."""

from dataclasses import dataclass

from vjepa_data.reader.pipeline import Choice, choose, index_of, open_plan
from vjepa_data.settings import Data


@dataclass(frozen=True)
class Row:
    """What fills one slot."""

    slot: int
    source: int
    key: str
    url: str
    offset: int
    """Where the video's bytes begin in the shard."""

    epoch: int
    choice: Choice


def rows(data: Data, *, seed: int, batch_size: int, step: int = 0, slots: int = 5) -> tuple[str, list[Row]]:
    """Compute what fills the first slots of a step; nothing is read but the index.

    Returns:
        The fingerprint of the plan, and a row for each slot.

    Raises:
        BadInput: a corpus is missing or offers nothing; the lanes do not divide the batch.
    """
    plan = open_plan(data, seed=seed, batch_size=batch_size)
    found = []
    for slot in range(min(slots, batch_size)):
        draw = plan.draw(step, slot)
        index, i = index_of(plan, draw), draw.sample
        choice = choose(plan, data.crop, draw, step=step, slot=slot)
        found.append(Row(slot, draw.source, index.key(i), index.url(i), int(index.video_offset[i]), draw.epoch, choice))
    return plan.fingerprint, found


def stream(data: Data, *, seed: int, batch_size: int, step: int = 0, slots: int = 5) -> str:
    """Print the first slots of a step: what `vjepa show CONFIG --stream SLOTS` says."""
    fingerprint, found = rows(data, seed=seed, batch_size=batch_size, step=step, slots=slots)
    lines = [f"step {step}, the first {len(found)} of {batch_size} slots; plan {fingerprint}"]
    for row in found:
        look, box = row.choice.look, row.choice.box
        lines.append(f"slot {row.slot}: {row.key}   epoch {row.epoch} of source {row.source}")
        lines.append(f"    bytes    from {row.offset} of {row.url}")
        lines.append(f"    time     from {look.start_s:.3f} s, frames {' '.join(map(str, look.frames))}")
        flip = ", mirrored" if box.flip else ""
        lines.append(
            f"    crop     {box.width}x{box.height} at left {box.left}, top {box.top}{flip}, scaled to {data.crop.px}"
        )
    return "\n".join(lines)
