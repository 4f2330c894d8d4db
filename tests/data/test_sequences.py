"""Sequences: ordered clips of a video in a single slot."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vjepa_data.corpus.index import Index
from vjepa_data.errors import BadInput
from vjepa_data.reader.batch import Batch
from vjepa_data.reader.clip_times import EligibleSamples, Pace, can_serve, choose, offsets
from vjepa_data.reader.loader import ClipLoader, open_plan
from vjepa_data.settings import Clip, Crop, Data, Loader, Source


def settings(folder: Path, **clip) -> Data:
    crop = Crop(px=96, scale=(1, 1), aspect=(1.5, 1.5), flip=0)
    asked = Clip(**{"frames": 3, "fps": 4, "sequence": 3, "sequence_gap_s": 0.5, **clip})
    return Data(sources=(Source(shards=str(folder)),), clip=asked, crop=crop)


@given(st.integers(1, 16), st.integers(2, 4), st.floats(0, 3), st.sampled_from([8.0, 25.0, 29.97]))
def test_a_clip_begins_a_gap_after_the_clip_before(frames: int, sequence: int, gap_s: float, file_fps: float):
    ahead = offsets(frames=frames, fps=4, file_fps=file_fps, sequence=sequence, gap_s=gap_s).reshape(sequence, frames)
    for number, clip in enumerate(ahead):
        start_s = number * (frames / 4 + gap_s)
        assert np.abs(clip / file_fps - (start_s + np.arange(frames) / 4)).max() <= 0.5 / file_fps + 1e-9


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 4), st.integers(0, 500))
def test_a_sequence_lies_inside_its_video(file_frames: int, frames: int, sequence: int, slot: int):
    shape = {"frames": frames, "sequence": sequence, "gap_s": 0.25, "fps": 4.0}
    fits = can_serve(np.array([file_frames]), np.array([12.0]), **shape)[0]
    assert fits == (offsets(**shape, file_fps=12.0)[-1] < file_frames)
    times = choose(file_frames=file_frames, file_fps=12.0, **shape, seed=0, step=0, slot=slot)
    assert len(times.frames) == sequence * frames
    assert len(times.starts) == len(times.start_s) == sequence
    assert times.frames[-1] < file_frames
    if fits:
        assert list(times.frames) == sorted(set(times.frames))


@pytest.mark.parametrize("crop_on", ["cpu", "device"])
def test_the_clips_of_a_slot_are_neighbouring_rows_in_order(corpus: Path, read_number, crop_on: str):
    """3 frames at 4 fps of 12 fps video and a gap of 0.5 s: clips begin 15 frames apart."""
    loader = Loader(workers=0, crop_on=crop_on)  # pyright: ignore[reportArgumentType]
    with ClipLoader(settings(corpus), loader, seed=0, batch_size=4) as batches:
        (clips,) = next(batches).on(torch.device("cpu")).groups
    assert clips.sequence == 3
    assert clips.frames.shape == (12, 3, 96, 96, 3)
    assert clips.slots == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    for slot in clips.frames.unflatten(0, (-1, 3)):
        shown = [[read_number(frame.numpy()) for frame in clip] for clip in slot]
        first = shown[0][0]
        assert shown == [[first + 15 * c + 3 * k for k in range(3)] for c in range(3)]
    for first in range(0, 12, 3):
        assert len(set(clips.keys[first : first + 3])) == 1
        starts = clips.start_s[first : first + 3]
        assert [b - a for a, b in itertools.pairwise(starts)] == pytest.approx([1.25, 1.25])


def digest(batch: Batch) -> dict[tuple[int, int], str]:
    found = {}
    for clips in batch.groups:
        for i, slot in enumerate(clips.slots):
            data = repr((clips.keys[i], clips.start_s[i])).encode() + clips.frames[i].numpy().tobytes()
            found[slot, i % clips.sequence] = hashlib.sha256(data).hexdigest()[:8]
    return found


def read(data: Data, steps: range, *, world: int = 1, workers: int = 0) -> list[dict]:
    seen: list[dict] = [{} for _ in steps]
    for rank in range(world):
        with ClipLoader(
            data, Loader(workers=workers), seed=3, batch_size=8, rank=rank, world=world, step=steps.start
        ) as loader:
            for into, _ in zip(seen, steps, strict=True):
                into |= digest(next(loader))
    assert all(len(step) == 8 * data.clip.sequence for step in seen)
    return seen


@pytest.mark.parametrize(("world", "workers", "start"), [(1, 2, 0), (2, 0, 1), (2, 1, 2)])
def test_sequences_are_the_same_for_any_world_workers_and_start(corpus: Path, world: int, workers: int, start: int):
    data = settings(corpus)
    assert read(data, range(start, 4), world=world, workers=workers) == read(data, range(4))[start:]


def test_a_sequence_of_one_clip_is_the_stream_without_sequences(corpus: Path):
    assert read(settings(corpus, sequence=1), range(2)) == read(
        settings(corpus, sequence=1, sequence_gap_s=0), range(2)
    )
    plans = [open_plan(settings(corpus, sequence=k), seed=0, batch_size=8) for k in (1, 2)]
    assert plans[0].fingerprint != plans[1].fingerprint


def test_micro_batches_keep_the_clips_of_a_slot_together(corpus: Path):
    with ClipLoader(settings(corpus), Loader(workers=0), seed=0, batch_size=4) as batches:
        batch = next(batches)
    parts = batch.split(2)
    assert [part.groups[0].slots for part in parts] == [(0, 0, 0, 1, 1, 1), (2, 2, 2, 3, 3, 3)]
    assert torch.equal(torch.cat([part.groups[0].frames for part in parts]), batch.groups[0].frames)
    with pytest.raises(BadInput, match="the 4 slots of a rank cannot be split into 3"):
        batch.split(3)


def test_a_slot_that_cannot_be_decoded_is_replaced_once(videos, make_corpus, tmp_path: Path):
    facts = {"frames": 48, "fps": 12.0, "width": 96, "height": 64}
    samples = [{"key": f"k{i}", "video": b"noise" if i == 2 else videos[i], **facts} for i in range(4)]
    data = settings(make_corpus(tmp_path / "c", [samples]))
    with ClipLoader(data, Loader(workers=0), seed=0, batch_size=4) as batches:
        batch = next(batches)
    assert [r.key for r in batch.rejected] == ["k2"]
    (clips,) = batch.groups
    assert len({clips.keys[i] for i in range(len(clips)) if clips.slots[i] == batch.rejected[0].slot}) == 1


def test_videos_shorter_than_a_sequence_are_left_out_or_held(corpus: Path):
    with pytest.raises(BadInput, match=r"has 3 frames x 5 clips at 4 fps \(7.00 s\); the longest has 4.00 s"):
        open_plan(settings(corpus, sequence=5, sequence_gap_s=0.875), seed=0, batch_size=4)
    held = EligibleSamples(Index(corpus), frames=3, pace=Pace(fps=4), hold=True, sequence=5, gap_s=1.0)
    assert held.left_out == 0
    times = choose(file_frames=48, file_fps=12.0, frames=3, fps=4.0, seed=0, step=0, slot=0, sequence=5, gap_s=1.0)
    assert times.frames[-4:] == (47,) * 4
