import hashlib
from pathlib import Path

import pytest

from vjepa_data.loader import ClipLoader
from vjepa_data.settings import Clip, Crop, Data, Loader, Source

BATCH = 12


def settings(*folders: Path, **more) -> Data:
    clip = more.pop("clip", Clip(frames=4, fps=4))
    crop = more.pop("crop", Crop(px=32))
    return Data(sources=tuple(Source(shards=str(f)) for f in folders), clip=clip, crop=crop, **more)


def stream(data: Data, steps: range, *, world: int = 1, workers: int = 0, method: str = "forkserver") -> list[dict]:
    """Read some steps on each rank of a world; give {slot: (key, hash of pixels)} for each step."""
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
def test_keys_and_pixels_are_the_same_for_any_world_and_workers(
    corpus: Path, expected: list[dict], world: int, workers: int
):
    assert stream(settings(corpus), range(6), world=world, workers=workers) == expected


@pytest.mark.parametrize("step", [1, 4, 5])
def test_resuming_at_a_step_equals_walking_there(corpus: Path, expected: list[dict], step: int):
    assert stream(settings(corpus), range(step, 6), world=2, workers=step % 2) == expected[step:]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_every_start_method_gives_the_same_stream(corpus: Path, expected: list[dict], method: str):
    assert stream(settings(corpus), range(3), workers=1, method=method) == expected[:3]


def test_an_epoch_shows_each_sample_once(corpus: Path):
    keys = [key for step in stream(settings(corpus), range(13)) for key, _ in step.values()]
    assert len(keys) == 6 * 26
    assert {keys.count(k) for k in set(keys)} == {6}
