import hashlib
import io
import itertools
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.decoding.decode_worker import DecodeWorker
from vjepa_data.reader.batch import Batch, Clips
from vjepa_data.reader.loader import ClipLoader, open_plan
from vjepa_data.reader.pipeline import choose, index_of
from vjepa_data.settings import BadInput, Clip, Crop, Data, Loader, Source

BATCH = 12


def settings(*folders: Path, **more) -> Data:
    clip = more.pop("clip", Clip(frames=4, fps=4))
    crop = more.pop("crop", Crop(px=32))
    return Data(sources=tuple(Source(shards=str(f)) for f in folders), clip=clip, crop=crop, **more)


def stream(data: Data, steps: range, *, world: int = 1, workers: int = 0, method: str = "forkserver") -> list[dict]:
    """Read some steps on each rank of a world. Return {slot: (key, hash of pixels)} for each step."""
    seen: list[dict] = [{} for _ in steps]
    loader = Loader(workers=workers, start_method=method)  # pyright: ignore[reportArgumentType]
    for rank in range(world):
        with ClipLoader(data, loader, seed=5, batch_size=BATCH, rank=rank, world=world, step=steps.start) as batches:
            for into, step in zip(seen, steps, strict=True):
                batch = next(batches)
                assert batch.step == step
                for group in batch.groups:
                    for slot, key, frames in zip(group.slots, group.keys, group.frames, strict=True):
                        assert slot not in into
                        into[slot] = (key, hashlib.sha256(frames.numpy().tobytes()).hexdigest())
    assert all(sorted(s) == list(range(BATCH)) for s in seen)
    return seen


@pytest.fixture(scope="module")
def expected(corpus: Path) -> list[dict]:
    return stream(settings(corpus), range(6))


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 1), (4, 0)])
def test_the_stream_is_the_same_for_any_world_and_workers(corpus: Path, expected: list[dict], world: int, workers: int):
    assert stream(settings(corpus), range(6), world=world, workers=workers) == expected


@pytest.mark.parametrize("step", [1, 4, 5])
def test_resuming_at_a_step_equals_reading_up_to_it(corpus: Path, expected: list[dict], step: int):
    assert stream(settings(corpus), range(step, 6), world=2, workers=step % 2) == expected[step:]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_every_start_method_gives_the_same_stream(corpus: Path, expected: list[dict], method: str):
    assert stream(settings(corpus), range(3), workers=1, method=method) == expected[:3]


def test_an_epoch_shows_each_sample_once(corpus: Path):
    keys = [key for step in stream(settings(corpus), range(13)) for key, _ in step.values()]
    assert len(keys) == 6 * 26
    assert {keys.count(k) for k in set(keys)} == {6}


def test_sources_may_have_clips_of_different_length(corpus: Path, videos, make_corpus, tmp_path: Path):
    """They are mixed by their weights, and a batch has a group per length."""
    facts = {"frames": 48, "fps": 12.0, "width": 96, "height": 64}
    other = make_corpus(tmp_path / "b", [[{"key": f"b{i}", "video": videos[0], **facts} for i in range(5)]], name="b")
    sources = (Source(shards=str(corpus), weight=3), Source(shards=str(other), frames=8, fps=2.5))
    data = Data(sources=sources, clip=Clip(frames=4, fps=4), crop=Crop(px=32))
    with ClipLoader(data, Loader(workers=0), seed=0, batch_size=8) as loader:
        for _ in range(3):
            batch = next(loader)
            short, long = batch.groups
            assert short.frames.shape == (6, 4, 32, 32, 3)
            assert long.frames.shape == (2, 8, 32, 32, 3)
            assert set(short.sources) == {0}
            assert set(long.sources) == {1}
            assert all(key.startswith("b") for key in long.keys)
            assert sorted(short.slots + long.slots) == list(range(8))


def batch_of(slots: list[tuple[int, ...]]) -> Batch:
    groups = []
    for frames, of_group in enumerate(slots, start=1):
        pixels = torch.tensor(of_group, dtype=torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, frames, 2, 2, 3)
        names = tuple(f"k{s}" for s in of_group)
        groups.append(Clips(pixels, of_group, names, (0,) * len(names), (0.0,) * len(names)))
    return Batch(7, tuple(groups))


