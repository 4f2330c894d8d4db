"""Tars of any program are read to their end, and omitted members are named."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from vjepa_data.builder.index_foreign import index_shards
from vjepa_data.builder.ingest import ingest
from vjepa_data.builder.tar_members import read_tar
from vjepa_data.builder.verify import verify
from vjepa_data.config_files import load_settings
from vjepa_data.corpus.index import Index
from vjepa_data.media.fetch import open_local
from vjepa_data.spec import Spec

A, B = b"a" * 700, b"b" * 700


def pack(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            tar.addfile(header, io.BytesIO(member[1]))
    return file.getvalue()


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def read(path: Path, data: bytes | None = None, *settings: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the contents of the sources of a tar, and the reasons of refused sources."""
    if data is not None:
        path.write_bytes(data)
    found, refused = {}, {}
    for source in ingest([str(path)], spec=load_settings(Spec, None, settings).settings):
        if source.refused:
            refused[source.name.removeprefix("x.tar/")] = source.refused[0]
            continue
        with open_local(source.file) as file:
            found[source.name.removeprefix("x.tar/")] = file.read_bytes()
    return found, refused


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return tmp_path / "x.tar"


def test_joined_tars_are_read_to_the_end(tar: Path) -> None:
    empty, first, second = pack(), pack(("a.mp4", A)), pack(("b.mp4", B))
    assert read(tar, first + second) == ({"a": A, "b": B}, {})
    assert read(tar, first + empty + second + bytes(5000)) == ({"a": A, "b": B}, {})
    assert read(tar, first + bytes(100) + second) == ({"a": A, "b": B}, {})


def test_joined_tars_may_repeat_keys(tar: Path) -> None:
    assert read(tar, pack(("0.mp4", A)) + pack(("0.mp4", B))) == ({"0": A, "0~2": B}, {})


def test_labels_may_come_from_another_joined_tar(tar: Path) -> None:
    tar.write_bytes(pack(("a.mp4", A)) + pack(("a.json", b'{"n": 1}')))
    assert [source.labels for source in ingest([str(tar)], spec=Spec())] == [{"n": 1}]


def test_links_count_as_the_member_they_point_to(tar: Path) -> None:
    links = [link("h.mp4", "s/a.mp4", tarfile.LNKTYPE), link("s/y.mp4", "a.mp4", tarfile.SYMTYPE)]
    links += [link("yy.mp4", "s/y.mp4", tarfile.SYMTYPE), link("out.mp4", "/etc/passwd", tarfile.SYMTYPE)]
    links += [link("loop.mp4", "loop.mp4", tarfile.SYMTYPE)]
    found, refused = read(tar, pack(("s/a.mp4", A), *links))
    assert found == {"s/a": A, "h": A, "s/y": A, "yy": A}
    assert refused == {"out.mp4": "skipped", "loop.mp4": "skipped"}


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7", "oldgnu"])
def test_every_format_of_gnu_tar_is_read(form: str, tar: Path) -> None:
    (tar.parent / "a.mp4").write_bytes(A)
    (tar.parent / "._a.mp4").write_bytes(b"AppleDouble")
    subprocess.run(["tar", f"--format={form}", "-cf", "x.tar", "._a.mp4", "a.mp4"], cwd=tar.parent, check=True)
    assert read(tar) == ({"a": A}, {})


