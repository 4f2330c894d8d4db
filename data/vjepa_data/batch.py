"""What the loader hands to the trainer: a batch of uint8 clips, and what was rejected on the way."""

from dataclasses import dataclass, replace

from jaxtyping import UInt8
from torch import Tensor

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
class Reject:
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
    rejected: tuple[Reject, ...] = ()
    """What was tried and replaced on the way."""

    stop: BadInput | None = None
    """Why no batch could be made; the loader raises it."""

    def __len__(self) -> int:
        return sum(len(g) for g in self.groups)

    def split(self, parts: int) -> "list[Batch]":
        """Cut into micro-batches of equal numbers of slots, in the order of slots.

        Raises:
            BadInput: the number of clips is no multiple of `parts`.
        """
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

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, from which a GPU fetches while it computes; DataLoader calls this."""
        return replace(self, groups=tuple(replace(g, frames=g.frames.pin_memory()) for g in self.groups))
