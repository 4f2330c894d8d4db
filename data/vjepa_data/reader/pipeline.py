"""The stream: samples of the plan become batches, in three stages of an ordinary `wds.DataPipeline`.

    Samples               ->  Decode                      ->  Gather
    {__key__, __url__,        decoded by a worker             one Batch per step,
     json, mp4, ...} in       process, cropped, and           of the slots of one rank
     the plan's order         replaced if unreadable
       dict + SlotDraw           ReadySlot                       Batch

Loader worker `w` of `n` makes the steps `step + w`, `step + w + n`, ..., so the number of workers changes nothing.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.index import Index, Sample
from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.reader import clip_times, crops
from vjepa_data.reader.batch import Batch, Clips, RejectedSample, Signal, Uncropped
from vjepa_data.reader.clip_times import EligibleSamples, pace_of, read_keys
from vjepa_data.reader.plan import Draw, Plan
from vjepa_data.reader.rejects import TooManyRejects
from vjepa_data.reader.shared_buffers import InSharedBuffer, SharedBuffers
from vjepa_data.reader.signals import CutSignal, check_signals, cut_signals, read_texts
from vjepa_data.settings import Crop, Data, Loader
from vjepa_data.signal_spec import member_of_signal, member_of_text, stored_name

log = logging.getLogger(__name__)

PREFETCH_STEPS = 100  # a remote shard is requested this many steps before its first sample is drawn
BOARD_BYTES = 256  # text with the current task of a loader worker, for the watchdog


def open_plan(data: Data, *, seed: int, batch_size: int, loader: Loader | None = None) -> Plan:
    """Open the corpora and build the plan of the stream.

    Logs how many samples of each source are left out because they are too short or too slow for its clips.

    Args:
        data: the settings.
        seed: seed of the run.
        batch_size: slots of a step, over all ranks.
        loader: says where copies of remote shards are kept.

    Raises:
        BadInput: a corpus is missing, has no eligible sample or lacks a signal, or the lanes do not divide the batch.
    """
    cache = Cache(loader.cache, loader.cache_gib) if loader and loader.cache else None
    sources = []
    for source in data.sources:
        index = Index(source.shards, source.split, cache, corpus=source.corpus, part_s=source.part_s)
        eligible = EligibleSamples(
            index,
            frames=source.frames or data.clip.frames,
            pace=pace_of(source, data.clip),
            hold=data.clip.short == "hold",
            without=read_keys(Path(source.without)) if source.without else (),
            sequence=data.clip.sequence,
            gap_s=data.clip.sequence_gap_s,
        )
        sources.append(eligible)
        if eligible.left_out:
            counts = (eligible.left_out, len(index), eligible.too_short, eligible.frames, eligible.pace)
            log.info(
                "%s: %d of %d samples are left out, %d because they are too short or too slow for %d frames %s",
                source.shards,
                *counts,
            )
    check_signals(data.signals, data.texts, sources, flip=data.crop.flip)
    return Plan(
        sources,
        [source.weight for source in data.sources],
        seed=seed,
        batch_size=batch_size,
        lanes=data.lanes,
        window_shards=data.window_shards,
        clips_per_video=[source.per_video or data.clip.per_video for source in data.sources],
    )


@dataclass(frozen=True)
class Choice:
    """The part of a sample that fills a slot."""

    times: clip_times.FrameSelection
    box: crops.CropBox


def choose(plan: Plan, crop: Crop, draw: Draw, *, step: int, slot: int) -> Choice:
    """Draw the frames and the crop of a slot: a function of (seed, step, slot) and of the sample's length and size."""
    eligible, index, i = eligible_of(plan, draw), index_of(plan, draw), draw.sample
    numbers = {"seed": plan.seed, "step": step, "slot": slot, "attempt": draw.attempt}
    times = clip_times.choose(
        file_frames=int(index.frames[i]),
        file_fps=float(index.fps[i]),
        frames=eligible.frames,
        fps=eligible.fps(i),
        sequence=eligible.sequence,
        gap_s=eligible.gap_s,
        **numbers,
    )
    return Choice(times, crops.choose(crop, height=int(index.height[i]), width=int(index.width[i]), **numbers))


def eligible_of(plan: Plan, draw: Draw) -> EligibleSamples:
    """Return the samples that a draw is from."""
    return cast(EligibleSamples, plan.sources[draw.source])


def index_of(plan: Plan, draw: Draw) -> Index:
    """Return the corpus that a draw is from."""
    return eligible_of(plan, draw).index


@dataclass(frozen=True)
class SlotDraw:
    """The sample, frames and crop that fill a slot of a step."""

    step: int
    slot: int
    draw: Draw
    choice: Choice
    key: str
    url: str


