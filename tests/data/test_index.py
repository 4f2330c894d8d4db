import gc
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from vjepa_data.corpus.index import Index
from vjepa_data.errors import Unreadable
from vjepa_data.settings import BadInput


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus that a test may damage."""
    shutil.copytree(corpus, tmp_path / "copy")
    return tmp_path / "copy"


def read_with_webdataset(urls: str) -> list[dict]:
    """Read shards as any user of webdataset does. It leaves open files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(wds.WebDataset(urls, shardshuffle=False))  # pyright: ignore[reportAttributeAccessIssue]
        gc.collect()
    return samples


def test_samples_equal_those_of_webdataset(corpus: Path):
    index = Index(corpus)
    theirs = read_with_webdataset(str(corpus / "shards" / "toy-train-{000000..000003}.tar"))
    count = 0
    for i, other in enumerate(theirs):
        sample = index.read(i)
        assert (sample.key, sample.json, sample.video) == (other["__key__"], other["json"], other["mp4"])
        assert json.loads(sample.json)["key"] == sample.key
        count += 1
    assert count == len(index) == 26
    assert index.first.tolist() == [0, 9, 10, 22, 26]


def test_columns_are_arrays_without_copies(corpus: Path):
    index = Index(corpus)
    assert index.frames.dtype == np.int32
    assert not index.fps.flags.owndata
    assert index.fps.tolist() == [12.0] * 26


def test_a_large_index_is_memory_mapped(copy: Path, monkeypatch: pytest.MonkeyPatch):
    """Its file is written once."""
    want = Index(copy)
    monkeypatch.setattr("vjepa_data.corpus.sample_table.MAPPED_FROM", 10)
    first = Index(copy)
    (file,) = (copy / ".index").iterdir()
    written = file.stat().st_mtime_ns
    again = Index(copy)
    assert file.stat().st_mtime_ns == written
    for index in (first, again):
        assert [index.read(i) for i in range(26)] == [want.read(i) for i in range(26)]
    assert str(file) in Path("/proc/self/maps").read_text()


def test_the_index_of_a_read_only_corpus_goes_to_the_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vjepa_data.corpus.sample_table.MAPPED_FROM", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (copy / ".index").write_text("in the way")  # works for root too, unlike permissions
    assert len(Index(copy)) == 26
    assert len(list((tmp_path / "cache" / "vjepa_data").iterdir())) == 1


def damage_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 1024 * 512)


@pytest.mark.parametrize(("damage", "reason"), [(damage_cut, "size"), (Path.unlink, "missing")])
def test_a_truncated_or_missing_shard_is_detected(copy: Path, damage, reason: str):
    damage(copy / "shards" / "toy-train-000002.tar")
    index = Index(copy)
    assert index.read(9).key == "toy-0009"
    for sample in (10, 21):
        with pytest.raises(Unreadable) as e:
            index.read(sample)
        assert e.value.reason == reason
        assert "toy-train-000002.tar" in e.value.detail


def test_a_flipped_bit_is_detected_in_its_sample(copy: Path):
    index = Index(copy)
    path = copy / "shards" / "toy-train-000002.tar"
    data = bytearray(path.read_bytes())
    data[int(index.video_offset[16]) + 1000] ^= 1
    path.write_bytes(data)
    bad = []
    for sample in range(26):
        try:
            index.read(sample)
        except Unreadable as e:
            bad.append((sample, e.reason))
    assert bad == [(16, "hash")]


def test_a_tar_truncated_at_a_header_is_detected(copy: Path):
    """WebDataset reads such a tar without an error."""
    path = copy / "shards" / "toy-train-000002.tar"
    index = Index(copy)
    cut = int(index.json_offset[15]) - 512
    os.truncate(path, cut)
    assert len(read_with_webdataset(str(path))) == 5  # of 12, and no error
    with pytest.raises(Unreadable, match=r"has \d+ bytes, not \d+ as in the manifest"):
        Index(copy).read(10)


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "pipe:touch evil", "file:///etc/passwd", "a/../b"])
def test_a_manifest_cannot_name_other_files_or_commands(copy: Path, edit_manifest, file: str):
    edit_manifest(copy, lambda m: m["shards"][0].update(file=file))
    with pytest.raises(BadInput, match="is not a plain relative path"):
        Index(copy)


def test_invalid_corpora_are_refused(copy: Path, tmp_path: Path, edit_manifest):
    with pytest.raises(BadInput, match="No such file or directory; give a folder that"):
        Index(tmp_path)
    with pytest.raises(BadInput, match="has no split 'val', only train"):
        Index(copy, "val")
    edit_manifest(copy, lambda m: m["splits"]["train"].update(samples=27))
    with pytest.raises(BadInput, match=r"samples\.parquet has 26 samples of train, manifest\.json 27"):
        Index(copy)
    edit_manifest(copy, lambda m: m.update(format=2))
    with pytest.raises(BadInput, match="format 2, this version reads 1"):
        Index(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        Index(copy)
