"""Tars that others wrote are indexed as they are, and read by the training stream's index."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore, Trouble

from vjepa_data.build.admit import admit
from vjepa_data.build.verify import verify
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.index import Index
from vjepa_data.settings import BadInput


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


@pytest.fixture
def foreign(videos: list[bytes], tmp_path: Path) -> Path:
    """Tars as video2dataset writes them: keys that repeat from tar to tar, captions, a clip that is damaged."""
    folder = tmp_path / "webvid"
    caption = {"caption": "a cat", "views": 7, "clips": [[0, 1]]}
    members = {"00000.mp4": videos[0], "00000.txt": b"a cat", "00000.json": json.dumps(caption).encode()}
    write_tar(folder / "00000.tar", {**members, "00001.mp4": videos[1], "00002.mp4": videos[2][:400]})
    write_tar(folder / "sub" / "00001-val.tar", {"00000.json": b"{}", "00000.mp4": videos[3], "x/a.B.pyd": b"cos"})
    return folder


def test_foreign_shards_are_admitted_as_they_are(foreign: Path, videos: list[bytes]) -> None:
    before = {path: path.read_bytes() for path in foreign.rglob("*.tar")}
    found = admit(foreign, splits={"*-val.tar": "val"})
    assert {path: path.read_bytes() for path in foreign.rglob("*.tar")} == before
    assert found.manifest.splits["train"]["samples"] == 2
    assert found.manifest.splits["val"]["samples"] == 1
    assert found.rejects == {"no_index": 1}
    train = Index(foreign, "train")
    assert [train.read(number).video for number in range(2)] == videos[:2]
    assert train.read(0).json.startswith(b'{"caption"')
    assert train.read(1).json == b""
    assert [train.key(number) for number in range(2)] == ["00000/00000", "00001"]
    assert Index(foreign, "val").read(0).video == videos[3]
    assert verify(foreign, deep=True).problems == ()
    labels = pq.read_table(foreign / "samples.parquet")["labels"].to_pylist()
    assert [json.loads(text) for text in labels] == [{"caption": "a cat", "views": 7}, {}, {}]


def test_what_is_not_canonical_is_told(foreign: Path) -> None:
    assert admit(foreign).flaws == {"it has an edit list": 3}


def test_tars_that_may_not_be_touched_are_linked_to(foreign: Path, tmp_path: Path, videos: list[bytes]) -> None:
    admit(foreign, out=tmp_path / "o", deep=True)
    assert not (foreign / "manifest.json").exists()
    assert Index(tmp_path / "o", "train").read(2).video == videos[3]
    assert verify(tmp_path / "o").problems == ()


def test_two_tars_whose_links_would_have_one_name_are_refused(foreign: Path, tmp_path: Path) -> None:
    write_tar(foreign / "sub-00001-val.tar", {"00000.mp4": b""})
    with pytest.raises(BadInput, match=r"would both be linked as shards/sub-00001-val\.tar; rename one"):
        admit(foreign, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_damaged_or_missing_tars_are_bad_input(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tars below it"):
        admit(tmp_path / "nothing")
    tar = foreign / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(BadInput, match=r"00000.tar: .*copy it again"):
        admit(foreign)
    assert not (foreign / "manifest.json").exists()


def test_a_corpus_with_a_manifest_is_left_alone(foreign: Path) -> None:
    admit(foreign)
    with pytest.raises(BadInput, match="has a manifest already"):
        admit(foreign)


@pytest.fixture
def address(foreign: Path, store: ObjectStore) -> str:
    """Of the tars on a web server that knows no ranges, and is busy at every other request."""
    store.take(foreign)
    store.trouble = lambda asked: Trouble(status=503) if len(store.requests) % 2 else Trouble(knows_ranges=False)
    return f"{store.url}/{foreign.name}"


def test_tars_behind_addresses_are_indexed_and_read_from_there(
    foreign: Path, store: ObjectStore, address: str, videos: list[bytes], tmp_path: Path
) -> None:
    (foreign / "sub" / "00001-val.tar").rename(foreign / "00001.tar")
    store.take(foreign)
    found = admit(f"{address}/{{00000..00001}}.tar", out=tmp_path / "o", name="far")
    here = admit(foreign, name="far", out=tmp_path / "here")
    assert [(s.file, s.sha256, s.bytes) for s in found.manifest.shards] == [
        (s.file.removeprefix("shards/"), s.sha256, s.bytes) for s in here.manifest.shards
    ]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "manifest.json",
        "rejects.parquet",
        "samples.parquet",
    ]
    index = Index(tmp_path / "o", "train", Cache(tmp_path / "cache", 1))
    assert [index.read(number).video for number in range(3)] == [videos[0], videos[1], videos[3]]
    assert verify(tmp_path / "o", deep=True).problems == ()
    del store.objects[f"{foreign.name}/00001.tar"]
    assert verify(tmp_path / "o").problems == ("00001.tar: it is not there",)


def test_addresses_that_cannot_be_indexed_are_said(address: str, tmp_path: Path) -> None:
    for place, out, message in [
        (f"{address}/00000.tar", None, "give --out a folder"),
        (f"{address}/", tmp_path / "o", "a web server does not list its files; name them, as in"),
        (f"{address}/absent.tar", tmp_path / "o", "absent.tar: cannot be read"),
        ("pipe:cat x.tar", tmp_path / "o", "is no place to read shards from"),
    ]:
        with pytest.raises(BadInput, match=message):
            admit(place, out=out)


def test_a_manifest_that_places_its_shards_elsewhere_on_this_machine_is_refused(foreign: Path, edit_manifest) -> None:
    admit(foreign)
    edit_manifest(foreign, lambda manifest: manifest["spec"].update(root="/etc"))
    with pytest.raises(BadInput, match="which is no address"):
        Index(foreign, "train")
