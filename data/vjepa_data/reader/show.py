"""The stream as text: the sample, times, crop and signals of the first slots of a step, for a person to check."""

from dataclasses import dataclass
from typing import cast

import torch

from vjepa_data.reader.batch import Batch, Clips
from vjepa_data.reader.clip_times import EligibleSamples
from vjepa_data.reader.pipeline import BOARD_BYTES, Choice, Decode, Gather, Samples, index_of, open_plan
from vjepa_data.reader.signals import CutSignal
from vjepa_data.settings import Data, Loader
from vjepa_data.signal_spec import SignalSpec


@dataclass(frozen=True)
class Row:
    """The content of a slot."""

    slot: int
    source: int
    key: str
    url: str
    offset: int
    """Position of the video's bytes in the shard."""

    first_frame: int
    """First frame of a virtual part in its video, else 0."""

    part_start_s: float
    """The time of this frame."""

    epoch: int
    choice: Choice
    signals: dict[str, tuple[SignalSpec, CutSignal]]
    texts: dict[str, str]


def rows(data: Data, *, seed: int, batch_size: int, step: int = 0, slots: int = 5) -> tuple[str, list[Row]]:
    """Compute the content of the first slots of a step. Shards are read only for signals and texts.

    Returns:
        The fingerprint of the plan, and a row for each slot.

    Raises:
        BadInput: see `open_plan`.
        Unreadable: the signals or texts of a sample cannot be read.
    """
    plan = open_plan(data, seed=seed, batch_size=batch_size)
    samples = Samples(plan, data, rank=0, world=1, step=step)
    found = []
    for slot in range(min(slots, batch_size)):
        drawn = samples.draw(step, slot)
        draw, index = drawn.draw, index_of(plan, drawn.draw)
        sample = samples.read(drawn) if data.signals or data.texts else {}
        if "__error__" in sample:
            raise sample["__error__"]
        cut, texts = samples.cut(drawn, sample)
        signals = {name: (index.signals[name], values) for name, values in cut.items()}
        place = {
            "offset": int(index.video_offset[draw.sample]),
            "first_frame": index.first_frame(draw.sample),
            "part_start_s": index.start_s(draw.sample),
        }
        facts = {"epoch": draw.epoch, "choice": drawn.choice, "signals": signals, "texts": texts}
        found.append(Row(slot, draw.source, drawn.key, drawn.url, **place, **facts))
    return plan.fingerprint, found


def clips(
    data: Data, *, seed: int, batch_size: int, step: int = 0, slots: int = 5
) -> tuple[tuple[Clips, ...], dict[str, SignalSpec]]:
    """Decode the first slots of a step.

    Returns:
        A group for each length of clip, and the description of each signal.

    Raises:
        BadInput: see `open_plan`.
    """
    plan = open_plan(data, seed=seed, batch_size=batch_size)
    samples = Samples(plan, data, rank=0, world=1, step=step)
    samples.slots = samples.slots[:slots]
    board = torch.zeros(1, BOARD_BYTES, dtype=torch.uint8)
    decode = Decode(samples, loader=Loader(workers=0), max_in_a_row=data.rejects.max_in_a_row, board=board)
    batch = cast(Batch, next(iter(Gather(samples)(decode(samples)))))
    if batch.stop is not None:
        raise batch.stop
    first = cast(EligibleSamples, plan.sources[0]).index
    return batch.groups, {name: first.signals[name] for name in data.signals}


def stream(data: Data, *, seed: int, batch_size: int, step: int = 0, slots: int = 5) -> str:
    """Describe the first slots of a step, as `vjepa show CONFIG --stream SLOTS` prints it."""
    fingerprint, found = rows(data, seed=seed, batch_size=batch_size, step=step, slots=slots)
    lines = [f"step {step}, the first {len(found)} of {batch_size} slots; plan {fingerprint}"]
    for row in found:
        times, box = row.choice.times, row.choice.box
        lines.append(f"slot {row.slot}: {row.key}   epoch {row.epoch} of source {row.source}")
        lines.append(f"    bytes    from {row.offset} of {row.url}")
        length = len(times.frames) // len(times.starts)
        for clip, start_s in enumerate(times.start_s):
            frames = tuple(row.first_frame + f for f in times.frames[clip * length : (clip + 1) * length])
            lines.append(f"    time     from {row.part_start_s + start_s:.3f} s, frames {' '.join(map(str, frames))}")
            for name, (spec, signal) in row.signals.items():
                lines += _signal(name, spec, signal, clip, frames)
        flip = ", mirrored" if box.flip else ""
        lines.append(
            f"    crop     {box.width}x{box.height} at left {box.left}, top {box.top}{flip}, scaled to {data.crop.px}"
        )
        lines += [f"    {name:8} {text!r}" for name, text in row.texts.items()]
    return "\n".join(lines)


def _signal(name: str, spec: SignalSpec, signal: CutSignal, clip: int, frames: tuple[int, ...]) -> list[str]:
    """Describe a signal of a clip: a line per frame, or per interval between two frames."""
    how = f"{spec.combine} of all rows between two frames" if spec.combine else "the nearest row to each frame"
    how = f"change of {spec.difference_of} from frame to frame" if spec.difference_of else how
    shift = f", shifted by {spec.shift_rows} rows and {spec.shift_s:g} s" if spec.shift_rows or spec.shift_s else ""
    columns = ", ".join(f"{c} [{u}]" if u else c for c, u in zip(spec.columns, spec.units, strict=True))
    lines = [f"    {name:8} {columns}: {how}{shift}"]
    for k, (values, valid) in enumerate(zip(signal.values[clip], signal.valid[clip], strict=True)):
        span = f"{frames[k]} to {frames[k + 1]}" if spec.combine else str(frames[k])
        numbers = " | ".join(" ".join(f"{v:+.4g}" for v in row) for row in values.reshape(-1, len(spec.columns)))
        lines.append(f"        {span:>12}   {numbers}{'' if valid else '   (not valid)'}")
    return lines
