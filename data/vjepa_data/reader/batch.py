"""What the loader hands to the trainer: a batch of uint8 clips, and what was rejected on the way."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from vjepa_data.reader.crops import CropBox, scale
from vjepa_data.settings import BadInput


@dataclass(frozen=True)
class Clips:
    """Clips of one length."""

    frames: UInt8[Tensor, "B T H W C"]
    """RGB, cropped and scaled."""

    slots: tuple[int, ...]
    """Slot of the step that each clip fills, rising."""

    keys: tuple[str, ...]
    sources: tuple[int, ...]
    start_s: tuple[float, ...]
    """Time of the first frame in its stored video, seconds."""

    def __len__(self) -> int:
        return len(self.slots)

    def rows(self, wanted: set[int]) -> "Clips":
        """Give the clips whose slots are wanted; a view where they lie side by side."""
        at = [i for i, slot in enumerate(self.slots) if slot in wanted]
        whole = bool(at) and at[-1] - at[0] == len(at) - 1
        frames = self.frames[at[0] : at[-1] + 1] if whole else self.frames[at]
        return Clips(
            frames,
            slots=tuple(self.slots[i] for i in at),
            keys=tuple(self.keys[i] for i in at),
            sources=tuple(self.sources[i] for i in at),
            start_s=tuple(self.start_s[i] for i in at),
        )


@dataclass(frozen=True)
class Uncropped:
    """Clips of one length whose boxes are cut out, but not yet scaled: as they come with `loader.crop_on: device`."""

    pixels: UInt8[Tensor, " n"]
    """One clip [T h w C] behind the other."""

    boxes: tuple[CropBox, ...]
    frames: int
    px: int
    clips: Clips
    """Everything else about them; its frames are still empty."""

    def __len__(self) -> int:
        return len(self.boxes)

    def scaled(self, device: torch.device) -> Clips:
        """Take the pixels to a device and scale them there."""
        sizes = [self.frames * box.height * box.width * 3 for box in self.boxes]
        parts = self.pixels.to(device, non_blocking=True).split(sizes)
        out = torch.empty(len(sizes), self.frames, self.px, self.px, 3, dtype=torch.uint8, device=device)
        for row, part, box in zip(out, parts, self.boxes, strict=True):
            row.copy_(scale(part.view(self.frames, box.height, box.width, 3), box, self.px))
        return replace(self.clips, frames=out)


@dataclass(frozen=True)
class RejectedSample:
    """A sample that could not be used, and where."""

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
    """What one rank sees in one step: a group for each length of clip, usually one."""

    step: int
    groups: tuple[Clips, ...]
    uncropped: tuple[Uncropped, ...] = ()
    """Groups that `on` makes clips of, if the device is to scale them."""

    rejected: tuple[RejectedSample, ...] = ()
    """What was tried and replaced on the way."""

    fell_back: tuple[str, ...] = ()
    """Of each clip that the first decoder gave up on and another decoded: why, a reason of `Unreadable`."""

    stop: BadInput | None = None
    """Why no batch could be made; the loader raises it."""

    def __len__(self) -> int:
        return sum(len(g) for g in (*self.groups, *self.uncropped))

    def split(self, parts: int) -> "list[Batch]":
        """Cut into micro-batches of equal numbers of slots, in the order of slots.

        Raises:
            BadInput: the number of clips is no multiple of `parts`.
        """
        assert not self.uncropped, "`ahead` comes before `split`"
        slots = sorted(slot for g in self.groups for slot in g.slots)
        if len(slots) % parts:
            raise BadInput(
                f"the {len(slots)} clips of a rank cannot be split into {parts} equal micro-batches; "
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
        """What is large: the pixels of each group."""
        return (*(g.frames for g in self.groups), *(g.pixels for g in self.uncropped))

    def with_pixels(self, pixels: Iterable[Tensor]) -> "Batch":
        """Give the same batch with its pixels lying elsewhere."""
        of_group = iter(pixels)
        groups = tuple(replace(g, frames=next(of_group)) for g in self.groups)
        return replace(self, groups=groups, uncropped=tuple(replace(g, pixels=next(of_group)) for g in self.uncropped))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which a GPU fetches while it computes; DataLoader calls this."""
        return self.with_pixels(p.pin_memory() for p in self.pixels)

    def on(self, device: torch.device) -> "Batch":
        """Take all clips to a device, and scale there those that are not yet; copies from pinned memory do not wait."""
        groups = [replace(g, frames=g.frames.to(device, non_blocking=True)) for g in self.groups]
        return replace(self, groups=(*groups, *(g.scaled(device) for g in self.uncropped)), uncropped=())
