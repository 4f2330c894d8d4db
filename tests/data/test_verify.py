"""Each test damages a real corpus in a way that verification must report."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore

from vjepa_data.builder.verify import verify
from vjepa_data.corpus.format import SampleRecord, ShardWriter, read_manifest, write_manifest
from vjepa_data.media.transcode import transcode
from vjepa_data.settings import BadInput
from vjepa_data.spec import Encode, Filter


@pytest.fixture(scope="module")
def clip(videos: list[bytes], tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    path.write_bytes(videos[0])
    return transcode(path, start_s=None, end_s=None, encode=Encode(short_side_px=64), accept=Filter())


@pytest.fixture
def corpus(clip, tmp_path: Path) -> Path:
    """Write two shards of three samples each, as the builder does."""
    folder = tmp_path / "corpus"
    (folder / "shards").mkdir(parents=True)
    records = []
    for number in range(2):
        writer = ShardWriter(folder, number=number, file=f"shards/toy-train-{number:06d}.tar", split="train")
        for position in range(3):
            stored = {"frames": 48, "fps": 12.0, "width": clip.stored.width, "height": 64, "duration_s": 4.0}
            key = f"toy-{number}{position}"
            facts = {"key": key, "group": key, "labels": {}, "stored": stored}
            writer.write(SampleRecord(key, clip.data, "mp4", facts))
        writer.commit(plan="p")
        records.append(json.loads((folder / "shards" / f"{number:06d}.json").read_bytes()))
    write_manifest(folder, records, [], name="toy", spec={}, tools={})
    return folder


def edit(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_an_intact_corpus_has_no_problems(corpus: Path) -> None:
    verdict = verify(corpus, deep=True)
    assert (verdict.problems, verdict.samples, verdict.decoded) == ((), 6, 6)
    assert verdict.bytes == sum(shard.bytes for shard in read_manifest(corpus).shards)


def test_a_flipped_bit_in_a_video_is_located(corpus: Path) -> None:
    row = pq.read_table(corpus / "samples.parquet").to_pylist()[4]
    edit(corpus / "shards/toy-train-000001.tar", lambda data: data.__setitem__(row["video_offset"] + 99, 0xAB))
    found = verify(corpus).problems
    assert len(found) == 2
    assert "sha256 differs" in found[0]
    assert f"{row['key']}: its mp4 has changed" in found[1]


def test_a_flipped_bit_in_a_header_is_found(corpus: Path) -> None:
    edit(corpus / "shards/toy-train-000000.tar", lambda data: data.__setitem__(3, 0x5A))
    assert any("members differ" in line for line in verify(corpus).problems)


def test_a_shard_truncated_at_a_member_is_found(corpus: Path) -> None:
    row = pq.read_table(corpus / "samples.parquet").to_pylist()[1]
    edit(corpus / "shards/toy-train-000000.tar", lambda data: data.__delitem__(slice(row["json_offset"] - 512, None)))
    assert ["bytes, expected" in line for line in verify(corpus).problems] == [True]


def test_a_missing_shard_is_found(corpus: Path) -> None:
    (corpus / "shards/toy-train-000001.tar").unlink()
    assert verify(corpus).problems == ("shards/toy-train-000001.tar: missing",)


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_a_remote_corpus_is_verified(
    corpus: Path, s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    s3.take(corpus)
    place = {"http": f"{s3.url}/corpus", "s3": "s3://corpus"}[kind]
    verdict = verify(place, deep=True)
    assert (verdict.problems, verdict.samples, verdict.decoded) == ((), 6, 6)
    row = pq.read_table(corpus / "samples.parquet").to_pylist()[4]
    s3.flip("corpus/shards/toy-train-000001.tar", row["video_offset"] + 99)
    del s3.objects["corpus/shards/toy-train-000000.tar"]
    assert verify(place).problems == (
        "shards/toy-train-000000.tar: missing",
        "shards/toy-train-000001.tar: sha256 differs from the manifest",
        f"shards/toy-train-000001.tar: {row['key']}: its mp4 has changed (xxh64 differs)",
    )
    assert not list((tmp_path / "cache").rglob("*.tar"))  # copied one at a time, and not kept


def test_swapped_shards_are_found(corpus: Path) -> None:
    first, second = (corpus / f"shards/toy-train-00000{number}.tar" for number in range(2))
    first.rename(corpus / "x")
    second.rename(first)
    (corpus / "x").rename(second)
    assert sum("sha256 differs" in line for line in verify(corpus).problems) == 2


def test_deep_finds_a_stored_clip_that_does_not_decode(corpus: Path, clip) -> None:
    folder = corpus.parent / "bad"
    (folder / "shards").mkdir(parents=True)
    writer = ShardWriter(folder, number=0, file="shards/toy-train-000000.tar", split="train")
    noise = np.random.default_rng(0).bytes(len(clip.data) // 2)
    stored = {"frames": 48, "fps": 12.0, "width": clip.stored.width, "height": 64, "duration_s": 4.0}
    damaged = clip.data[: len(clip.data) // 2] + noise
    writer.write(SampleRecord("toy-0", damaged, "mp4", {"key": "toy-0", "group": "g", "labels": {}, "stored": stored}))
    writer.commit(plan="p")
    write_manifest(folder, [json.loads((folder / "shards/000000.json").read_bytes())], [], name="t", spec={}, tools={})
    assert verify(folder).problems == ()
    assert ["toy-0: check_failed" in line for line in verify(folder, deep=True).problems] == [True]


def test_a_group_in_two_splits_is_found(corpus: Path) -> None:
    records = [json.loads((corpus / f"shards/00000{number}.json").read_bytes()) for number in range(2)]
    records[1]["split"] = "val"
    for record in records:
        for row in record["samples"]:
            row["group"] = "same"
    write_manifest(corpus, records, [], name="toy", spec={}, tools={})
    assert any("groups in several splits: 1" in line for line in verify(corpus).problems)


def test_a_changed_manifest_or_table_is_an_error(corpus: Path) -> None:
    shutil.copytree(corpus, corpus.parent / "two")
    edit(corpus / "manifest.json", lambda data: data.__setitem__(slice(None), data.replace(b'"toy"', b'"tox"')))
    with pytest.raises(BadInput, match="does not match its hash"):
        verify(corpus)
    edit(corpus.parent / "two" / "samples.parquet", lambda data: data.__setitem__(60, data[60] ^ 1))
    with pytest.raises(BadInput, match=r"samples.parquet: differs from the manifest"):
        verify(corpus.parent / "two")
    with pytest.raises(BadInput, match="No such file"):
        verify(corpus.parent)