@pytest.mark.parametrize("form", [["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]])
def test_members_with_holes_are_refused(form: list[str], tar: Path) -> None:
    (tar.parent / "a.mp4").write_bytes(A)
    (tar.parent / "b.mp4").touch()
    os.truncate(tar.parent / "b.mp4", 1 << 20)
    subprocess.run(["tar", *form, "--sparse", "-cf", "x.tar", "a.mp4", "b.mp4"], cwd=tar.parent, check=True)
    assert read(tar) == ({"a": A}, {"b.mp4": "skipped"})


@pytest.mark.parametrize(
    ("size", "kept", "refused"),
    [
        (1000, "", {"a.mp4": "truncated"}),
        (1536, "a", {"x.tar": "truncated"}),
        (1900, "a", {"x.tar": "truncated"}),
        (2100, "a", {"b.mp4": "truncated"}),
        (3072, "ab", {"x.tar": "truncated"}),
        (3073, "ab", {}),
    ],
)
def test_a_cut_tar_keeps_its_complete_members(size: int, kept: str, refused: dict[str, str], tar: Path) -> None:
    found, lost = read(tar, pack(("a.mp4", A), ("b.mp4", B))[:size])
    assert ("".join(found), lost) == (kept, refused)


def test_a_damaged_header_is_named(tar: Path) -> None:
    data = bytearray(pack(("a.mp4", A), ("b.mp4", B), ("c.mp4", A)))
    data[1536:1600] = b"!" * 64
    assert read(tar, bytes(data)) == ({"a": A}, {"x.tar": "damaged"})
    assert "invalid header near byte 1536" in read_tar(tar).skipped[0].detail
    assert read(tar, pack(("a.mp4", A)) + b"garbage") == ({"a": A}, {"x.tar": "damaged"})


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (b"", "0 bytes"),
        (b"\x1f\x8b" + bytes(600), "not a tar but compressed; unpack it with gunzip"),
        (b"<html>" + b"x" * 600, "not a tar (a web page); copy it again"),
        (b"x" * 600, "not a tar (it has no valid header); copy it again"),
    ],
)
def test_a_file_that_is_not_a_tar_is_described(data: bytes, detail: str, tar: Path) -> None:
    tar.write_bytes(data)
    assert [skipped.detail for skipped in read_tar(tar).skipped] == [detail]


def test_every_video_of_a_sample_is_a_source(tar: Path) -> None:
    members = [("a.mp4", A), ("a.webm", B), ("a.left.mp4", b"left"), ("a.mp4", B)]
    assert read(tar, pack(*members)) == ({"a": A, "a.webm": B, "a.left": b"left"}, {"a.mp4": "duplicate"})


def test_a_caption_in_another_encoding_is_named_unless_declared(tar: Path) -> None:
    tar.write_bytes(pack(("a.mp4", A), ("a.txt", b"caf\xe9"), ("b.mp4", B)))
    [kept, refused, _] = ingest([str(tar)], spec=Spec())
    assert (kept.refused, kept.labels) == (None, {})
    reason = "the caption is left out: not utf-8 at byte 3; set columns.encoding, such as cp1252"
    assert refused.refused == ("bad_labels", reason)
    spec = load_settings(Spec, None, ["columns.encoding=cp1252"]).settings
    assert ingest([str(tar)], spec=spec)[0].labels == {"caption": "café"}


def test_tars_without_videos_are_named(tar: Path) -> None:
    data = pack(("a.md", b"x"))
    [source] = ingest([str(tar)], spec=Spec()) if tar.write_bytes(data) else []
    assert source.refused == ("empty", "a tar without videos (1 x .md)")


def test_one_bad_tar_does_not_stop_an_index(videos: list[bytes], tmp_path: Path) -> None:
    """Joined, cut and oddly named tars are indexed as far as they can be trained on."""
    folder, out = tmp_path / "in", tmp_path / "o"
    folder.mkdir()
    (folder / "empty.tar").write_bytes(b"")
    (folder / "packed.tar.gz").write_bytes(b"\x1f\x8b")
    (folder / "pipe:x.tar").write_bytes(pack(("5.mp4", videos[5])))
    (folder / "part (1), [a] #2 é.tar").write_bytes(pack(("0.mp4", videos[0])) + pack(("1.mp4", videos[1])))
    (folder / "cut.tar").write_bytes(pack(("2.mp4", videos[2]), ("3.mp4", videos[3]))[: len(videos[2]) + 3000])
    (folder / os.fsdecode(b"caf\xe9.tar")).write_bytes(pack(("4.mp4", videos[4])))
    os.symlink("/tmp", folder / "linked")
    found = index_shards(folder, out=out)
    assert found.rejects == {"truncated": 1, "empty": 1, "skipped": 3}
    assert index_shards(folder).rejects == {"truncated": 1, "empty": 1, "skipped": 4}
    for place, kept in ((out, [*videos[:3], videos[5]]), (folder, videos[:3])):
        assert verify(place, deep=True).problems == ()
        index = Index(place)
        assert sorted(index.read(n).video for n in range(len(index))) == sorted(kept)