class Samples(IterableDataset):
    """First stage: the encoded samples of a rank's slots, step by step, as dicts that any WebDataset pipeline takes."""

    def __init__(self, plan: Plan, data: Data, *, rank: int, world: int, step: int) -> None:
        super().__init__()
        self.plan, self.data, self.slots, self.step = plan, data, plan.slots(rank, world), step
        self.is_remote = any(cast(EligibleSamples, p).index.cache is not None for p in plan.sources)
        self._members = [self._members_of(cast(EligibleSamples, source).index) for source in plan.sources]
        self._last: tuple[tuple[int, int], Sample] | None = None

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        step = self.step + worker
        while True:
            # All draws of a step at once keep their data in the core's cache (0.16 ms a clip, else 0.6 ms).
            for drawn in [self.draw(step, slot) for slot in self.slots]:
                if self.is_remote:
                    soon = self.plan.draw(step + PREFETCH_STEPS, drawn.slot)
                    index_of(self.plan, soon).want(soon.sample)
                yield self.read(drawn)
            step += workers

    def _members_of(self, index: Index) -> tuple[str, ...]:
        """Return the suffixes of the members that hold a corpus's signals and texts, which may share a member."""
        signals = dict.fromkeys(stored_name(name, index.signals) for name in self.data.signals)
        return (*map(member_of_signal, signals), *map(member_of_text, self.data.texts))

    def draw(self, step: int, slot: int, attempt: int = 0) -> SlotDraw:
        """Draw the sample, frames and crop of a slot, or with `attempt` a replacement."""
        draw = self.plan.redraw(step, slot, attempt) if attempt else self.plan.draw(step, slot)
        index = index_of(self.plan, draw)
        choice = choose(self.plan, self.data.crop, draw, step=step, slot=slot)
        return SlotDraw(step, slot, draw, choice, index.key(draw.sample), index.url(draw.sample))

    def read(self, drawn: SlotDraw) -> dict:
        """Read a sample. `__draw__` holds the draw. An unreadable sample has `__error__` instead of its members."""
        of_slot = {"__key__": drawn.key, "__url__": drawn.url, "__draw__": drawn}
        draw = drawn.draw
        video = draw.source, draw.sample
        if self._last is None or self._last[0] != video:  # several clips of a video are read once
            try:
                self._last = video, index_of(self.plan, draw).read(draw.sample, self._members[draw.source])
            except Unreadable as e:
                return {**of_slot, "__error__": e}
        sample = self._last[1]
        return {**of_slot, "json": sample.json, sample.suffix: sample.video, **sample.members}

    def cut(self, drawn: SlotDraw, sample: Mapping[str, Any]) -> tuple[dict[str, CutSignal], dict[str, str]]:
        """Cut the signals of a slot with its frame times, and read its texts.

        Raises:
            Unreadable: a member is not valid.
        """
        if not self._members[drawn.draw.source]:
            return {}, {}
        draw, choice = drawn.draw, drawn.choice
        signals = cut_signals(
            self.data.signals,
            sample,
            index_of(self.plan, draw),
            draw.sample,
            times_s=choice.times.times_s,
            fps=eligible_of(self.plan, draw).fps(draw.sample),
            flip=choice.box.flip,
        )
        return signals, read_texts(self.data.texts, sample)


@dataclass(frozen=True)
class ReadySlot:
    """A slot with its cropped frames, signals and texts."""

    drawn: SlotDraw
    frames: Tensor
    """uint8 [sequence * T, px, px, C], or [sequence * T, h, w, C] with `crop_on: device`."""

    signals: dict[str, CutSignal]
    texts: dict[str, str]
    fell_back: str | None
    rejected: tuple[RejectedSample, ...] = ()


@dataclass
class _Decoding:
    """Slots of a video on their way through the decode worker."""

    slots: list[SlotDraw]
    frames: list[int] = field(default_factory=list)
    """Numbers of the frames that any slot needs, ascending."""

    part: crops.CropBox | None = None
    """Smallest box that contains the crop of every slot."""

    cut: list[tuple[dict[str, CutSignal], dict[str, str]]] = field(default_factory=list)
    """Signals and texts of each slot."""

    error: Unreadable | None = None
    decoded: np.ndarray | None = None
    """uint8 [frames h w C] in the memory of the decode worker, which reuses it."""

    fell_back: str | None = None


