"""From the plan to batches, in three stages of an ordinary `wds.DataPipeline`.

    Samples               ->  Decode                      ->  Gather
    {__key__, __url__,        decoded by a servant,           one Batch for each step,
     json, mp4} as the        cropped, and replaced           of the slots of one rank
     plan draws them          if bad

Worker `w` of `n` makes the steps `step + w`, `step + w + n`, ..., so that the worker count changes nothing.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.index import Index
from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.errors import Unreadable
from vjepa_data.reader import clip_times, crops
from vjepa_data.reader.batch import Batch, Clips, RejectedSample, Uncropped
from vjepa_data.reader.clip_times import EligibleSamples, Pace, read_keys
from vjepa_data.reader.plan import Draw, Plan
from vjepa_data.reader.rejects import TooManyRejects
from vjepa_data.reader.shared_buffers import InSharedBuffer, SharedBuffers
from vjepa_data.settings import BadInput, Clip, Crop, Data, Loader, Source

log = logging.getLogger(__name__)

PREFETCH_STEPS = 100  # how long before its first sample is drawn a remote shard is asked for
BOARD_BYTES = 256  # what a worker is at, for the watchdog


def open_plan(data: Data, *, seed: int, batch_size: int, loader: Loader | None = None) -> Plan:
    """Open the corpora and lay out the stream.

    Logs how many samples each source leaves out, because they are too short or too slow for its clips.

    Args:
        data: the settings.
        seed: seed of the run.
        batch_size: slots of a step, over all ranks.
        loader: where copies of remote shards are kept.

    Raises:
        BadInput: a corpus is missing or offers nothing; the lanes do not divide the batch.
    """
    cache = Cache(loader.cache, loader.cache_gib) if loader and loader.cache else None
    offers = []
    for source in data.sources:
        index = Index(source.shards, source.split, cache, corpus=source.corpus)
        offer = EligibleSamples(
            index,
            frames=source.frames or data.clip.frames,
            pace=_pace(source, data.clip),
            hold=data.clip.short == "hold",
            without=read_keys(Path(source.without)) if source.without else (),
        )
        offers.append(offer)
        if offer.left_out:
            counts = (offer.left_out, len(index), offer.too_short, offer.frames, offer.pace)
            log.info(
                "%s: %d of %d samples are left out, %d because they are too short or too slow for %d frames %s",
                source.shards,
                *counts,
            )
    return Plan(
        offers,
        [source.weight for source in data.sources],
        seed=seed,
        batch_size=batch_size,
        lanes=data.lanes,
        window_shards=data.window_shards,
        clips_per_video=[source.per_video or data.clip.per_video for source in data.sources],
    )


def _pace(source: Source, clip: Clip) -> Pace:
    if source.frame_step:
        return Pace(frame_step=source.frame_step)
    if source.duration_s:
        return Pace(fps=(source.frames or clip.frames) / source.duration_s)
    return Pace(fps=source.fps or clip.fps)


@dataclass(frozen=True)
class Choice:
    """Where a slot looks in the sample that fills it."""

    look: clip_times.FrameSelection
    box: crops.CropBox


def choose(plan: Plan, crop: Crop, draw: Draw, *, step: int, slot: int) -> Choice:
    """Choose the clip and the crop of a slot: a function of (seed, step, slot) and of the sample's length and size."""
    offer, index, i = _offer(plan, draw), index_of(plan, draw), draw.sample
    where = {"seed": plan.seed, "step": step, "slot": slot, "attempt": draw.attempt}
    length = {"file_frames": int(index.frames[i]), "file_fps": float(index.fps[i])}
    fps = float(offer.pace.rate(index.fps[i : i + 1])[0])
    look = clip_times.choose(**length, frames=offer.frames, fps=fps, **where)
    return Choice(look, crops.choose(crop, height=int(index.height[i]), width=int(index.width[i]), **where))


def _offer(plan: Plan, draw: Draw) -> EligibleSamples:
    return cast(EligibleSamples, plan.populations[draw.source])


def index_of(plan: Plan, draw: Draw) -> Index:
    """Give the corpus that a draw is from."""
    return _offer(plan, draw).index


