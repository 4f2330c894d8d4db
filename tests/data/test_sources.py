"""Sources of videos: tars, URLs, images, scenes and duplicates."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from object_store import Asked, ObjectStore, Trouble
from PIL import Image
from rich.console import Console

from vjepa_data.builder import shard
from vjepa_data.builder.index_foreign import index_shards
from vjepa_data.builder.ingest import ingest
from vjepa_data.builder.verify import verify
from vjepa_data.config_files import load_settings
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.format import Manifest, read_manifest
from vjepa_data.corpus.index import Index
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.media import fetch
from vjepa_data.media.analysis import difference_hash, perceptual_hashes, scene_starts
from vjepa_data.media.fetch import FileRef, open_local
from vjepa_data.media.probe import probe
from vjepa_data.media.video import Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

SMALL = ["encode.short_side_px=32", "encode.preset=ultrafast", "name=toy"]


def build(sources: list[Path | str], out: Path, *overrides: str) -> Manifest:
    spec = load_settings(Spec, None, [*SMALL, *overrides]).settings
    return shard([str(path) for path in sources], out, spec=spec, workers=1, console=Console(file=io.StringIO()))


def rows_of(out: Path, table: str = "samples") -> list[dict]:
    return pq.read_table(out / f"{table}.parquet").to_pylist()


def write_scenes(path: Path, looks: list[int], *, seconds: float = 2.0, px: int = 64, crf: int = 23) -> Path:
    """Write a video of drifting textures, with a new texture every `seconds`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = px, px, "yuv420p"
        for look in looks:
            coarse = np.random.default_rng(look).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            texture = np.asarray(Image.fromarray(coarse).resize((px * 3 // 2, px * 3 // 2), Image.Resampling.BICUBIC))
            for number in range(int(seconds * 10)):
                at = number * px // 640
                picture = np.ascontiguousarray(texture[at : at + px, at : at + px])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_scene_starts_are_found(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "v.mp4", [1, 2, 3])
    assert scene_starts(path, probe(path), threshold=10.0) == (2.0, 4.0)


def test_videos_are_cut_at_scenes_and_long_scenes_again(tmp_path: Path) -> None:
    write_scenes(tmp_path / "in" / "v.mp4", [1, 2, 3])
    build([tmp_path / "in"], tmp_path / "o", "cut.kind=scene", "cut.length_s=1.5")
    facts = sorted((f["start_s"], f["end_s"], f["stored"]["frames"]) for f in jsons(tmp_path / "o"))
    assert facts == [(0.0, 1.5, 15), (2.0, 3.5, 15), (4.0, 5.5, 15)]
    assert {row["group"] for row in rows_of(tmp_path / "o")} == {"in/v.mp4"}


def jsons(out: Path) -> list[dict]:
    found = []
    for entry in read_manifest(out).shards:
        data = (out / entry.file).read_bytes()
        for row in rows_of(out):
            if read_manifest(out).shards[row["shard"]] == entry:
                found.append(json.loads(data[row["json_offset"] :][: row["json_size"]]))
    return found


def test_re_encoded_copies_are_near_duplicates(tmp_path: Path) -> None:
    first = write_scenes(tmp_path / "in" / "a.mp4", [1, 2])
    write_scenes(tmp_path / "in" / "b.mp4", [1, 2], px=96, crf=35)
    write_scenes(tmp_path / "in" / "c.mp4", [3, 4])
    write_scenes(tmp_path / "in" / "longer.mp4", [1, 2], seconds=4)
    hashes = {path.stem: perceptual_hashes(path, probe(path)) for path in (tmp_path / "in").iterdir()}
    distance = {name: sum((x ^ y).bit_count() for x, y in zip(hashes["a"], hashes[name], strict=True)) for name in "bc"}
    assert distance["b"] <= 12 < 40 <= distance["c"]
    build([tmp_path / "in"], tmp_path / "o", "dedupe.perceptual_bits=4")
    assert [(row["source"], row["reason"], row["detail"]) for row in rows_of(tmp_path / "o", "rejects")] == [
        ("in/b.mp4", "near_duplicate", "looks like in/a.mp4")
    ]
    assert first.exists()


def test_black_bars_are_cropped(tmp_path: Path) -> None:
    """Bars of 14 pixels are cropped. A dark half, a full frame and a dark sky are kept."""

    def framed(path: Path, top: int, bottom: int, *, dark: bool = False) -> None:
        path.parent.mkdir(exist_ok=True)
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            noise = np.random.default_rng(len(path.name)).integers(60, 255, (64, 64, 3), dtype=np.uint8)
            for number in range(20):
                picture = np.roll(noise, number, axis=1)
                picture[:top] = picture[64 - bottom :] = 0
                if dark:
                    picture[:, 32:] = 0
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    framed(tmp_path / "in" / "bars.mp4", 14, 14)
    framed(tmp_path / "in" / "dark.mp4", 0, 0, dark=True)
    framed(tmp_path / "in" / "full.mp4", 0, 0)
    framed(tmp_path / "in" / "sky.mp4", 20, 0)
    build([tmp_path / "in"], tmp_path / "o", "encode.crop_bars=true", "mode=copy")
    assert {row["group"]: (row["width"], row["height"]) for row in rows_of(tmp_path / "o")} == {
        "in/bars.mp4": (56, 32),
        "in/dark.mp4": (32, 32),
        "in/full.mp4": (32, 32),
        "in/sky.mp4": (32, 32),
    }
    boxes = {facts["source"]: facts["original"].get("box") for facts in jsons(tmp_path / "o")}
    assert boxes.pop("in/bars.mp4") == {"left": 0, "top": 14, "width": 64, "height": 36}
    assert set(boxes.values()) == {None}
    row = next(row for row in rows_of(tmp_path / "o") if row["group"] == "in/bars.mp4")
    shard_ = (tmp_path / "o" / read_manifest(tmp_path / "o").shards[row["shard"]].file).read_bytes()
    frame = decode(
        shard_[row["video_offset"] :][: row["video_size"]],
        [10],
        backend="decord",
        expect=Expect(row["frames"], row["width"], row["height"]),
    )[0]
    assert frame.mean(axis=(1, 2)).min() > 100


def test_a_difference_hash_ignores_brightness_and_contrast() -> None:
    grey = np.random.default_rng(0).integers(40, 200, (72, 90)).astype(np.uint8)
    assert difference_hash(grey) == difference_hash((grey // 2 + 20).astype(np.uint8) * 2 // 2)
    assert difference_hash(grey) != difference_hash(grey[:, ::-1])


def test_tars_give_videos_and_labels_and_nothing_else(tmp_path: Path) -> None:
    video = write_scenes(tmp_path / "v.mp4", [1]).read_bytes()
    members = {
        "a.mp4": video,
        "a.json": b'{"speed": 3}',
        "a.txt": b"a ball\n",
        "a.pyd": b"cos\nsystem\n(S'touch pwned'\ntR.",
        "../b.mp4": write_scenes(tmp_path / "w.mp4", [2]).read_bytes(),
        "../b.txt": "café".encode("latin-1"),  # costs the caption alone
        "../b.json": b'{"speed": 4}',
        "c.json": b"{}",
        "d.mp4": video[:200],
    }
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        link = tarfile.TarInfo("e.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    build([tmp_path / "x.tar"], tmp_path / "o")
    assert {f["source"]: f["labels"] for f in jsons(tmp_path / "o")} == {
        "x.tar/a": {"speed": 3, "caption": "a ball"},
        "x.tar/../b": {"speed": 4},
    }
    rejects = {row["source"]: row["detail"] for row in rows_of(tmp_path / "o", "rejects")}
    assert rejects["x.tar/../b.txt"].endswith("not utf-8 at byte 3; set columns.encoding, such as cp1252")
    assert [(row["source"], row["reason"]) for row in rows_of(tmp_path / "o", "rejects")] == [
        ("x.tar/../b.txt", "bad_labels"),
        ("x.tar/d", "no_index"),
        ("x.tar/e.mp4", "skipped"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "v.mp4", "w.mp4", "x.tar"]


def test_a_corpus_can_be_sharded_again_without_loss(tmp_path: Path) -> None:
    for look in range(5):
        write_scenes(tmp_path / "in" / f"{look}.mp4", [look])
        (tmp_path / "in" / f"{look}.json").write_text(json.dumps({"look": look}))
    build([tmp_path / "in"], tmp_path / "one", "shard_samples=2", "split.val_share=0.4")
    build([tmp_path / "one" / "shards"], tmp_path / "two", "mode=copy")

    def known(out: Path) -> set:
        return {(row["xxh64"], row["group"], row["split"], row["labels"]) for row in rows_of(out)}

    assert known(tmp_path / "one") == known(tmp_path / "two")
    assert len(known(tmp_path / "one")) == 5


def test_names_with_dots_in_a_tar_are_separate_videos(tmp_path: Path) -> None:
    scenes = [write_scenes(tmp_path / f"{n}.mp4", [n]).read_bytes() for n in range(3)]
    tar = tmp_path / "x.tar"
    members = [("take 2.0 (clean).mp4", scenes[0]), ("take 2.1.mp4", scenes[1]), ("take 2.1.json", b'{"n": 1}')]
    with tarfile.open(tar, "w") as file:
        for name, data in [*members, ("v.jpg.mp4", scenes[2])]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    found = {source.name: source.labels for source in ingest([str(tar)], spec=Spec())}
    assert found == {"x.tar/take 2.0 (clean)": {}, "x.tar/take 2.1": {"n": 1}, "x.tar/v.jpg": {}}


@pytest.mark.parametrize("name", ["k400.csv", "k400.txt"])
def test_lists_of_paths_and_classes_are_read_as_by_v_jepa(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\ufeffa.mp4 3\r\nb c/d.webm,12\nno-class.mp4\n\n")
    found = ingest([str(tmp_path / name)], spec=Spec())
    assert [(source.name, source.labels) for source in found] == [
        ("a.mp4", {"label": 3}),
        ("b c/d.webm", {"label": 12}),
        ("no-class.mp4", {}),
    ]
    assert found[1].file.path == str(tmp_path / "b c" / "d.webm")
    (tmp_path / name).write_text("a.mp4 3\na.mp4 4\n")
    once, again = ingest([str(tmp_path / name)], spec=Spec())
    assert (once.labels, once.refused) == ({"label": 3}, None)
    assert again.refused == ("duplicate", "listed several times; the first entry is kept")


def test_a_truncated_tar_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\1" * 2000)
    with pytest.raises(BadInput, match=r"x\.tar: damaged, not a tar"):
        build([tmp_path / "x.tar"], tmp_path / "o")


def test_images_become_samples_of_one_frame(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    y, x = np.mgrid[:90, :120]
    picture = np.stack([x * 2, y * 2, x + y], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(picture[::-1]).save(folder / "b.jpg")
    Image.fromarray(picture[..., 0]).save(folder / "grey.png")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "a.json").write_text('{"kind": "ramp"}')
    build([folder], tmp_path / "o", "media=images")
    rows = {row["group"]: row for row in rows_of(tmp_path / "o")}
    assert {(row["suffix"], row["frames"], row["width"], row["height"]) for row in rows.values()} == {
        ("jpg", 1, 42, 32)
    }
    assert json.loads(rows["in/a.png"]["labels"]) == {"kind": "ramp"}
    assert [(row["source"], row["reason"]) for row in rows_of(tmp_path / "o", "rejects")] == [
        ("in/bad.jpg", "not_image")
    ]
    assert verify(tmp_path / "o", deep=True).problems == ()
    entry = read_manifest(tmp_path / "o").shards[0]
    with tarfile.open(tmp_path / "o" / entry.file) as tar:
        assert [member.name.split(".")[1] for member in tar] == ["json", "jpg"] * 3


def trouble_of(asked: Asked) -> Trouble | None:
    """Return the error that the server simulates for a file, by its name."""
    name = Path(asked.key).stem
    if name == "busy" and asked.time < 3:
        return Trouble(status=503)
    if name == "stall" and asked.time < 2:
        return Trouble(sent_bytes=100, stall_s=3.0)
    always = {
        "away": Trouble(status=302, location="file:///etc/passwd"),
        "huge": Trouble(declared_bytes=10 << 30),
        "short": Trouble(declared_bytes=1 << 20),
    }
    return always.get(name)


@pytest.fixture
def videos_at(store: ObjectStore, tmp_path: Path) -> str:
    """URL of a folder of files, most of which fail to download in some way."""
    video = write_scenes(tmp_path / "served" / "v.mp4", [1]).read_bytes()
    for name in ("away", "busy", "fine", "huge", "short", "stall"):
        store.objects[f"videos/{name}.mp4"] = video
    store.trouble = trouble_of
    return f"{store.url}/videos"


def reason_of(url: str) -> tuple[Reason, str]:
    with pytest.raises(Refused) as caught, open_local(FileRef(url)):
        pass
    return caught.value.reason, caught.value.detail


def test_busy_and_stalled_downloads_are_retried(
    store: ObjectStore, videos_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "STALL_S", 0.5)
    for name, times in (("busy", 3), ("stall", 2)):
        with open_local(FileRef(f"{videos_at}/{name}.mp4")) as path:
            assert path.read_bytes() == store.objects[f"videos/{name}.mp4"]
        assert store.count(key=f"videos/{name}.mp4") == times


def test_failed_downloads_are_rejected(store: ObjectStore, videos_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    assert reason_of(f"{videos_at}/gone.mp4") == (Reason.UNREACHABLE, "HTTP 404")
    assert reason_of(f"{videos_at}/huge.mp4")[0] is Reason.TOO_LARGE
    assert reason_of(f"{videos_at}/short.mp4")[0] is Reason.UNREACHABLE
    assert reason_of(f"{videos_at}/away.mp4") == (Reason.UNREACHABLE, "HTTP 302")
    assert reason_of("http://127.0.0.1:1/x.mp4")[0] is Reason.UNREACHABLE
    assert reason_of("file:///etc/passwd")[0] is Reason.UNREACHABLE
    assert reason_of("ftp://example.com/x.mp4")[0] is Reason.UNREACHABLE
    times = {name: store.count(key=f"videos/{name}.mp4") for name in ("gone", "huge", "short", "away")}
    assert times == {"gone": 1, "huge": 1, "short": 2, "away": 1}


def test_a_list_of_urls_is_built(videos_at: str, tmp_path: Path) -> None:
    names = ["busy.mp4", "fine.mp4", "gone.mp4"]
    (tmp_path / "list.txt").write_text("".join(f"{videos_at}/{name}\n" for name in names))
    build([tmp_path / "list.txt"], tmp_path / "o", "dedupe.exact=false")
    assert {row["group"] for row in rows_of(tmp_path / "o")} == {f"{videos_at}/{name}" for name in names[:2]}
    assert [row["reason"] for row in rows_of(tmp_path / "o", "rejects")] == ["unreachable"]


def test_unsupported_urls_are_errors(tmp_path: Path) -> None:
    for url, message in itertools.product(["ftp://a/b.mp4", "simplecache::s3://a/b.mp4"], ["unsupported scheme"]):
        with pytest.raises(BadInput, match=message):
            build([url], tmp_path / "o")
    with pytest.raises(BadInput, match="web servers cannot be listed"):
        build(["https://example.com/videos/"], tmp_path / "o")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning")
def test_a_bucket_is_read_despite_transient_errors(s3: ObjectStore, tmp_path: Path) -> None:
    video = write_scenes(tmp_path / "v.mp4", [1]).read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        header = tarfile.TarInfo("a.mp4")
        header.size = len(video)
        tar.addfile(header, io.BytesIO(video))
    s3.objects["bucket/raw/v.mp4"], s3.objects["bucket/raw/notes.txt"] = video, b"x"
    s3.objects["bucket/shards/x.tar"] = (tmp_path / "x.tar").read_bytes()
    s3.trouble = lambda asked: Trouble(status=503) if len(s3.requests) % 2 else None
    [source] = ingest(["s3://bucket/raw/"], spec=Spec())
    assert source.name == "s3://bucket/raw/v.mp4"
    with open_local(source.file) as path:
        assert path.read_bytes() == video
    s3.objects["bucket/raw/v.mp4?versionId=old"] = b"an older version"
    with open_local(FileRef("s3://bucket/raw/v.mp4?versionId=old")) as path:
        assert path.read_bytes() == b"an older version"
    del s3.objects["bucket/raw/v.mp4?versionId=old"]
    assert reason_of("s3://bucket/raw/absent.mp4")[0] is Reason.UNREACHABLE
    build(["s3://bucket/raw/"], tmp_path / "o")
    assert [row["group"] for row in rows_of(tmp_path / "o")] == ["s3://bucket/raw/v.mp4"]
    index_shards("s3://bucket/shards/", out=tmp_path / "index")
    assert Index(tmp_path / "index", "train", Cache(tmp_path / "cache", 1)).read(0).video == video