class Decode:
    """Second stage: samples become clips of uint8 frames. A sample that cannot be decoded is replaced by another draw.

    While the decode worker decodes a video, this process crops the video before and reads the video after. Several
    clips of a video are decoded together, so that it is opened once and no frame is decoded twice.
    """

    def __init__(self, samples: Samples, *, loader: Loader, max_in_a_row: int, board: Tensor) -> None:
        self.samples, self.loader, self.max_in_a_row = samples, loader, max_in_a_row
        self.board = board
        """uint8 [workers BOARD_BYTES] in shared memory: the current task of each loader worker."""

    def __call__(self, samples: Iterable[dict]) -> Iterator[ReadySlot]:
        info = get_worker_info()
        self.row = self.board[info.id if info else 0].numpy()
        self.known: set[tuple[int, int]] = set()
        decoder = DecodeWorker(self.loader.fixed_decoder, timeout_s=self.loader.decode_timeout_s)
        try:
            before = _Decoding([])
            for _, of_video in itertools.groupby(samples, key=_video):
                of_video = list(of_video)
                replacements = self._finish(decoder, before)
                following = self._begin(decoder, of_video)
                yield from replacements or (self._crop(before, i) for i in range(len(before.slots)))
                before = following
        finally:
            decoder.close()

    def _begin(self, decoder: DecodeWorker, samples: list[dict]) -> _Decoding:
        """Send a video and the frames of its slots to the decode worker, unless it is known to be bad."""
        slots: list[SlotDraw] = [sample["__draw__"] for sample in samples]
        first, draw, decoding = slots[0], slots[0].draw, _Decoding(slots)
        self._note(f"step {first.step} slot {first.slot} key {first.key} in {first.url}")
        if (draw.source, draw.sample) in self.known:
            decoding.error = Unreadable("known", "rejected before")
        elif "__error__" in samples[0]:
            decoding.error = samples[0]["__error__"]
        else:
            try:
                decoding.cut = [self.samples.cut(slot, samples[0]) for slot in slots]
            except Unreadable as e:
                decoding.error = e
        if decoding.error is not None:
            return decoding
        index = index_of(self.samples.plan, draw)
        decoding.frames = sorted(set().union(*(slot.choice.times.frames for slot in slots)))
        decoding.part = part = crops.around([slot.choice.box for slot in slots])
        expect = Expect(*(int(column[draw.sample]) for column in (index.frames, index.width, index.height)))
        suffix, corner_and_size = index.suffix(draw.sample), (part.top, part.left, part.height, part.width)
        decoder.begin(samples[0][suffix], decoding.frames, expect, suffix=suffix, part=corner_and_size)
        return decoding

    def _finish(self, decoder: DecodeWorker, decoding: _Decoding) -> list[ReadySlot]:
        """Wait for the frames of a video. Return a replacement for each of its slots if it cannot be decoded."""
        error = self._receive(decoder, decoding)
        return [] if error is None else [self._replace(decoder, slot, error) for slot in decoding.slots]

    def _receive(self, decoder: DecodeWorker, decoding: _Decoding) -> Unreadable | None:
        """Wait for the frames of a video, and return the error if it cannot be decoded."""
        if decoding.slots and decoding.error is None:
            try:
                decoding.decoded, decoding.fell_back = decoder.finish(), decoder.fell_back
            except Unreadable as e:
                decoding.error = e
        return decoding.error

    def _replace(self, decoder: DecodeWorker, slot: SlotDraw, error: Unreadable) -> ReadySlot:
        """Fill a slot with the first replacement that can be decoded.

        Raises:
            TooManyRejects: too many replacements in a row are bad.
        """
        rejected = []
        while True:
            draw = slot.draw
            self.known.add((draw.source, draw.sample))
            names = (draw.source, slot.key, slot.url)
            rejected.append(RejectedSample(slot.step, slot.slot, draw.attempt, *names, error.reason, error.detail))
            if len(rejected) >= self.max_in_a_row:
                raise TooManyRejects(
                    f"{len(rejected)} samples in a row are unreadable, the last is {slot.key} in {slot.url} "
                    f"({error.detail}). Check the data with `vjepa verify`."
                )
            slot = self.samples.draw(slot.step, slot.slot, draw.attempt + 1)
            decoding = self._begin(decoder, [self.samples.read(slot)])
            failure = self._receive(decoder, decoding)
            if failure is None:
                return replace(self._crop(decoding, 0), rejected=tuple(rejected))
            error = failure

    def _crop(self, decoding: _Decoding, number: int) -> ReadySlot:
        """Cut a slot out of the decoded frames before the decode worker reuses their memory."""
        slot, (signals, texts) = decoding.slots[number], decoding.cut[number]
        box, part, decoded = slot.choice.box, decoding.part, decoding.decoded
        assert part is not None
        assert decoded is not None
        rows = np.searchsorted(decoding.frames, slot.choice.times.frames)
        frames = crops.cut(decoded, box.inside(part), rows=rows)
        if self.loader.crop_on == "device":
            frames = frames.clone(memory_format=torch.contiguous_format)
        else:
            frames = crops.scale(frames, box, self.samples.data.crop.px)
        return ReadySlot(slot, frames, signals, texts, decoding.fell_back)

    def _note(self, text: str) -> None:
        data = text.encode()[:BOARD_BYTES].ljust(BOARD_BYTES, b"\0")
        self.row[:] = np.frombuffer(data, dtype=np.uint8)


