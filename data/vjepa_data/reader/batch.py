"""A batch: uint8 clips with their signals and texts, and the samples that were rejected on the way.

Letters: B clips, T frames, H and W pixels, C colours, n times or intervals of a signal, A columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from vjepa_data.errors import BadInput
from vjepa_data.reader.crops import CropBox, scale

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Signal:
    """The numbers that belong to the clips of a batch: actions, states, poses."""

    values: Float32[Tensor, "B n *A"]
    """A state has a row per frame, [B, T, A]. An action has a row per interval between two frames, [B, T-1, A], or with
    `combine: stack` all source rows of the interval, [B, T-1, rows, A]."""

    valid: Bool[Tensor, "B n"]
    """False for held frames and for times that the source does not cover. Leave these out of a loss."""

    columns: tuple[str, ...]
    """Name of each column."""

    units: tuple[str, ...]
    """Unit of each column."""

    def apply(self, move: Move) -> "Signal":
        """Return the signal with a function applied to each tensor."""
        return replace(self, values=move(self.values), valid=move(self.valid))

    def __reduce__(self) -> tuple:
        # Small tensors go to the trainer as bytes; torch would open a shared memory file for each.
        return _signal, (self.values.cpu().numpy(), self.valid.cpu().numpy(), self.columns, self.units)


def _signal(values: np.ndarray, valid: np.ndarray, columns: tuple[str, ...], units: tuple[str, ...]) -> Signal:
    return Signal(torch.from_numpy(values), torch.from_numpy(valid), columns, units)


@dataclass(frozen=True)
class Clips:
    """Clips of equal length. Row `i` of every field belongs to clip `i`.

    With `data.clip.sequence: K` the K clips of a slot are K neighbouring rows in the order of time, so `slots` names
    each slot K times and `frames.unflatten(0, (-1, clips.sequence))` is [slots K T H W C].
    """

    frames: UInt8[Tensor, "B T H W C"]
    """RGB, cropped and scaled."""

    slots: tuple[int, ...]
    """Slot of the step that each clip fills, ascending."""

    keys: tuple[str, ...]
    sources: tuple[int, ...]
    start_s: tuple[float, ...]
    """Time of the first frame in its stored video, seconds."""

    signals: Mapping[str, Signal] = field(default_factory=dict)
    """The signals of `data.signals`, by name."""

    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The texts of `data.texts`, by name."""

    sequence: int = 1
    """Clips per slot."""

    def __len__(self) -> int:
        return len(self.slots)

    def rows(self, wanted: set[int]) -> "Clips":
        """Return the clips of these slots. The result is a view if their rows are contiguous."""
        at = [i for i, slot in enumerate(self.slots) if slot in wanted]
        is_contiguous = bool(at) and at[-1] - at[0] == len(at) - 1

        def take(tensor: Tensor) -> Tensor:
            return tensor[at[0] : at[-1] + 1] if is_contiguous else tensor[at]

        return Clips(
            take(self.frames),
            slots=_pick(self.slots, at),
            keys=_pick(self.keys, at),
            sources=_pick(self.sources, at),
            start_s=_pick(self.start_s, at),
            signals={name: signal.apply(take) for name, signal in self.signals.items()},
            texts={name: _pick(texts, at) for name, texts in self.texts.items()},
            sequence=self.sequence,
        )

    def with_signals(self, move: Move) -> "Clips":
        """Return the clips with a function applied to the tensors of their signals."""
        return (
            replace(self, signals={name: s.apply(move) for name, s in self.signals.items()}) if self.signals else self
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of these clips: the frames, then the signals."""
        return (self.frames, *(t for signal in self.signals.values() for t in (signal.values, signal.valid)))


def _pick(values: Sequence, at: Iterable[int]) -> tuple:
    return tuple(values[i] for i in at)


@dataclass(frozen=True)
class Uncropped:
    """Clips of equal length that are cut out but not scaled yet, as the loader gives them with `crop_on: device`."""

    pixels: UInt8[Tensor, " n"]
    """The boxes [T h w C] of all clips, flattened and concatenated."""

    boxes: tuple[CropBox, ...]
    """Box of each slot. The clips of a sequence share it."""

    frames: int
    px: int
    clips: Clips
    """All other fields of these clips. Its `frames` are empty."""

    def __len__(self) -> int:
        return len(self.clips)

    def scaled(self, device: torch.device) -> Clips:
        """Move the pixels to a device and scale them there."""
        length, shape = self.frames * self.clips.sequence, (self.px, self.px, 3)
        sizes = [length * box.height * box.width * 3 for box in self.boxes]
        parts = self.pixels.to(device, non_blocking=True).split(sizes)
        out = torch.empty(len(sizes), length, *shape, dtype=torch.uint8, device=device)
        for row, part, box in zip(out, parts, self.boxes, strict=True):
            row.copy_(scale(part.view(length, box.height, box.width, 3), box, self.px))
        clips = self.clips.with_signals(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(clips, frames=out.view(len(clips), self.frames, *shape))


@dataclass(frozen=True)
class RejectedSample:
    """A sample that could not be used, and the slot that it should have filled."""

    step: int
    slot: int
    attempt: int
    source: int
    key: str
    shard: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Batch:
    """The clips of a rank in a step: a group for each length of clip, usually a single group."""

    step: int
    groups: tuple[Clips, ...]
    uncropped: tuple[Uncropped, ...] = ()
    """Groups that `on` turns into clips, with `crop_on: device`."""

    rejected: tuple[RejectedSample, ...] = ()
    """Samples that were replaced."""

    fell_back: tuple[str, ...] = ()
    """For each clip that the fallback decoder decoded: why the first decoder failed, as a reason of `Unreadable`."""

    stop: BadInput | None = None
    """The error that prevented a batch. The loader raises it."""

    def __len__(self) -> int:
        return sum(len(g) for g in (*self.groups, *self.uncropped))

    def split(self, parts: int) -> "list[Batch]":
        """Split into micro-batches of equally many slots, in the order of slots.

        Raises:
            BadInput: the number of slots is not a multiple of `parts`.
        """
        assert not self.uncropped, "call `ahead` or `on` before `split`"
        slots = sorted({slot for g in self.groups for slot in g.slots})
        if len(slots) % parts:
            raise BadInput(
                f"the {len(slots)} slots of a rank cannot be split into {parts} equal micro-batches; "
                f"set parallel.accumulate to a divisor of {len(slots)}"
            )
        size = len(slots) // parts
        batches = []
        for i in range(parts):
            wanted = set(slots[i * size : (i + 1) * size])
            groups = tuple(g.rows(wanted) for g in self.groups if wanted & set(g.slots))
            batches.append(Batch(self.step, groups))
        return batches

    @property
    def pixels(self) -> tuple[Tensor, ...]:
        """The large tensors: the pixels of each group."""
        return (*(g.frames for g in self.groups), *(g.pixels for g in self.uncropped))

    def with_pixels(self, pixels: Iterable[Tensor]) -> "Batch":
        """Return the same batch with its pixels in other memory."""
        of_group = iter(pixels)
        groups = tuple(replace(g, frames=next(of_group)) for g in self.groups)
        return replace(self, groups=groups, uncropped=tuple(replace(g, pixels=next(of_group)) for g in self.uncropped))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, so that copies to a GPU overlap with computation. DataLoader calls this."""
        batch = self.with_pixels(p.pin_memory() for p in self.pixels)
        groups = tuple(g.with_signals(Tensor.pin_memory) for g in batch.groups)
        uncropped = tuple(replace(g, clips=g.clips.with_signals(Tensor.pin_memory)) for g in batch.uncropped)
        return replace(batch, groups=groups, uncropped=uncropped)

    def on(self, device: torch.device) -> "Batch":
        """Move all clips to a device and scale uncropped clips there. Copies from pinned memory are asynchronous."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        groups = [replace(g.with_signals(move), frames=move(g.frames)) for g in self.groups]
        return replace(self, groups=(*groups, *(g.scaled(device) for g in self.uncropped)), uncropped=())