class Samples(IterableDataset):
    """First stage: the encoded samples of a rank's slots, step by step, as any WebDataset pipeline knows them."""

    def __init__(self, plan: Plan, crop: Crop, *, rank: int, world: int, step: int) -> None:
        super().__init__()
        self.plan, self.crop, self.slots, self.step = plan, crop, plan.slots(rank, world), step
        self.is_remote = any(cast(EligibleSamples, p).index.cache is not None for p in plan.populations)
        self._last: tuple[tuple[int, int] | None, Any] = (None, None)

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        step = self.step + worker
        while True:
            # A step at once: what drawing needs leaves the core's cache between two clips (0.6 ms a clip, now 0.16).
            for drawn in [self.draw(step, slot) for slot in self.slots]:
                if self.is_remote:
                    soon = self.plan.draw(step + PREFETCH_STEPS, drawn["__slot__"])
                    index_of(self.plan, soon).want(soon.sample)
                yield self.read(drawn)
            step += workers

    def draw(self, step: int, slot: int, attempt: int = 0) -> dict:
        """Say what fills a slot, or replaces what should have, and where to look in it."""
        draw = self.plan.redraw(step, slot, attempt) if attempt else self.plan.draw(step, slot)
        index = index_of(self.plan, draw)
        return {
            "__url__": index.url(draw.sample),
            "__key__": index.key(draw.sample),
            "__step__": step,
            "__slot__": slot,
            "__draw__": draw,
            "choice": choose(self.plan, self.crop, draw, step=step, slot=slot),
        }

    def read(self, drawn: dict) -> dict:
        """Read a drawn sample; one that cannot be read carries `__error__` in place of its members."""
        draw: Draw = drawn["__draw__"]
        try:
            if self._last[0] != (draw.source, draw.sample):  # several clips of a video are read once
                self._last = ((draw.source, draw.sample), index_of(self.plan, draw).read(draw.sample))
        except Unreadable as e:
            return {**drawn, "__error__": e}
        sample = self._last[1]
        return {**drawn, "json": sample.json, sample.suffix: sample.video}


class Decode:
    """Second stage: samples become clips of uint8 frames; what cannot be decoded is replaced by another draw.

    While the servant decodes a video, this process crops the one before and reads the one after. Several clips of a
    video are decoded together, so that it is opened once and no frame is decoded twice.
    """

    def __init__(self, samples: Samples, *, loader: Loader, max_in_a_row: int, board: Tensor) -> None:
        self.samples, self.loader, self.max_in_a_row = samples, loader, max_in_a_row
        self.board = board
        """uint8 [workers BOARD_BYTES] in shared memory: what each worker is at."""

    def __call__(self, samples: Iterable[dict]) -> Iterator[dict]:
        info = get_worker_info()
        self.row = self.board[info.id if info else 0].numpy()
        self.known: set[tuple[int, int]] = set()
        servant = DecodeWorker(self.loader.decoder, timeout_s=self.loader.decode_timeout_s)
        try:
            before = None
            for _, of_video in itertools.groupby(samples, key=_video):
                clips = list(of_video)
                done = self._finish(servant, *before) if before else []
                before = clips, self._begin(servant, clips)
                for sample in done:
                    yield self._crop(sample)
        finally:
            servant.close()

    def _begin(self, servant: DecodeWorker, clips: list[dict]) -> Unreadable | None:
        """Give the clips of a video to the servant; say what is wrong with it if that is known without."""
        first = clips[0]
        draw: Draw = first["__draw__"]
        step, slot, index = first["__step__"], first["__slot__"], index_of(self.samples.plan, draw)
        self._note(f"step {step} slot {slot} key {first['__key__']} in {first['__url__']}")
        if (draw.source, draw.sample) in self.known:
            return Unreadable("known", "rejected before")
        if "__error__" in first:
            return first["__error__"]
        frames = sorted(set().union(*(clip["choice"].look.frames for clip in clips)))
        expect = Expect(*(int(column[draw.sample]) for column in (index.frames, index.width, index.height)))
        suffix = index.suffix(draw.sample)
        part = crops.around([clip["choice"].box for clip in clips])
        corner_and_size = (part.top, part.left, part.height, part.width)
        servant.begin(first[suffix], frames, expect, suffix=suffix, part=corner_and_size)
        for clip in clips:
            clip["rows"], clip["part"] = np.searchsorted(frames, clip["choice"].look.frames), part
        return None

    def _finish(self, servant: DecodeWorker, clips: list[dict], error: Unreadable | None) -> list[dict]:
        """Wait for the frames of some clips, or of what replaces them."""
        if error is None:
            try:
                frames = servant.finish()
            except Unreadable as e:
                error = e
            else:
                return [self._with(clip, servant, frames, []) for clip in clips]
        return [self._replace(servant, clip, error) for clip in clips]

    def _replace(self, servant: DecodeWorker, sample: dict, error: Unreadable) -> dict:
        """Fill a slot with the first replacement that can be decoded.

        Raises:
            TooManyRejects: too many in a row are bad.
        """
        rejected = []
        while True:
            draw: Draw = sample["__draw__"]
            self.known.add((draw.source, draw.sample))
            step, slot = sample["__step__"], sample["__slot__"]
            names = (draw.source, sample["__key__"], sample["__url__"])
            rejected.append(RejectedSample(step, slot, draw.attempt, *names, error.reason, error.detail))
            if len(rejected) >= self.max_in_a_row:
                raise TooManyRejects(
                    f"{len(rejected)} samples in a row cannot be used, the last is {sample['__key__']} in "
                    f"{sample['__url__']}: {error.detail}; check the data with `vjepa verify`"
                )
            sample = self.samples.read(self.samples.draw(step, slot, draw.attempt + 1))
            failure = self._begin(servant, [sample])
            if failure is None:
                try:
                    return self._crop(self._with(sample, servant, servant.finish(), rejected))
                except Unreadable as e:
                    failure = e
            error = failure

    def _with(self, sample: dict, servant: DecodeWorker, frames: np.ndarray, rejected: list[RejectedSample]) -> dict:
        return {**sample, "frames": frames, "rejected": rejected, "fell_back": servant.fell_back}

    def _crop(self, sample: dict) -> dict:
        """Cut the clip out of the servant's frames, which will not stay; one that replaced another has been."""
        if "frames" not in sample:
            return sample
        box = sample["choice"].box
        part = crops.cut(sample.pop("frames"), box.inside(sample.pop("part")), rows=sample.pop("rows"))
        if self.loader.crop_on == "device":
            return {**sample, "clip": part.clone(memory_format=torch.contiguous_format)}
        return {**sample, "clip": crops.scale(part, box, self.samples.crop.px)}

    def _note(self, text: str) -> None:
        data = text.encode()[:BOARD_BYTES].ljust(BOARD_BYTES, b"\0")
        self.row[:] = np.frombuffer(data, dtype=np.uint8)


