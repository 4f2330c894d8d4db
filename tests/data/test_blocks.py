"""Batches lie in memory that workers reuse, which must not be visible to the trainer."""

import gc
import hashlib
import io
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vjepa_data.reader import shared_buffers as module
from vjepa_data.reader.batch import Batch, Clips
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.reader.shared_buffers import InSharedBuffer, SharedBuffer, SharedBuffers
from vjepa_data.settings import Clip, Crop, Data, Loader, Source

PX, FRAMES, BATCH = 32, 4, 4


def loader_of(corpus: Path, **settings) -> ClipLoader:
    data = Data(sources=(Source(shards=str(corpus)),), clip=Clip(frames=FRAMES, fps=4), crop=Crop(px=PX))
    loader = Loader(**{"workers": 2, "prefetch_steps": 1, "decoder": "pyav", **settings})
    return ClipLoader(data, loader, seed=1, batch_size=BATCH)


def digest(batch: Batch) -> tuple:
    return batch.step, *(hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in batch.pixels)


@pytest.fixture(scope="module")
def expected(corpus: Path) -> list[tuple]:
    with loader_of(corpus, workers=0) as batches:
        return [digest(next(batches)) for _ in range(60)]


def test_memory_of_dropped_batches_is_reused(corpus: Path, expected: list[tuple]):
    with loader_of(corpus) as batches:
        addresses = set()
        for want in expected[:30]:
            batch = next(batches)
            assert digest(batch) == want
            addresses.add(batch.groups[0].frames.data_ptr())
    assert len(addresses) <= 2 * (1 + 1)


KEEP: dict[str, Callable[[Batch], object]] = {
    "the batch": lambda batch: batch,
    "a tensor that is a view": lambda batch: batch.groups[0].frames[1:],
    "an array of numpy's": lambda batch: batch.groups[0].frames.numpy()[1:],
    "a part of a part": lambda batch: batch.split(2)[1].groups[0].frames.numpy().reshape(-1)[10:],
    "an exported tensor": lambda batch: np.from_dlpack(batch.groups[0].frames.permute(0, 4, 1, 2, 3)),
    "a storage": lambda batch: batch.groups[0].frames.untyped_storage(),
}


def content(kept: object) -> bytes:
    if isinstance(kept, Batch):
        kept = kept.groups[0].frames
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.frombuffer(bytearray(kept), dtype=torch.uint8)
    return np.asarray(kept).tobytes()


def test_kept_parts_of_a_batch_never_change(corpus: Path, expected: list[tuple]):
    """This holds for views, arrays and storages, also after the loader is gone."""
    with loader_of(corpus, prefetch_steps=8) as batches:
        kept = {name: take(next(batches)) for name, take in KEEP.items()}
        before = {name: content(of_batch) for name, of_batch in kept.items()}
        addresses = set()
        for want in expected[len(KEEP) :][:50]:
            batch = next(batches)
            assert digest(batch) == want
            addresses.add(batch.groups[0].frames.data_ptr())
        assert len(addresses) < 20  # a free buffer was always found
        assert {name: content(of_batch) for name, of_batch in kept.items()} == before
    gc.collect()
    with loader_of(corpus) as others:
        for want in expected[:10]:
            assert digest(next(others)) == want
    assert {name: content(of_batch) for name, of_batch in kept.items()} == before


def test_all_batches_can_be_kept(corpus: Path, expected: list[tuple]):
    """They stay correct when the loader is gone."""
    with loader_of(corpus, workers=1) as batches:
        kept = [next(batches) for _ in range(20)]
    del batches
    gc.collect()
    assert [digest(batch) for batch in kept] == expected[:20]
    assert len({batch.groups[0].frames.data_ptr() for batch in kept}) == 20


def test_a_killed_worker_does_not_change_kept_batches(corpus: Path, expected: list[tuple]):
    kept = []
    with loader_of(corpus, start_method="fork") as batches:  # whose children have the trainer's batches, too
        for step in range(14):
            if step == 5:
                os.kill(batches._batches._workers[1].pid, signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]
            batch = next(batches)
            assert digest(batch) == expected[step]
            if step % 3 == 0:
                kept.append(batch)
    assert [digest(batch) for batch in kept] == expected[:14:3]


def test_two_loaders_do_not_mix_their_buffers(corpus: Path, expected: list[tuple]):
    with loader_of(corpus, workers=1) as one, loader_of(corpus, workers=1) as other:
        kept = next(one)
        for step in range(12):
            assert digest(next(other)) == expected[step]
            assert digest(next(one)) == expected[step + 1]
        assert digest(kept) == expected[0]


def test_file_descriptors_and_memory_do_not_leak(corpus: Path):
    def held() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        return len(os.listdir("/proc/self/fd")), sum("/dev/shm/torch_" in line for line in maps)

    def draw(count: int) -> tuple[int, int]:
        with loader_of(corpus) as batches:
            for _ in range(count):
                next(batches)
            return held()

    at_work = draw(5)
    at_rest = held()
    assert draw(60) <= at_work
    deadline = time.monotonic() + 60
    while not held() <= at_rest and time.monotonic() < deadline:  # workers end in the background
        time.sleep(0.1)
    assert held() <= at_rest
    assert at_work[1] == at_rest[1] + 4  # buffers of two workers, their states, and the board of the watchdog