def test_micro_batches_are_split_by_slot():
    parts = batch_of([(0, 1, 6, 7), (2, 3, 8, 9)]).split(4)
    assert [sorted(s for g in p.groups for s in g.slots) for p in parts] == [[0, 1], [2, 3], [6, 7], [8, 9]]
    for part in parts:
        for group in part.groups:
            assert group.frames[:, 0, 0, 0, 0].tolist() == list(group.slots)
            assert group.keys == tuple(f"k{s}" for s in group.slots)
    assert [len(p.groups) for p in batch_of([(0, 1, 6), (2, 3, 8)]).split(2)] == [2, 2]
    with pytest.raises(BadInput, match=r"8 slots .* set parallel.accumulate to a divisor of 8"):
        batch_of([(0, 1, 6, 7), (2, 3, 8, 9)]).split(3)


def test_too_little_shared_memory_is_refused(corpus: Path):
    data = settings(corpus, crop=Crop(px=4096), clip=Clip(frames=16, fps=4))
    with pytest.raises(BadInput, match=r"need [\d.]+ GB of shared memory, .* /dev/shm has .* Lower loader.workers"):
        ClipLoader(data, Loader(workers=8, prefetch_steps=10), seed=0, batch_size=120)


def test_ranks_of_one_machine_share_its_memory(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    ClipLoader(settings(corpus), Loader(workers=1), seed=0, batch_size=BATCH).close()
    with monkeypatch.context() as patch:  # the other rank has allocated its part already, as after a roll-back
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**9 // 2))
        big = settings(corpus, crop=Crop(px=512), clip=Clip(frames=8, fps=4))
        ClipLoader(big, Loader(workers=1), seed=0, batch_size=24, ranks_here=2).close()
    with pytest.raises(BadInput, match=r"1000000000 ranks of 1 workers with 2 steps of prefetch need"):
        ClipLoader(settings(corpus), Loader(workers=1), seed=0, batch_size=BATCH, ranks_here=10**9)


def test_left_out_samples_are_logged_at_the_start(
    videos, make_corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    facts = {"fps": 12.0, "width": 96, "height": 64, "video": videos[0]}
    samples = [{"key": f"k{i}", "frames": 48 if i else 5, **facts} for i in range(4)]
    folder = make_corpus(tmp_path / "c", [samples])
    caplog.set_level(logging.INFO)
    with ClipLoader(settings(folder), Loader(workers=0), seed=0, batch_size=4) as loader:
        assert (
            "1 of 4 samples are left out, 1 because they are too short or too slow for 4 frames at 4 fps" in caplog.text
        )
        keys = {k for _ in range(3) for k in next(loader).groups[0].keys}
    assert keys == {"k1", "k2", "k3"}


def test_short_videos_and_images_may_be_held(videos, make_corpus, tmp_path: Path):
    """Images are videos of a single frame. The last frame is repeated."""
    picture = io.BytesIO()
    Image.new("RGB", (96, 64), (255, 0, 0)).save(picture, "JPEG")
    facts = {"width": 96, "height": 64}
    still = {"key": "still", "frames": 1, "fps": 1.0, "video": picture.getvalue(), "suffix": "jpg", **facts}
    video = {"key": "video", "frames": 48, "fps": 12.0, "video": videos[0], **facts}
    folder = make_corpus(tmp_path / "c", [[still, video]])
    for clip in [Clip(frames=1, fps=3), Clip(frames=16, fps=3, short="hold")]:
        data = settings(folder, clip=clip, crop=Crop(px=32, scale=(1, 1)))
        with ClipLoader(data, Loader(workers=0), seed=0, batch_size=2) as loader:
            (clips,) = next(loader).groups
            assert set(clips.keys) == {"still", "video"}
            red = clips.frames[clips.keys.index("still")]
            assert red.shape == (clip.frames, 32, 32, 3)
            assert red[..., 0].min() > 250
            assert red[..., 1:].max() < 5
            if clip.frames == 16:  # 4 s of video, then its last frame
                moving = clips.frames[clips.keys.index("video")].int()
                assert [bool((a - b).abs().max() > 8) for a, b in itertools.pairwise(moving)] == [True] * 12 + [
                    False
                ] * 3
    with ClipLoader(settings(folder), Loader(workers=0), seed=0, batch_size=2) as loader:
        assert set(next(loader).groups[0].keys) == {"video"}
    pictures = make_corpus(tmp_path / "pictures", [[still]])
    with pytest.raises(BadInput, match=r"all 1 train samples of .* are images.* set data.sources\[\].frames=1"):
        ClipLoader(settings(pictures), Loader(workers=0), seed=0, batch_size=2)


def test_unwanted_keys_are_never_drawn(corpus: Path, tmp_path: Path):
    """They are a part of the fingerprint."""
    (tmp_path / "a.txt").write_text("toy-0003\ntoy-0021\n\n")
    (tmp_path / "b.jsonl").write_text('{"key": "toy-0003", "reason": "hash"}\n{"key": "toy-0021"}\n')
    fingerprints, data = [], settings(corpus)
    for name in ("a.txt", "b.jsonl"):
        source = Source(shards=str(corpus), without=str(tmp_path / name))
        plan = open_plan(data.model_copy(update={"sources": (source,)}), seed=0, batch_size=BATCH)
        keys = {plan.sources[0].index.key(plan.draw(s, b).sample) for s in range(4) for b in range(BATCH)}  # pyright: ignore[reportAttributeAccessIssue]
        assert len(keys) == 24
        assert not keys & {"toy-0003", "toy-0021"}
        fingerprints.append(plan.fingerprint)
    assert fingerprints[0] == fingerprints[1] != open_plan(data, seed=0, batch_size=BATCH).fingerprint


def test_several_clips_of_a_video_open_it_once(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    """The clips differ."""
    opened = []
    begin = DecodeWorker.begin
    monkeypatch.setattr(
        DecodeWorker, "begin", lambda self, video, *a, **k: (opened.append(video), begin(self, video, *a, **k))
    )
    data = settings(corpus, clip=Clip(frames=4, fps=4, per_video=2))
    with ClipLoader(data, Loader(workers=0), seed=0, batch_size=4) as loader:
        for _ in range(3):
            (clips,) = next(loader).groups
            assert clips.keys[0] == clips.keys[1] != clips.keys[2] == clips.keys[3]
            assert not torch.equal(clips.frames[0], clips.frames[1])
    assert len(opened) == 6 + 1  # plus one prefetched


def test_unscaled_clips_outlive_the_next_decoded_video(corpus: Path):
    crop = Crop(px=64, scale=(2 / 3, 2 / 3), aspect=(1, 1), flip=0)
    with ClipLoader(settings(corpus, crop=crop), Loader(workers=0), seed=0, batch_size=8) as loader:
        (clips,) = next(loader).groups
        for slot, frames in zip(clips.slots, clips.frames, strict=True):
            draw = loader.plan.draw(0, slot)
            chosen, index = choose(loader.plan, crop, draw, step=0, slot=slot), index_of(loader.plan, draw)
            assert (chosen.box.height, chosen.box.width) == (64, 64)
            video, left = index.read(draw.sample).video, chosen.box.left
            want = decode(video, chosen.times.frames, backend="pyav", expect=Expect(48, 96, 64))
            assert torch.equal(frames, torch.from_numpy(want[:, :, left : left + 64]))


SIGNALLED = """
import math, multiprocessing, os, signal, sys
from multiprocessing import forkserver, resource_tracker
from vjepa_data.child_process import STOP_SIGNALS, start_fork_server
start_fork_server(["torch"])
helpers = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid
for helper in helpers:
    for number in STOP_SIGNALS:
        os.kill(helper, number)
worker = multiprocessing.get_context("forkserver").Process(target=math.sqrt, args=(4,))
worker.start()
worker.join()
multiprocessing.get_context("forkserver").Lock()
assert worker.exitcode == 0
assert (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid) == helpers
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


def test_signals_during_the_start_reach_only_the_trainer() -> None:
    """A scheduler signals all processes of a job, also while workers start."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_exports_the_loader_without_importing_torch():
    code = "import sys, vjepa_data; assert 'torch' not in sys.modules; print(vjepa_data.ClipLoader.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "vjepa_data.reader.loader"
