"""Tars that others wrote are indexed as they are, and read by the training stream's index."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore, Trouble
from PIL import ExifTags, Image

from vjepa_data.builder.index_foreign import admit
from vjepa_data.builder.verify import verify
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.index import Index
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.settings import BadInput


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
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


def test_a_tar_in_any_order_keeps_its_labels_and_what_is_left_out_is_said(videos: list[bytes], tmp_path: Path) -> None:
    apart = [("a.json", b'{"of": "a"}'), ("b.json", b'{"of": "b"}'), ("pad.bin", bytes(100_000))]
    odd = [("c.webm", videos[2]), ("take 2.0.mp4", videos[3]), ("a.mp4", videos[4]), ("d.txt", b"no video")]
    write_tar(tmp_path / "in" / "x.tar", [*apart, ("a.mp4", videos[0]), ("b.mp4", videos[1]), *odd])
    found = admit(tmp_path / "in")
    assert found.rejects == {"duplicate": 1, "not_canonical": 2}
    index = Index(tmp_path / "in")
    samples = [index.read(number) for number in range(len(index))]
    assert [(sample.key, sample.labels, sample.video) for sample in samples] == [
        ("a", {"of": "a"}, videos[0]),
        ("b", {"of": "b"}, videos[1]),
    ]
    names = pq.read_table(tmp_path / "in" / "rejects.parquet")["source"].to_pylist()
    assert names == ["x.tar/a.mp4", "x.tar/c.webm", "x.tar/take 2.0.mp4"]


def test_tars_of_one_name_in_several_folders_do_not_share_keys(videos: list[bytes], tmp_path: Path) -> None:
    for folder, video in zip(("train", "val"), videos, strict=False):
        write_tar(tmp_path / folder / "00000.tar", {"0.mp4": video})
    admit(tmp_path)
    assert [Index(tmp_path).key(number) for number in range(2)] == ["train/00000/0", "val/00000/0"]
    assert verify(tmp_path).problems == ()


def test_photos_of_others_are_upright_as_their_exif_says(tmp_path: Path) -> None:
    picture, turned, file = Image.new("RGB", (40, 24), "black"), Image.Exif(), io.BytesIO()
    picture.paste("white", (0, 0, 20, 24))  # the left half, which a turn to the right puts on top
    turned[ExifTags.Base.Orientation] = 6
    picture.save(file, "JPEG", quality=95, exif=turned)
    write_tar(tmp_path / "photos.tar", {"one.jpg": file.getvalue()})
    assert admit(tmp_path, deep=True).rejects == {}
    index = Index(tmp_path)
    expect = Expect(1, int(index.width[0]), int(index.height[0]))
    (shown,) = decode(index.read(0).video, [0], backend="image", expect=expect)
    assert shown.shape == (40, 24, 3)
    assert shown[:15].min() > 240
    assert shown[25:].max() < 15


def test_pictures_that_cannot_be_decoded_are_left_out(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    members = {}
    for kind in ("JPEG", "PNG", "BMP", "GIF"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        members[f"{kind.lower()}.jpg"] = file.getvalue()
    members["cut.jpg"] = members["jpeg.jpg"][:-1000]
    write_tar(tmp_path / "pictures.tar", members)
    assert sum(admit(tmp_path).rejects.values()) == 3
    assert [Index(tmp_path).key(number) for number in range(2)] == ["jpeg", "png"]


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
    with pytest.raises(BadInput, match=r"^00000\.tar: .* goes on after the end of the tar; copy it again"):
        admit(foreign, out=tmp_path / "linked")
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
