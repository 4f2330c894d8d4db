"""`loader.decoder: auto`: the fastest decoder whose pixels are those of the others, on videos of the corpus at hand."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from vjepa_data.corpus.index import Sample
from vjepa_data.decoding.backends import Expect
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.reader.bench import cpu_seconds
from vjepa_data.reader.pipeline import choose, index_of
from vjepa_data.reader.plan import Plan
from vjepa_data.settings import Data, Loader

log = logging.getLogger(__name__)

Decoder = Literal["decord", "pyav", "torchcodec"]
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
"""All decoders. The first that works is the one with which the others are compared."""

VIDEOS, ROUNDS = 8, 3
"""Clips of the plan to decode, and how often. A round of 16 frames at 256 px takes about half a second of CPU."""

GAIN = 0.95
"""Another decoder than the first must take at most this share of its time: the clock of a process counts 10 ms."""

PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclass
class DecoderChoice:
    """The decoder of a run, and the reasons."""

    decoder: Decoder
    cpu_ms: dict[str, float] = field(default_factory=dict)
    """CPU milliseconds of a clip, for every decoder with the same pixels."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reason why a decoder was not considered."""


@dataclass(frozen=True)
class _Clip:
    sample: Sample
    frames: Sequence[int]
    expect: Expect


def choose_decoder(plan: Plan, data: Data, loader: Loader) -> DecoderChoice:
    """Decode the first clips of a plan with every decoder, and choose.

    The result is decord where nothing can be compared: for pictures, and where no clip can be decoded.

    Args:
        plan: the plan of the run.
        data: settings of the clips.
        loader: `decode_timeout_s`.
    """
    clips = list(_clips(plan, data))
    reference: list[np.ndarray] | None = None
    choice = DecoderChoice("decord")
    for name in DECODERS if clips else ():
        try:
            pixels, ms = _decode(name, clips, loader.decode_timeout_s)
        except (BadInput, Unreadable) as error:
            choice.refused[name] = str(error)
            continue
        if reference is None:
            reference, choice.decoder = pixels, name
        if all(np.array_equal(own, other) for own, other in zip(pixels, reference, strict=True)):
            choice.cpu_ms[name] = ms
        else:
            choice.refused[name] = f"its pixels differ from those of {choice.decoder}"
    if choice.cpu_ms:
        fastest = min(choice.cpu_ms, key=lambda name: choice.cpu_ms[name])
        if choice.cpu_ms[fastest] <= GAIN * choice.cpu_ms[choice.decoder]:
            choice.decoder = next(name for name in DECODERS if name == fastest)
    return choice


def _clips(plan: Plan, data: Data) -> Iterator[_Clip]:
    """Yield the first clips of the plan that are videos and can be read."""
    found = 0
    for slot in range(min(plan.batch_size, 4 * VIDEOS)):
        draw = plan.draw(0, slot)
        index, i = index_of(plan, draw), draw.sample
        frames = choose(plan, data.crop, draw, step=0, slot=slot).times.frames
        try:
            sample = index.read(i)
        except Unreadable:  # the loader replaces it
            continue
        if sample.suffix not in PICTURES:
            yield _Clip(sample, frames, Expect(int(index.frames[i]), int(index.width[i]), int(index.height[i])))
            found += 1
        if found == VIDEOS:
            return


def _decode(name: Decoder, clips: Sequence[_Clip], timeout_s: float) -> tuple[list[np.ndarray], float]:
    """Return the pixels of clips and the CPU milliseconds of one, after a round that is not counted.

    Raises:
        BadInput: the decoder is not installed, or does not start.
        Unreadable: it cannot decode one of the clips.
    """
    worker = DecodeWorker(name, timeout_s=timeout_s, fallback=None)
    try:
        pixels = [_one(worker, clip).copy() for clip in clips]
        before = cpu_seconds({worker.pid})
        for _ in range(ROUNDS):
            for clip in clips:
                _one(worker, clip)
        return pixels, 1e3 * (cpu_seconds({worker.pid}) - before) / (ROUNDS * len(clips))
    finally:
        worker.close()


def _one(worker: DecodeWorker, clip: _Clip) -> np.ndarray:
    return worker.decode(clip.sample.video, clip.frames, clip.expect, suffix=clip.sample.suffix)