@pytest.mark.parametrize("crop_on", ["cpu", "device"])
def test_clips_of_16_and_64_frames_share_a_buffer(videos, make_corpus, tmp_path: Path, crop_on: str):
    still, facts = videos[0], {"frames": 48, "fps": 12.0, "width": 96, "height": 64}
    folder = make_corpus(tmp_path / "c", [[{"key": f"k{i}", "video": still, **facts} for i in range(5)]])
    sources = tuple(Source(shards=str(folder), frames=frames, fps=12) for frames in (16, 64))
    data = Data(sources=sources, clip=Clip(short="hold"), crop=Crop(px=PX))

    def read(workers: int) -> Iterator[Batch]:
        loader = Loader(workers=workers, prefetch_steps=1, crop_on=crop_on)  # pyright: ignore[reportArgumentType]
        with ClipLoader(data, loader, seed=1, batch_size=6) as batches:
            for _ in range(8):
                yield next(batches)

    addresses = set()
    for here, there in zip(read(0), read(1), strict=True):
        assert digest(here) == digest(there)
        short, long = there.on(torch.device("cpu")).groups
        assert short.frames.shape == (3, 16, PX, PX, 3)
        assert long.frames.shape == (3, 64, PX, PX, 3)
        assert there.pixels[0].untyped_storage().data_ptr() == there.pixels[1].untyped_storage().data_ptr()
        addresses.add(there.pixels[0].data_ptr())
    assert len(addresses) <= 2


@pytest.fixture
def as_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_worker_info", lambda: SimpleNamespace(id=0))


def send(buffers: SharedBuffers, value: int, *, clips: int = 2) -> SharedBuffer | None:
    """Do the same as a worker, up to the message."""
    (pixels,), buffer = buffers.take([(clips, 1, 8, 8, 3)])
    pixels.fill_(value)
    batch = Batch(0, (Clips(pixels, (0, 1), ("a", "b"), (0, 0), (0.0, 0.0)),))
    if buffer is not None:
        inbox.append(bytes(ForkingPickler.dumps(InSharedBuffer(batch, buffer))))
    return buffer


inbox: list[bytes] = []


def test_a_buffer_is_free_once_its_last_view_is_dropped(as_worker: None):
    """And not before."""
    buffers = SharedBuffers(workers=1, each=2, size=2 * 8 * 8 * 3)
    first, second = send(buffers, 1), send(buffers, 2)
    assert first
    assert second
    assert (first.index, second.index) == (0, 1)
    assert send(buffers, 3) is None
    batch = pickle.loads(inbox.pop(0))
    view = batch.groups[0].frames.numpy()[0, 0, 0]
    del batch
    assert send(buffers, 3) is None
    assert view.max() == 1
    del view
    assert send(buffers, 3) == first
    assert pickle.loads(inbox.pop(0)).groups[0].frames.max() == 2
    assert send(buffers, 4) == second
    inbox.clear()


def test_a_batch_larger_than_a_buffer_takes_fresh_memory(as_worker: None):
    buffers = SharedBuffers(workers=1, each=2, size=2 * 8 * 8 * 3)
    assert send(buffers, 1, clips=3) is None
    assert send(buffers, 1, clips=1)
    assert pickle.loads(inbox.pop()).groups[0].frames.untyped_storage().nbytes() == 8 * 8 * 3


def test_a_copied_batch_frees_its_buffer(as_worker: None):
    """The pinning thread of DataLoader receives batches, copies them, and keeps the copy."""
    buffers = SharedBuffers(workers=1, each=1, size=2 * 8 * 8 * 3)
    send(buffers, 1)
    received = pickle.loads(inbox.pop())
    copied = received.with_pixels(p.clone() for p in received.pixels)
    del received
    assert send(buffers, 2)
    assert copied.groups[0].frames.max() == 1
    inbox.clear()


def test_a_forked_process_does_not_free_the_buffer(as_worker: None):
    """It drops only its copy of the batch."""
    buffers = SharedBuffers(workers=1, each=1, size=2 * 8 * 8 * 3)
    send(buffers, 1)
    batch = pickle.loads(inbox.pop())
    child = os.fork()
    if child == 0:
        del batch
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert send(buffers, 2) is None
    assert batch.groups[0].frames.max() == 1


def echo(inward, outward) -> None:
    outward.put(inward.get().groups[0].frames.int().sum().item())


def test_a_batch_can_go_to_another_process(corpus: Path, expected: list[tuple]):
    context = torch.multiprocessing.get_context("forkserver")
    inward, outward = context.Queue(), context.Queue()
    child = context.Process(target=echo, args=(inward, outward), daemon=True)
    child.start()
    with loader_of(corpus, workers=1) as batches:
        batch = next(batches)
        total = batch.groups[0].frames.int().sum().item()
        inward.put(batch)
        for want in expected[1:20]:
            assert digest(next(batches)) == want
        assert outward.get(timeout=60) == total
        assert digest(batch) == expected[0]
    child.join()


def test_a_batch_can_be_saved(corpus: Path, expected: list[tuple]):
    with loader_of(corpus, workers=1) as batches:
        sink = io.BytesIO()
        torch.save(next(batches).groups[0].frames, sink)
    sink.seek(0)
    assert hashlib.sha256(torch.load(sink).numpy().tobytes()).hexdigest() == expected[0][1]
