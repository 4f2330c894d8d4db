"""Rows of tables, lines of lists and files of folders become sources, and invalid entries affect no other."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vjepa_data.builder.ingest import ingest
from vjepa_data.builder.source import InputFile
from vjepa_data.config_files import load_settings
from vjepa_data.media.fetch import open_local
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

TEXTS = ["007", "12345E67890", "-1234567890", "NA", "null", "nan", "true", "2020-01-01", "1.10", "0x10", "é日本"]
TEXTS += ["a\nb", 'say "hi"', "a,b", "a\tb", " x ", "12345678901234567890123"]
ROWS = [{"path": f"{number}.mp4", "v": text} for number, text in enumerate(TEXTS)]
VIDEO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(source: Path, *settings: str) -> list[InputFile]:
    return ingest([str(source)], spec=load_settings(Spec, None, settings).settings)


def labels(source: Path, *settings: str) -> dict[str, dict[str, Any]]:
    return {row.name: row.labels for row in read(source, *settings) if row.refused is None}


def reasons(source: Path, *settings: str) -> dict[str, str]:
    return {row.name: row.refused[0] for row in read(source, *settings) if row.refused}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind in ("csv", "tsv"):
        file = io.StringIO()
        csv.writer(file, delimiter="," if kind == "csv" else "\t").writerows([rows[0], *(row.values() for row in rows)])
        return file.getvalue().encode()
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if kind == "json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_text_stays_text(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"t.{kind}", table(kind, ROWS))
    assert labels(path) == {row["path"]: {"v": row["v"]} for row in ROWS}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_encodings_of_unicode_are_recognized(kind: str, encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"t.{kind}", table(kind, ROWS).decode().encode(encoding))
    assert labels(path) == {row["path"]: {"v": row["v"]} for row in ROWS}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_other_encodings_are_named_unless_declared(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"t.{kind}", table(kind, [{"path": "1.mp4", "v": "café"}]).decode().encode("cp1252"))
    with pytest.raises(BadInput, match=r"row 1: .* is not text in UTF-8; set columns.encoding, for example"):
        read(path)
    assert labels(path, "columns.encoding=cp1252") == {"1.mp4": {"v": "café"}}
    with pytest.raises(BadInput, match="unknown encoding; use for example"):
        read(path, "columns.encoding=klingon")


@pytest.mark.parametrize(
    ("content", "kept", "reason"),
    [
        (b"path,v\n1.mp4,a\n,b\n3.mp4,c\n", "13", "missing"),
        (b"path,v\n1.mp4,a\n2.mp4,b,c\n3.mp4,c\n", "13", "bad_labels"),
        (b"path,v\n1.mp4,a\n2.mp4\n3.mp4,c\n", "13", "bad_labels"),
        (b'path,v\n1.mp4,a\n2.mp4,"b\n3.mp4,c\n4.mp4,d\n', "134", "bad_labels"),
        (b"path,v\n1.mp4,a\n\x002.mp4,b\n3.mp4,c\n", "13", "missing"),
        (b"path,v\n1.mp4,\xc3\xa9\n2.mp4,\xe9\n3.mp4,c\n", "13", "bad_labels"),
        (b"path,split\n1.mp4,train\n2.mp4,No Split\n3.mp4,NA\n", "13", "bad_labels"),
        (b"path,start_s\n1.mp4,1\n2.mp4,soon\n3.mp4,NA\n", "13", "bad_range"),
        (b"path,start_s\n1.mp4,1\n2.mp4,-1\n", "1", "bad_range"),
        (b"path,v\n1.mp4,a\n1.mp4,b\n3.mp4,c\n", "13", "duplicate"),
        (b"path,v\n1.mp4,a\n2.mp4," + b"x" * (17 << 20) + b"\n", "1", "bad_labels"),
    ],
)
def test_an_odd_row_costs_itself(content: bytes, kept: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", content)
    assert sorted(labels(path)) == [f"{number}.mp4" for number in kept]
    assert list(reasons(path).values()) == [reason]


@pytest.mark.parametrize("line", ["{", "[1]", '{"path": null}', r'{"path": "2.mp4", "v": "\ud800"}', "[" * 100_000])
def test_an_odd_json_line_costs_itself(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", f'{{"path": "1.mp4", "v": 1}}\n{line}\n{{"path": "3.mp4", "v": ["é", NaN]}}\n')
    assert labels(path) == {"1.mp4": {"v": 1}, "3.mp4": {"v": ["é", None]}}
    assert len(reasons(path)) == 1


@pytest.mark.parametrize(
    ("header", "end"),
    [
        ("path, v", "\n"),
        ("path,v,,", "\n"),
        ("path;v", "\n"),
        ("path\tv", "\n"),
        ("path|v", "\n"),
        ("path,v", "\r\n"),
        ("path,v", "\r"),
    ],
)
def test_delimiters_and_line_ends_are_recognized(header: str, end: str, tmp_path: Path) -> None:
    mark = header.removeprefix("path").partition("v")[0]
    path = write(tmp_path / "t.csv", f"{header}{end}1.mp4{mark}a{end}{end}2.mp4{mark}b{end}")
    assert labels(path) == {"1.mp4": {"v": "a"}, "2.mp4": {"v": "b"}}


def test_declared_types_are_converted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "path,n,x,is,j\n1.mp4,007,1.5,true,[1]\n2.mp4,seven,1,no,2\n")
    types = "columns.types={n: int, x: float, is: bool, j: json}"
    assert labels(path, types) == {"1.mp4": {"n": 7, "x": 1.5, "is": True, "j": [1]}}
    [refused] = [row.refused for row in read(path, types) if row.refused]
    assert refused == ("bad_labels", "row 2: n: 'seven' is not of type int")
    with pytest.raises(BadInput, match=r"no column 'm' among path, n, x, is, j; set columns.types"):
        read(path, "columns.types={m: int}")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:00.50", 0.5), ("1:02:03", 3723), ("02:03.5", 123.5), ("00:00:01,5", 1.5), ("12.5", 12.5), ("nan", None)],
)
def test_times_may_be_clock_times(text: str, seconds: float | None, tmp_path: Path) -> None:
    [source] = read(write(tmp_path / "t.csv", f'path,start_s\n1.mp4,"{text}"\n'))
    assert (source.start_s, source.refused) == (seconds, None)


def test_paths_may_be_made_from_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "k.csv", "label,youtube_id,time_start,time_end\nsing,-ab,12,22\nsing,,1,2\nsing,c,x,2\n")
    template = "columns.path='{label}/{youtube_id}_{time_start:06d}_{time_end:06d}.mp4'"
    assert list(labels(path, template)) == ["sing/-ab_000012_000022.mp4"]
    assert list(reasons(path, template).values()) == ["missing", "missing"]
    with pytest.raises(BadInput, match=r"no column 'id' among label, .*; set columns.path=NAME"):
        read(path, "columns.path='{id}.mp4'")
    with pytest.raises(BadInput, match=r"columns.path='{id': .*; write for example"):
        read(path, "columns.path='{id'")


def test_a_parquet_may_hold_the_videos(tmp_path: Path) -> None:
    cells = [{"bytes": b"video %d" % number, "path": f"{number}.mp4"} for number in range(5)]
    pq.write_table(pa.table({"video": pa.array(cells, VIDEO), "label": range(5)}), tmp_path / "t.parquet", 2)
    found = read(tmp_path / "t.parquet", "columns.path=video")
    assert {source.name: source.labels for source in found} == {
        f"t.parquet/{number + 1}/{number}.mp4": {"label": number} for number in range(5)
    }
    for source in found:
        with open_local(source.file) as path:
            assert path.read_bytes() == b"video %d" % source.labels["label"]


def test_a_parquet_may_hold_only_paths_in_its_video_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"video": pa.array([{"bytes": None, "path": "a.mp4"}], VIDEO)}), tmp_path / "t.parquet")
    [source] = read(tmp_path / "t.parquet", "columns.path=video")
    assert (source.name, source.file.path) == ("a.mp4", str(tmp_path / "a.mp4"))


def test_types_of_a_parquet_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {
        "path": ["1.mp4"],
        "start_s": pa.array([500], pa.duration("ms")),
        "end_s": pa.array([1500], pa.time32("ms")),
        "day": [datetime.date(2020, 1, 1)],
        "large": pa.array([2**63], pa.uint64()),
        "word": pa.array(["é"]).dictionary_encode(),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "none": [float("nan")],
        "thumbnail": [b"\x00"],
    }
    pq.write_table(pa.table(values), tmp_path / "t.parquet")
    [source] = read(tmp_path / "t.parquet")
    assert source.labels == {"day": "2020-01-01", "large": 2**63, "word": "é", "map": {"k": 1}, "none": None}
    assert (source.start_s, source.end_s) == (0.5, 1.5)
    assert "binary columns are not labels and not read: thumbnail" in caplog.text


def test_a_row_of_a_parquet_that_is_not_utf8_costs_itself(tmp_path: Path) -> None:
    texts = pa.array([b"1.mp4", b"caf\xe9", b"3.mp4"]).view(pa.string())
    pq.write_table(pa.table({"path": texts}), tmp_path / "t.parquet")
    assert labels(tmp_path / "t.parquet") == {"1.mp4": {}, "3.mp4": {}}
    assert reasons(tmp_path / "t.parquet") == {"t.parquet row 2": "bad_labels"}


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_packed_tables_are_read(suffix: str, pack, tmp_path: Path) -> None:
    packed = pack(table("csv", ROWS))
    assert len(labels(write(tmp_path / f"t.csv.{suffix}", packed))) == len(ROWS)
    with pytest.raises(BadInput, match=r"cannot be read .*; copy it again"):
        read(write(tmp_path / f"t.csv.{suffix}", packed[:-12]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b'{"a": 1}', "expected a list of JSON objects, got dict"),
        ("t.jsonl", b"{\n}\n", "no row is a JSON object; write an object per line"),
        ("t.csv", b"path,v,v\n1.mp4,a,b\n", "two columns are called 'v'; rename either"),
        ("t.csv", b"\xff\xfep\x00a\x00", "no column 'path'"),
        ("t.parquet", b"PAR1", "cannot be read as parquet"),
        ("t.txt", b"t.txt\n", "lists deep; give that list itself"),
    ],
)
def test_tables_that_cannot_be_read_are_errors(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        read(write(tmp_path / name, content))


def test_lists_may_name_tables_and_lists(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "parts" / f"{number}.parquet", table("parquet", [{"path": f"{number}.mp4", "n": number}]))
    write(tmp_path / "parts" / "some.txt", "0.parquet\n1.parquet\n")
    path = write(tmp_path / "all.txt", "# parts of a set\nparts/some.txt\nparts/2.parquet\n")
    assert labels(path) == {f"parts/{number}.mp4": {"n": number} for number in range(3)}
    assert labels(tmp_path / "parts") == {f"parts/{number}.mp4": {"n": number} for number in range(3)}


def test_lines_of_lists_in_other_forms_are_read_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", b"file 'a b.mp4'\nc.mp4 -1\nd.mp4 a cat plays\n\x00.mp4\n~/e.mp4\nw\\f.mp4\n")
    write(tmp_path / "w" / "f.mp4", b"")
    assert labels(path) == {"a b.mp4": {}, "c.mp4": {"label": -1}, "~/e.mp4": {}, "w\\f.mp4": {}}
    assert reasons(path) == {"t.txt line 3": "bad_labels", "t.txt line 4": "missing"}
    places = {source.name: source.file.path for source in read(path)}
    assert places["~/e.mp4"] == os.path.expanduser("~/e.mp4")
    assert places["w\\f.mp4"] == str(tmp_path / "w" / "f.mp4")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_metadata_of_a_video_folder_gives_labels(kind: str, tmp_path: Path) -> None:
    for name in ("a", "sub/b", "c"):
        write(tmp_path / "in" / f"{name}.mp4", b"x")
    rows = [{"file_name": "a.mp4", "caption": "A"}, {"file_name": "sub/b.mp4", "caption": "B"}]
    write(tmp_path / "in" / f"metadata.{kind}", table(kind, rows))
    write(tmp_path / "in" / "a.json", '{"x": 1}')
    assert labels(tmp_path / "in") == {
        "in/a.mp4": {"x": 1, "caption": "A"},
        "in/sub/b.mp4": {"caption": "B"},
        "in/c.mp4": {},
    }


def test_other_metadata_does_not_stop_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.mp4", b"x")
    write(tmp_path / "in" / "metadata.csv", "x,x\n1,2\n")
    write(tmp_path / "in" / "sub" / "metadata.jsonl", "no json")
    assert labels(tmp_path / "in") == {"in/a.mp4": {}}


def test_folders_may_give_the_class(tmp_path: Path) -> None:
    write(tmp_path / "in" / "cat" / "a.mp4", b"x")
    assert labels(tmp_path / "in", "folder_label=class") == {"in/cat/a.mp4": {"class": "cat"}}


def test_fields_of_yt_dlp_are_labels_without_addresses(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.mp4", b"x")
    info = {"id": "a", "tags": ["x"], "cookies": "secret", "formats": [{"url": "https://x?sig=secret"}]}
    write(tmp_path / "in" / "a.info.json", json.dumps(info))
    assert labels(tmp_path / "in") == {"in/a.mp4": {"id": "a", "tags": ["x"]}}


def test_what_a_folder_search_skips_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.mp4", "a.txt", "x.tar.gz", "b.zip", "notes.md", "t.csv", ".hidden.mp4"):
        write(tmp_path / "in" / name, b"x")
    os.symlink("/tmp", tmp_path / "in" / "linked")
    os.mkfifo(tmp_path / "in" / "pipe.mp4")
    with caplog.at_level("INFO"):
        assert reasons(tmp_path / "in") == dict.fromkeys(
            ("in/b.zip", "in/linked", "in/pipe.mp4", "in/x.tar.gz"), "skipped"
        )
    assert "in: not read: 1 x .md, 1 x .csv (to use a table such as t.csv, give it as the source)" in caplog.text


def test_a_folder_of_links_says_so(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.symlink("/tmp", tmp_path / "in" / "k400")
    with pytest.raises(BadInput, match=r"no videos in .*in/k400 is a link to a folder; give the folder itself"):
        read(tmp_path / "in")


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "a.mp4", b"x")
    write(tmp_path / "in" / "locked" / "b.mp4", b"x")
    scan = os.scandir

    def scandir(path: str):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    assert reasons(tmp_path / "in") == {"in/locked": "missing"}


def test_equal_names_of_different_files_are_all_named(tmp_path: Path) -> None:
    for folder in "xy":
        for name in "abcde":
            write(tmp_path / folder / "v" / f"{name}.mp4", b"x")
    with pytest.raises(BadInput, match=r"'v/a.mp4' is .* and 2 more\. Give the folder above both"):
        ingest([str(tmp_path / "x" / "v"), str(tmp_path / "y" / "v")], spec=Spec())
    assert len(labels(tmp_path)) == 10