def _video(sample: dict) -> tuple[int, int, int, int]:
    """Tell the clips apart that are taken from one video in one go."""
    draw: Draw = sample["__draw__"]
    return sample["__step__"], draw.source, draw.epoch, draw.position


class Gather:
    """Third stage: the clips of a step become a batch, written straight into memory that the trainer shares."""

    def __init__(
        self, slots: tuple[int, ...], px: int, *, crop_on: str = "cpu", blocks: SharedBuffers | None = None
    ) -> None:
        self.slots, self.px, self.crop_on, self.blocks = slots, px, crop_on, blocks

    def __call__(self, samples: Iterable[dict]) -> Iterator[Batch | InSharedBuffer]:
        of_step: list[dict] = []
        try:
            for sample in samples:
                of_step.append(sample)
                if len(of_step) == len(self.slots):
                    yield self._batch(of_step)
                    of_step = []
        except BadInput as e:  # an exception that crosses to the trainer would drag a traceback along
            yield Batch(-1, (), stop=e)

    def _batch(self, samples: list[dict]) -> Batch | InSharedBuffer:
        lengths = sorted({len(s["clip"]) for s in samples})
        of_length = [[s for s in samples if len(s["clip"]) == frames] for frames in lengths]
        shapes = [self._shape([s["clip"] for s in part]) for part in of_length]
        if self.blocks is None:
            pixels, block = [torch.empty(shape, dtype=torch.uint8) for shape in shapes], None
        else:
            pixels, block = self.blocks.take(shapes)
        groups = [self._group(part, out) for part, out in zip(of_length, pixels, strict=True)]
        batch = Batch(
            samples[0]["__step__"],
            tuple(g for g in groups if isinstance(g, Clips)),
            tuple(g for g in groups if isinstance(g, Uncropped)),
            tuple(r for s in samples for r in s["rejected"]),
            tuple(s["fell_back"] for s in samples if s["fell_back"]),
        )
        return batch if block is None else InSharedBuffer(batch, block)

    def _shape(self, clips: list[Tensor]) -> tuple[int, ...]:
        return (len(clips), *clips[0].shape) if self.crop_on == "cpu" else (sum(c.numel() for c in clips),)

    def _group(self, samples: list[dict], out: Tensor) -> Clips | Uncropped:
        frames = len(samples[0]["clip"])
        is_cropped = self.crop_on == "cpu"
        clips = Clips(
            out if is_cropped else torch.empty(0, frames, self.px, self.px, 3, dtype=torch.uint8),
            slots=tuple(s["__slot__"] for s in samples),
            keys=tuple(s["__key__"] for s in samples),
            sources=tuple(s["__draw__"].source for s in samples),
            start_s=tuple(s["choice"].look.start_s for s in samples),
        )
        if not is_cropped:
            torch.cat([s["clip"].flatten() for s in samples], out=out)
            return Uncropped(out, tuple(s["choice"].box for s in samples), frames, self.px, clips)
        for row, sample in zip(out, samples, strict=True):
            row.copy_(sample["clip"])
        return clips