def _video(sample: dict) -> tuple[int, int, int, int]:
    """Return a key that the slots share that take their clips from a video at once."""
    slot: SlotDraw = sample["__draw__"]
    return slot.step, slot.draw.source, slot.draw.epoch, slot.draw.position


class Gather:
    """Third stage: the slots of a step become a batch, written directly to memory that the trainer shares."""

    def __init__(self, samples: Samples, *, crop_on: str = "cpu", buffers: SharedBuffers | None = None) -> None:
        self.samples, self.crop_on, self.buffers = samples, crop_on, buffers
        self.px, self.sequence = samples.data.crop.px, samples.data.clip.sequence

    def __call__(self, slots: Iterable[ReadySlot]) -> Iterator[Batch | InSharedBuffer]:
        of_step: list[ReadySlot] = []
        try:
            for slot in slots:
                of_step.append(slot)
                if len(of_step) == len(self.samples.slots):
                    yield self._batch(of_step)
                    of_step = []
        except BadInput as e:  # an exception that crosses to the trainer would carry a traceback along
            yield Batch(-1, (), stop=e)

    def _batch(self, slots: list[ReadySlot]) -> Batch | InSharedBuffer:
        lengths = sorted({len(s.frames) for s in slots})
        of_length = [[s for s in slots if len(s.frames) == length] for length in lengths]
        shapes = [self._shape([s.frames for s in part]) for part in of_length]
        if self.buffers is None:
            pixels, buffer = [torch.empty(shape, dtype=torch.uint8) for shape in shapes], None
        else:
            pixels, buffer = self.buffers.take(shapes)
        groups = [self._group(part, out) for part, out in zip(of_length, pixels, strict=True)]
        batch = Batch(
            slots[0].drawn.step,
            tuple(g for g in groups if isinstance(g, Clips)),
            tuple(g for g in groups if isinstance(g, Uncropped)),
            tuple(r for s in slots for r in s.rejected),
            tuple(s.fell_back for s in slots if s.fell_back),
        )
        return batch if buffer is None else InSharedBuffer(batch, buffer)

    def _shape(self, frames: list[Tensor]) -> tuple[int, ...]:
        if self.crop_on == "device":
            return (sum(part.numel() for part in frames),)
        length, *shape = frames[0].shape
        return (len(frames) * self.sequence, length // self.sequence, *shape)

    def _group(self, slots: list[ReadySlot], out: Tensor) -> Clips | Uncropped:
        frames = len(slots[0].frames) // self.sequence
        is_cropped = self.crop_on == "cpu"
        clips = Clips(
            out if is_cropped else torch.empty(0, frames, self.px, self.px, 3, dtype=torch.uint8),
            slots=self._per_clip(s.drawn.slot for s in slots),
            keys=self._per_clip(s.drawn.key for s in slots),
            sources=self._per_clip(s.drawn.draw.source for s in slots),
            start_s=tuple(start_s for s in slots for start_s in self._starts_s(s.drawn)),
            signals={name: self._signal(name, slots) for name in self.samples.data.signals},
            texts={name: self._per_clip(s.texts[name] for s in slots) for name in self.samples.data.texts},
            sequence=self.sequence,
        )
        if not is_cropped:
            torch.cat([s.frames.flatten() for s in slots], out=out)
            return Uncropped(out, tuple(s.drawn.choice.box for s in slots), frames, self.px, clips)
        for row, slot in zip(out.view(len(slots), -1, *out.shape[2:]), slots, strict=True):
            row.copy_(slot.frames)
        return clips

    def _starts_s(self, drawn: SlotDraw) -> Iterator[float]:
        """Yield the start of each clip of a slot in the stored video, in seconds."""
        of_sample = index_of(self.samples.plan, drawn.draw).start_s(drawn.draw.sample)
        return (of_sample + start_s for start_s in drawn.choice.times.start_s)

    def _per_clip(self, of_slot: Iterable) -> tuple:
        return tuple(value for value in of_slot for _ in range(self.sequence))

    def _signal(self, name: str, slots: Sequence[ReadySlot]) -> Signal:
        cut = [s.signals[name] for s in slots]
        spec = index_of(self.samples.plan, slots[0].drawn.draw).signals[name]
        values, valid = (
            torch.from_numpy(np.concatenate(parts)) for parts in zip(*((c.values, c.valid) for c in cut), strict=True)
        )
        return Signal(values, valid, spec.columns, spec.units)
