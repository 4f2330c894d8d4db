"""The cache of a frozen encoder's features: exact, never stale, safe with several processes, harmless when full."""

import multiprocessing
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vjepa.methods import feature_cache
from vjepa.methods.feature_cache import FeatureCache, frame_keys

IDENTITY = {"encoder_sha256": "0" * 64, "precision": "fp32"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "RESERVED_BYTES", 0)


def frames_of(numbers: list[int]) -> Tensor:
    return torch.stack([torch.full((8, 8, 3), n, dtype=torch.uint8) for n in numbers])


class Counted:
    """An encoder of frames that counts how many it encodes."""

    def __init__(self, numbers: list[int], dtype: torch.dtype = torch.float32):
        self.numbers, self.dtype, self.encoded = numbers, dtype, []

    def __call__(self, rows: list[int]) -> Tensor:
        self.encoded += [self.numbers[row] for row in rows]
        return torch.stack([torch.arange(6.0).view(2, 3) * 1e-3 + self.numbers[row] for row in rows]).to(self.dtype)


def ask(cache: FeatureCache, numbers: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[int]]:
    encode = Counted(numbers, dtype)
    return cache.features(frame_keys(frames_of(numbers)), encode, device=CPU), encode.encoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype):
    first, encoded = ask(FeatureCache(tmp_path, IDENTITY), [1, 2, 2, 3], dtype)
    assert encoded == [1, 2, 3]
    again, encoded = ask(FeatureCache(tmp_path, IDENTITY), [3, 2, 4, 1], dtype)
    assert encoded == [4]
    assert again.dtype == dtype
    assert torch.equal(again[[3, 1, 1, 0]], first)


def test_another_encoder_or_picture_finds_nothing(tmp_path: Path):
    ask(FeatureCache(tmp_path, IDENTITY), [1, 2])
    for change in ({"encoder_sha256": "1" * 64}, {"precision": "bf16"}, {"device": "cuda"}):
        assert ask(FeatureCache(tmp_path, IDENTITY | change), [1, 2])[1] == [1, 2]
    frame = frames_of([1])
    other = frame.clone()
    other[0, 7, 7, 2] += 1
    keys = {frame_keys(x)[0] for x in (frame, other, frame.view(1, 4, 16, 3))}
    assert len(keys) == 3


def fill(folder: Path, numbers: list[int]) -> None:
    feature_cache.RESERVED_BYTES = 0
    cache = FeatureCache(folder, IDENTITY)
    for number in numbers:
        ask(cache, [number, number + 1])


def test_processes_share_what_they_have_written(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=fill, args=(tmp_path, list(range(k, k + 20)))) for k in (0, 10)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    numbers = list(range(31))
    found, encoded = ask(FeatureCache(tmp_path, IDENTITY), numbers)
    assert encoded == []
    assert torch.equal(found, Counted(numbers)(numbers))


def test_records_of_others_are_found_while_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = FeatureCache(tmp_path, IDENTITY), FeatureCache(tmp_path, IDENTITY)
    ask(first, [1, 2])
    assert ask(second, [1])[1] == [1]
    monkeypatch.setattr(feature_cache, "REFRESH_S", 0.0)
    assert ask(second, [2])[1] == []


@pytest.mark.parametrize("damage", ["torn key", "no record", "changed record", "no file"])
def test_damaged_records_are_computed_again(tmp_path: Path, damage: str):
    cache = FeatureCache(tmp_path, IDENTITY)
    expected, _ = ask(cache, [1, 2])
    (keys,), (records,) = tmp_path.rglob("*.keys"), tmp_path.rglob("*.features")
    if damage == "torn key":
        keys.write_bytes(keys.read_bytes()[:-3])
    elif damage == "no record":
        records.write_bytes(records.read_bytes()[:-3])
    elif damage == "changed record":
        content = bytearray(records.read_bytes())
        content[-1] ^= 1
        records.write_bytes(content)
    else:
        records.unlink()
    found, encoded = ask(FeatureCache(tmp_path, IDENTITY), [1, 2])
    assert encoded == ([1, 2] if damage == "no file" else [2])
    assert torch.equal(found, expected)
    assert torch.equal(ask(FeatureCache(tmp_path, IDENTITY), [1, 2])[0], expected)


def test_a_full_disk_costs_speed_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A limit on the size of files stands for the disk: the write fails in its middle."""
    cache = FeatureCache(tmp_path, IDENTITY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
    try:
        found, _ = ask(cache, [1, 2, 3])
        again, encoded = ask(cache, [1, 2, 3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert encoded == [1, 2, 3]
    assert torch.equal(found, again)
    assert caplog.text.count("no more features are stored") == 1
    assert torch.equal(ask(FeatureCache(tmp_path, IDENTITY), [1, 2, 3])[0], found)


def test_space_is_left_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feature_cache, "RESERVED_BYTES", 1 << 60)
    ask(FeatureCache(tmp_path, IDENTITY), [1])
    assert not list(tmp_path.rglob("*.features"))


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file", IDENTITY)
    assert np.allclose(ask(cache, [5])[0].mean(), 5, atol=0.01)
