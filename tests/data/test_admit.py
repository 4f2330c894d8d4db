"""Foreign tars are indexed unchanged, and read by the training stream's index."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore, Trouble
from PIL import ExifTags, Image

from vjepa_data.builder.index_foreign import index_shards
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
    """Tars as video2dataset writes them: keys that repeat across tars, captions, and a damaged clip."""
    folder = tmp_path / "webvid"
    caption = {"caption": "a cat", "views": 7, "clips": [[0, 1]]}
    members = {"00000.mp4": videos[0], "00000.txt": b"a cat", "00000.json": json.dumps(caption).encode()}
    write_tar(folder / "00000.tar", {**members, "00001.mp4": videos[1], "00002.mp4": videos[2][:400]})
    write_tar(folder / "sub" / "00001-val.tar", {"00000.json": b"{}", "00000.mp4": videos[3], "x/a.B.pyd": b"cos"})
    return folder


def test_foreign_shards_are_indexed_unchanged(foreign: Path, videos: list[bytes]) -> None:
    before = {path: path.read_bytes() for path in foreign.rglob("*.tar")}
    found = index_shards(foreign, splits={"*-val.tar": "val"})
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


def test_clips_that_are_not_canonical_are_counted(foreign: Path) -> None:
    assert index_shards(foreign).flaws == {"it has an edit list": 3}


def test_members_of_a_sample_may_be_apart_in_a_tar(videos: list[bytes], tmp_path: Path) -> None:
    """Labels are kept, and every omitted file is listed as a reject."""
    apart = [("a.json", b'{"of": "a"}'), ("b.json", b'{"of": "b"}'), ("pad.bin", bytes(100_000))]
    odd = [("c.webm", videos[2]), ("take 2.0.mp4", videos[3]), ("a.mp4", videos[4]), ("d.txt", b"no video")]
    write_tar(tmp_path / "in" / "x.tar", [*apart, ("a.mp4", videos[0]), ("b.mp4", videos[1]), *odd])
    found = index_shards(tmp_path / "in")
    assert found.rejects == {"duplicate": 1, "not_canonical": 2}
    index = Index(tmp_path / "in")
    samples = [index.read(number) for number in range(len(index))]
    assert [(sample.key, sample.labels, sample.video) for sample in samples] == [
        ("a", {"of": "a"}, videos[0]),
        ("b", {"of": "b"}, videos[1]),
    ]
    names = pq.read_table(tmp_path / "in" / "rejects.parquet")["source"].to_pylist()
    assert names == ["x.tar/a.mp4", "x.tar/c.webm", "x.tar/take 2.0.mp4"]


def test_labels_that_an_index_cannot_read_are_counted(videos: list[bytes], tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.mp4": videos[0], "a.json": b"[1]", "b.mp4": videos[1], "b.json": b'{"n": NaN}'})
    flaws = index_shards(tmp_path).flaws
    assert flaws["its json is not a JSON object, so it has no labels"] == 1
    assert pq.read_table(tmp_path / "samples.parquet")["labels"].to_pylist() == ["{}", "{}"]


def test_tars_with_the_same_name_do_not_share_keys(videos: list[bytes], tmp_path: Path) -> None:
    for folder, video in zip(("train", "val"), videos, strict=False):
        write_tar(tmp_path / folder / "00000.tar", {"0.mp4": video})
    index_shards(tmp_path)
    assert [Index(tmp_path).key(number) for number in range(2)] == ["train/00000/0", "val/00000/0"]
    assert verify(tmp_path).problems == ()


def test_foreign_photos_are_rotated_by_their_exif(tmp_path: Path) -> None:
    picture, turned, file = Image.new("RGB", (40, 24), "black"), Image.Exif(), io.BytesIO()
    picture.paste("white", (0, 0, 20, 24))  # the left half, which a clockwise rotation moves to the top
    turned[ExifTags.Base.Orientation] = 6
    picture.save(file, "JPEG", quality=95, exif=turned)
    write_tar(tmp_path / "photos.tar", {"one.jpg": file.getvalue()})
    assert index_shards(tmp_path, deep=True).rejects == {}
    index = Index(tmp_path)
    expect = Expect(1, int(index.width[0]), int(index.height[0]))
    (shown,) = decode(index.read(0).video, [0], backend="image", expect=expect)
    assert shown.shape == (40, 24, 3)
    assert shown[:15].min() > 240
    assert shown[25:].max() < 15


def test_images_that_cannot_be_decoded_are_omitted(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    members = {}
    for kind in ("JPEG", "PNG", "BMP", "GIF"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, kind)
        members[f"{kind.lower()}.jpg"] = file.getvalue()
    members["cut.jpg"] = members["jpeg.jpg"][:-1000]
    write_tar(tmp_path / "pictures.tar", members)
    assert sum(index_shards(tmp_path).rejects.values()) == 3
    assert [Index(tmp_path).key(number) for number in range(2)] == ["jpeg", "png"]


def test_with_out_the_tars_are_linked(foreign: Path, tmp_path: Path, videos: list[bytes]) -> None:
    index_shards(foreign, out=tmp_path / "o", deep=True)
    assert not (foreign / "manifest.json").exists()
    assert Index(tmp_path / "o", "train").read(2).video == videos[3]
    assert verify(tmp_path / "o").problems == ()


def test_links_with_the_same_name_are_an_error(foreign: Path, tmp_path: Path) -> None:
    write_tar(foreign / "sub-00001-val.tar", {"00000.mp4": b""})
    with pytest.raises(BadInput, match=r"would both be linked as shards/sub-00001-val\.tar; rename either"):
        index_shards(foreign, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_damaged_or_missing_tars_are_errors(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tars found"):
        index_shards(tmp_path / "nothing")
    tar = foreign / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    found = index_shards(foreign, out=tmp_path / "linked")
    assert found.rejects == {"truncated": 1}
    assert [shard.file for shard in found.manifest.shards] == ["shards/sub-00001-val.tar"]
    (foreign / "sub" / "00001-val.tar").write_bytes(b"")
    with pytest.raises(BadInput, match=r"in 2 tars can be used .*00000.tar/00000.mp4: truncated, .*copy the tar again"):
        index_shards(foreign)
    assert not (foreign / "manifest.json").exists()


def test_an_existing_manifest_is_not_replaced(foreign: Path) -> None:
    index_shards(foreign)
    with pytest.raises(BadInput, match="already has a manifest"):
        index_shards(foreign)


@pytest.fixture
def address(foreign: Path, store: ObjectStore) -> str:
    """URL of the tars on a web server that ignores ranges, and is busy at every other request."""
    store.take(foreign)
    store.trouble = lambda asked: Trouble(status=503) if len(store.requests) % 2 else Trouble(knows_ranges=False)
    return f"{store.url}/{foreign.name}"


def test_remote_tars_are_indexed_and_read_remotely(
    foreign: Path, store: ObjectStore, address: str, videos: list[bytes], tmp_path: Path
) -> None:
    (foreign / "sub" / "00001-val.tar").rename(foreign / "00001.tar")
    store.take(foreign)
    with pytest.raises(OSError, match="unreachable"):
        index_shards(f"{address}/{{00000..00001}}.tar", out=tmp_path / "o", name="far", advance=_fail)
    first = store.objects.pop(f"{foreign.name}/00000.tar")  # it is not read again
    found = index_shards(f"{address}/{{00000..00001}}.tar", out=tmp_path / "o", name="far")
    store.objects[f"{foreign.name}/00000.tar"] = first
    here = index_shards(foreign, name="far", out=tmp_path / "here")
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
    assert verify(tmp_path / "o").problems == ("00001.tar: missing",)


def _fail(done: int, total: int) -> None:
    raise OSError("the store is unreachable")


def test_urls_that_cannot_be_indexed_are_errors(address: str, tmp_path: Path) -> None:
    for place, out, message in [
        (f"{address}/00000.tar", None, "give a local folder with --out"),
        (f"{address}/", tmp_path / "o", "web servers cannot be listed; name the tars"),
        (f"{address}/absent.tar", tmp_path / "o", "absent.tar: missing, no such file"),
        ("pipe:cat x.tar", tmp_path / "o", "cannot read shards from"),
    ]:
        with pytest.raises(BadInput, match=message):
            index_shards(place, out=out)


def test_a_manifest_cannot_point_to_other_local_files(foreign: Path, edit_manifest) -> None:
    index_shards(foreign)
    edit_manifest(foreign, lambda manifest: manifest["spec"].update(root="/etc"))
    with pytest.raises(BadInput, match="is not a URL"):
        Index(foreign, "train")
