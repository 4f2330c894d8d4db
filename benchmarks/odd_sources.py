"""Read odd tables, lists, folders and tars as sources of a build, and compare labels, times and bytes with the truth.

    python benchmarks/odd_sources.py            # every input, by group: right, refused as it should be, wrong
    python benchmarks/odd_sources.py --fuzz 6000 [--seed 0]

Nothing is encoded: a video is a few bytes that must come back. Wrong inputs are listed. With `--fuzz`, tables, lists
and tars are altered at random, and exceptions other than `BadInput` are listed.
"""

import argparse
import bz2
import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import lzma
import os
import random
import subprocess
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vjepa_data.builder.ingest import ingest
from vjepa_data.config_files import load_settings
from vjepa_data.errors import BadInput
from vjepa_data.media.fetch import open_local
from vjepa_data.spec import Spec

TEXTS = ["007", "1e5", "12345E67890", "-1234567890", "NA", "null", "None", "nan", "true", "2020-01-01", "1.10", "0x10"]
TEXTS += ["00:30", "1_000", "é", "日本", 'say "hi"', "a,b", " x ", "-0", "+5", "inf", "12345678901234567890123"]
TEXTS += ["a\tb", "a\nb"]
ROWS = [{"path": f"{number}.mp4", "v": text} for number, text in enumerate(TEXTS)]
TRUTH = {row["path"]: {"v": row["v"]} for row in ROWS}
TWO = {"1.mp4": {"v": "a"}, "2.mp4": {"v": "b"}}
OTHER = {
    "cp1252": "café",
    "latin-1": "café",
    "mac_roman": "café",
    "cp1251": "привет",
    "shift_jis": "日本",
    "gb18030": "中文",
}
VIDEO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
A, B = b"a" * 700, b"b" * 700


@dataclass(frozen=True)
class Odd:
    """An input and its expected sources."""

    name: str
    make: Callable[[Path], Path]
    labels: dict[str, Any] | None = None
    """Labels by name of the sources that are used. None: only the names in `contents` count."""
    refused: int = 0
    """Sources that are refused, or -1 for any number above 0."""
    error: str = ""
    """Part of the error, if the whole input must be refused."""
    contents: dict[str, bytes] | None = None
    settings: tuple[str, ...] = ()
    times: tuple[float | None, ...] | None = None


def table(kind: str, rows: list[dict[str, Any]], mark: str = ",") -> bytes:
    if kind in ("csv", "tsv"):
        file = io.StringIO()
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        csv.writer(file, delimiter="\t" if kind == "tsv" else mark).writerows(cells)
        return file.getvalue().encode()
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False).encode()
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def file(name: str, data: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return make


def used(*numbers: int) -> dict[str, Any]:
    return {f"{number}.mp4": ... for number in numbers}


def encodings() -> Iterator[Odd]:
    for kind in ("csv", "tsv", "jsonl", "json"):
        for code in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            yield Odd(f"{kind} in {code}", file(f"t.{kind}", table(kind, ROWS).decode().encode(code)), TRUTH)
        for code, text in OTHER.items():
            data = table(kind, [{"path": "1.mp4", "v": text}]).decode().encode(code)
            yield Odd(f"{kind} in {code}", file(f"t.{kind}", data), error="columns.encoding")
            declared = (f"columns.encoding={code}",)
            yield Odd(f"{kind} in {code}, declared", file(f"t.{kind}", data), {"1.mp4": {"v": text}}, settings=declared)
    yield Odd("parquet", file("t.parquet", table("parquet", ROWS)), TRUTH)
    for (suffix, pack), kind in itertools.product(
        (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)), ("csv", "tsv", "jsonl")
    ):
        packed = pack(table(kind, ROWS))
        yield Odd(f"{kind}.{suffix}", file(f"t.{kind}.{suffix}", packed), TRUTH)
        yield Odd(f"cut {kind}.{suffix}", file(f"t.{kind}.{suffix}", packed[:-12]), error="cannot be read")


def csv_forms() -> Iterator[Odd]:
    for mark in ";\t|":
        yield Odd(f"delimiter {mark!r}", file("t.csv", table("csv", ROWS, mark)), TRUTH)
    for name, text, labels, refused in [
        ("CRLF", "path,v\r\n1.mp4,a\r\n\r\n2.mp4,b\r\n", TWO, 0),
        ("CR", "path,v\r1.mp4,a\r2.mp4,b\r", TWO, 0),
        ("blanks after commas", "path, v\n1.mp4, a\n2.mp4, b\n", TWO, 0),
        ("quoted names", '"path","v"\n"1.mp4","a"\n2.mp4,b\n', TWO, 0),
        ("empty cells to the right", "path,v\n1.mp4,a,,\n2.mp4,b,,\n", TWO, 0),
        ("too many cells", "path,v\n1.mp4,a\n2.mp4,b,c\n3.mp4,d\n", used(1, 3), 1),
        ("too few cells", "path,v\n1.mp4,a\n2.mp4\n3.mp4,d\n", used(1, 3), 1),
        ("open quote", 'path,v\n1.mp4,a\n2.mp4,"b\n3.mp4,c\n4.mp4,d\n', used(1, 3, 4), 1),
        ("inches", 'path,v\n1.mp4,5" disk\n2.mp4,b\n', {"1.mp4": {"v": '5" disk'}, "2.mp4": {"v": "b"}}, 0),
        ("zero byte in a path", "path,v\n1.mp4,a\n\0002.mp4,b\n", used(1), 1),
        ("zero byte in a label", "path,v\n1.mp4,a\0b\n", {"1.mp4": {"v": "a\0b"}}, 0),
        ("no path", "path,v\n1.mp4,a\n,b\n", used(1), 1),
        ("blank path", "path,v\n1.mp4,a\n   ,b\n", used(1), 1),
        ("a row twice", "path,v\n1.mp4,a\n1.mp4,b\n", {"1.mp4": {"v": "a"}}, 1),
        ("invalid split", "path,split\n1.mp4,train\n2.mp4,No Split\n3.mp4,\n4.mp4,NA\n", used(1, 3, 4), 1),
        ("3 MB in a cell", f"path,v\n1.mp4,{'x' * 3_000_000}\n", used(1), 0),
        ("17 MB in a cell", f"path,v\n1.mp4,{'x' * 17_000_000}\n2.mp4,b\n", used(2), 1),
    ]:
        yield Odd(name, file("t.csv", text), labels, refused)
    yield Odd("one row in latin-1", file("t.csv", b"path,v\n1.mp4,\xc3\xa9\n2.mp4,\xe9\n"), used(1), 1)
    yield Odd("two equal names", file("t.csv", "path,v,v\n1.mp4,a,b\n"), error="two columns")
    yield Odd("no path column", file("t.csv", "file,v\n1.mp4,a\n"), error="columns.path=NAME")


def times() -> Iterator[Odd]:
    known = {"00:00:00.50": 0.5, "1:02:03": 3723, "02:03.5": 123.5, "12.5": 12.5, "1e1": 10, "00:00:01,500": 1.5}
    for text, seconds in {**known, "90:00": 5400, "": None, "NA": None, "nan": None}.items():
        yield Odd(f"time {text!r}", file("t.csv", f'path,start_s\n1.mp4,"{text}"\n'), used(1), times=(seconds,))
    for text in ("-1", "abc", "1:2:3:4", "inf", "12s"):
        yield Odd(f"time {text!r}", file("t.csv", f"path,start_s\n1.mp4,{text}\n2.mp4,1\n"), used(2), 1)


def json_forms() -> Iterator[Odd]:
    mixed = '{"path":"1.mp4","v":1}\n{"path":"2.mp4","v":"x"}\n{"path":"3.mp4","v":[1,{"a":null}]}\n'
    read = {"1.mp4": {"v": 1}, "2.mp4": {"v": "x"}, "3.mp4": {"v": [1, {"a": None}]}}
    yield Odd("types that change", file("t.jsonl", mixed), read)
    yield Odd("NaN", file("t.jsonl", '{"path":"1.mp4","v":NaN,"w":1e999}\n'), {"1.mp4": {"v": None, "w": None}})
    yield Odd("bad lines", file("t.jsonl", '{"path":"1.mp4"}\n{"pa\n[1]\n{"path":"3.mp4"}\n'), used(1, 3), 2)
    surrogates = '{"path":"1.mp4","v":"\\ud800"}\n{"path":"\\ud800.mp4"}\n{"path":"3.mp4"}\n'
    yield Odd("half surrogate pairs", file("t.jsonl", surrogates), used(3), 2)
    date = {"1.mp4": {"v": "2020-01-01 00:00:00"}}
    yield Odd("dates", file("t.jsonl", '{"path":"1.mp4","v":"2020-01-01 00:00:00"}\n'), date)
    yield Odd("object over lines", file("t.jsonl", '{\n "path":"1.mp4"\n}\n'), error="one object per line")
    yield Odd("one object", file("t.json", '{"a":1}'), error="list of JSON objects")
    ssv2 = '[{"id":"1","label":"x"},{"id":"2","label":"y"}]'
    names = {"1.webm": ..., "2.webm": ...}
    yield Odd("SSv2", file("t.json", ssv2), names, settings=("columns.path='{id}.webm'",))


def templates() -> Iterator[Odd]:
    kinetics = "label,youtube_id,time_start,time_end\nsing,abc,12,22\nsing,-xy,3,13\nsing,,3,13\n"
    template = "columns.path='{youtube_id}_{time_start:06d}_{time_end:06d}.mp4'"
    names = {"abc_000012_000022.mp4": ..., "-xy_000003_000013.mp4": ...}
    yield Odd("Kinetics", file("t.csv", kinetics), names, 1, settings=(template,))
    epic = "participant_id,video_id,start_timestamp\nP01,P01_01,00:00:00.14\n"
    settings = ("columns.path='{participant_id}/{video_id}.MP4'", "columns.start=start_timestamp")
    yield Odd("EPIC-KITCHENS", file("t.csv", epic), {"P01/P01_01.MP4": ...}, settings=settings, times=(0.14,))
    yield Odd("unknown column", file("t.csv", "a\n1\n"), error="no column 'c'", settings=("columns.path='{c}.mp4'",))
    typed = "path,n,f,b,j\n1.mp4,007,1.5,true,[1]\n2.mp4,x,1,no,2\n"
    types = ("columns.types={n: int, f: float, b: bool, j: json}",)
    yield Odd("types", file("t.csv", typed), {"1.mp4": {"n": 7, "f": 1.5, "b": True, "j": [1]}}, 1, settings=types)


def parquets() -> Iterator[Odd]:
    def stored(**columns: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=2)
            return folder / "t.parquet"

        return make

    cells = [{"bytes": b"v%d" % number, "path": f"{number}.mp4"} for number in range(5)]
    inside = {f"t.parquet/{number + 1}/{number}.mp4": b"v%d" % number for number in range(5)}
    video = ("columns.path=video",)
    yield Odd("videos inside", stored(video=pa.array(cells, VIDEO)), contents=inside, settings=video)
    binary = pa.array([b"a", b"b"], pa.large_binary())
    plain = {"t.parquet/1": b"a", "t.parquet/2": b"b"}
    yield Odd("binary videos", stored(video=binary), contents=plain, settings=video)
    paths = pa.array([{"bytes": None, "path": "1.mp4"}], VIDEO)
    yield Odd("paths inside", stored(video=paths), used(1), settings=video)
    lists = pa.array([[b"a"]], pa.list_(pa.binary()))
    yield Odd("lists of videos", stored(video=lists), error="give a column", settings=video)
    kept = {"1.mp4": {"v": "a"}}
    yield Odd("binary labels", stored(path=["1.mp4"], b=[b"x"], i=pa.array(cells[:1], VIDEO), v=["a"]), kept)
    columns = {
        "path": ["1.mp4"],
        "d": [datetime.date(2020, 1, 1)],
        "x": [decimal.Decimal("1.50")],
        "u": pa.array([2**63], pa.uint64()),
        "c": pa.array(["é"]).dictionary_encode(),
        "m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    }
    read = {"1.mp4": {"d": "2020-01-01", "x": "1.50", "u": 2**63, "c": "é", "m": {"k": 1}}}
    yield Odd("types of parquet", stored(**columns), read)
    clock = pa.array([500], pa.duration("ms"))
    yield Odd("durations", stored(path=["1.mp4"], start_s=clock), used(1), times=(0.5,))
    whole = table("parquet", ROWS)
    yield Odd("cut parquet", file("t.parquet", whole[: len(whole) // 2]), error="cannot be read as parquet")


def lists() -> Iterator[Odd]:
    def nested(folder: Path) -> Path:
        for number in range(3):
            (folder / f"{number}.parquet").write_bytes(table("parquet", [{"path": f"{number}.mp4"}]))
        (folder / "two.txt").write_text("0.parquet\n1.parquet\n")
        return file("all.txt", "# parts\ntwo.txt\n2.parquet\n")(folder)

    def looped(folder: Path) -> Path:
        os.symlink("loop.mp4", folder / "loop.mp4")
        return file("t.txt", "loop.mp4\n")(folder)

    yield Odd("list of lists of parts", nested, used(0, 1, 2))
    yield Odd("folder of parts", lambda folder: nested(folder).parent, None)
    yield Odd("list of itself", file("t.txt", "t.txt\n"), error="lists deep")
    yield Odd("ffmpeg's list", file("t.txt", "file '1.mp4'\nfile 2.mp4\n"), used(1, 2))
    yield Odd("words after paths", file("t.txt", "1.mp4 a cat\n2.mp4\n# no\n3.mp4 -1\n"), used(2, 3), 1)
    yield Odd("list in UTF-16", file("t.txt", "1.mp4\r\n2.mp4\r\n".encode("utf-16")), used(1, 2))
    yield Odd("packed list", file("t.txt.gz", gzip.compress(b"1.mp4\n2.mp4\n")), used(1, 2))
    yield Odd("zero byte in a line", file("t.txt", b"1.mp4\n\x00.mp4\n"), used(1), 1)
    yield Odd("link to itself", looped, {"loop.mp4": ...})


def folders() -> Iterator[Odd]:
    def holding(names: tuple[str, ...], **texts: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            for name in names:
                (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / "in" / name).write_bytes(b"x")
            for name, data in texts.items():
                (folder / "in" / name.replace("__", ".")).write_bytes(data)
            return folder / "in"

        return make

    def with_odd_entries(folder: Path) -> Path:
        path = holding(("a.mp4", "x.tar.gz", "z.zip"))(folder)
        os.symlink("/tmp", path / "link")
        os.mkfifo(path / "p.mp4")
        return path

    classes = {"in/cat/a.mp4": {"class": "cat"}, "in/b.mp4": {"class": "in"}}
    yield Odd("class folders", holding(("cat/a.mp4", "b.mp4")), classes, settings=("folder_label=class",))
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        data = table(kind, [{"file_name": "a.mp4", "caption": "A"}])
        make = holding(("a.mp4", "b.mp4"), **{f"metadata__{kind}": data, "a__json": b'{"x": 1}'})
        yield Odd(f"metadata.{kind}", make, {"in/a.mp4": {"x": 1, "caption": "A"}, "in/b.mp4": {}})
    info = {"id": "a", "cookies": "secret", "formats": [{"url": "https://x?sig=secret"}], "tags": ["x"]}
    make = holding(("a.mp4",), a__info__json=json.dumps(info).encode())
    yield Odd("yt-dlp", make, {"in/a.mp4": {"id": "a", "tags": ["x"]}})
    yield Odd("links, pipes and archives", with_odd_entries, {"in/a.mp4": {}}, 4)


def packed(command: str, **files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, data in {"a__mp4": A, "b__mp4": B, **files}.items():
            (folder / name.replace("__", ".")).write_bytes(data)
        subprocess.run(command, shell=True, cwd=folder, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        return folder / "x.tar"

    return make


def tars() -> Iterator[Odd]:
    both = {"x.tar/a": A, "x.tar/b": B}
    for form in ("v7", "oldgnu", "gnu", "ustar", "pax"):
        yield Odd(f"tar {form}", packed(f"tar --format={form} -cf x.tar a.mp4 b.mp4"), contents=both)
    two = "tar cf 1 a.mp4; tar cf 2 b.mp4; tar cf 3 -T /dev/null; "
    yield Odd("joined", packed(two + "cat 1 2 > x.tar"), contents=both)
    yield Odd("joined with empty ones", packed(two + "cat 3 1 3 2 3 > x.tar"), contents=both)
    misaligned = "cat 1 > x.tar; head -c 100 /dev/zero >> x.tar; cat 2 >> x.tar"
    yield Odd("joined out of step", packed(two + misaligned), contents=both)
    again = "tar cf 1 a.mp4; cp b.mp4 a.mp4; tar cf 2 a.mp4; cat 1 2 > x.tar"
    yield Odd("joined with equal keys", packed(again), contents={"x.tar/a": A, "x.tar/a~2": B})
    apart = packed("tar cf 1 a.mp4; tar cf 2 a.json; cat 1 2 > x.tar", a__json=b'{"n":1}')
    yield Odd("labels in the second tar", apart, {"x.tar/a": {"n": 1}})
    yield Odd("appended", packed("tar cf x.tar a.mp4; tar rf x.tar b.mp4"), contents=both)
    yield Odd("garbage after the end", packed("tar cf x.tar a.mp4 b.mp4; echo x >> x.tar"), contents=both, refused=1)
    hard = "rm b.mp4; ln a.mp4 b.mp4; tar cf x.tar a.mp4 b.mp4"
    yield Odd("hard link", packed(hard), contents={"x.tar/a": A, "x.tar/b": A})
    soft = "rm b.mp4; mkdir s; mv a.mp4 s; ln -s s/a.mp4 b.mp4; tar cf x.tar b.mp4 s"
    yield Odd("symbolic link", packed(soft), contents={"x.tar/s/a": A, "x.tar/b": A})
    for name, target in (("outwards", "/etc/passwd"), ("to itself", "b.mp4")):
        make = packed(f"rm b.mp4; ln -s {target} b.mp4; tar cf x.tar a.mp4 b.mp4")
        yield Odd(f"link {name}", make, contents={"x.tar/a": A}, refused=1)
    for form in ("gnu", "pax", "pax --sparse-version=0.0", "pax --sparse-version=0.1"):
        make = packed(f"truncate -s 1M b.mp4; tar --format={form} -S -cf x.tar a.mp4 b.mp4")
        yield Odd(f"holes, {form}", make, contents={"x.tar/a": A}, refused=1)
    mac = "cp a.mp4 ._a.mp4; mkdir __MACOSX; cp a.mp4 __MACOSX/._b.mp4; tar cf x.tar ._a.mp4 a.mp4 __MACOSX b.mp4"
    yield Odd("AppleDouble", packed(mac), contents=both)
    long = f"mkdir -p {'x' * 90}/{'y' * 90}; mv a.mp4 b.mp4 {'x' * 90}/{'y' * 90}; tar cf x.tar x*"
    prefix = f"x.tar/{'x' * 90}/{'y' * 90}"
    yield Odd("long names", packed(long), contents={f"{prefix}/a": A, f"{prefix}/b": B})
    kinds = "cp b.mp4 a.webm; cp b.mp4 a.0.mp4; tar cf x.tar a.mp4 a.webm a.0.mp4"
    yield Odd("videos of one key", packed(kinds), contents={"x.tar/a": A, "x.tar/a.webm": B, "x.tar/a.0": B})
    yield Odd("a member twice", packed("tar cf x.tar a.mp4; tar rf x.tar a.mp4"), contents={"x.tar/a": A}, refused=1)
    volumes = "printf 'n x2\\nn x3\\n' | tar -cM -L 10 -f x.tar a.mp4 b.mp4 || true"
    yield Odd("volumes", packed(volumes, b__mp4=os.urandom(20000)), contents={"x.tar/a": A}, refused=-1)
    for code, kept in ((100, 0), (600, 0), (1300, 1), (1536, 1), (2000, 1), (2560, 1), (3000, 2)):
        make = packed(f"tar cf y a.mp4 b.mp4; head -c {code} y > x.tar")
        names = dict(list(both.items())[:kept])
        yield Odd(f"cut at {code}", make, contents=names, refused=-1)
    yield Odd("0 bytes", packed(": > x.tar"), contents={}, refused=1)
    yield Odd("only zeros", packed("head -c 10240 /dev/zero > x.tar"), contents={}, refused=1)
    yield Odd("no videos", packed("tar cf x.tar c.md", c__md=b"x"), contents={}, refused=1)
    for program in ("gzip", "bzip2", "xz"):
        yield Odd(f"{program} called .tar", packed(f"tar cf - a.mp4 | {program} > x.tar"), error="compressed")
    yield Odd("web page", packed("yes '<html>' | head -c 1000 > x.tar"), contents={}, refused=1)
    damage = (
        "cp a.mp4 c.mp4; tar cf x.tar a.mp4 b.mp4 c.mp4; yes | head -c 100 | dd of=x.tar bs=1 seek=1536 conv=notrunc"
    )
    yield Odd("damaged header", packed(damage), contents={"x.tar/a": A}, refused=1)
    caption = packed("tar cf x.tar a.mp4 a.txt b.mp4", a__txt=b"caf\xe9")
    yield Odd("caption in latin-1", caption, contents={"x.tar/b": B}, refused=1)
    declared = ("columns.encoding=latin-1",)
    captions = {"x.tar/a": {"caption": "café"}, "x.tar/b": {}}
    yield Odd("caption in latin-1, declared", caption, captions, settings=declared)


GROUPS = (encodings, csv_forms, times, json_forms, templates, parquets, lists, folders, tars)


def fate(odd: Odd, folder: Path) -> str:
    """Read an input, and return `right`, `refused` or the fault."""
    try:
        found = ingest([str(odd.make(folder))], spec=load_settings(Spec, None, odd.settings).settings)
    except BadInput as error:
        return "refused" if odd.error and odd.error in str(error) else f"error: {error}"
    except Exception:  # noqa: BLE001  the point of this script
        return traceback.format_exc()[-300:]
    good = [source for source in found if source.refused is None]
    lost = len(found) - len(good)
    labels = {source.name: source.labels for source in good}
    if odd.error or not (lost == odd.refused or (odd.refused < 0 < lost)):
        return f"{lost} refused, read {labels}"
    if odd.labels is not None:
        if any(labels.get(name) != wanted for name, wanted in odd.labels.items() if wanted is not ...):
            return f"labels {labels}"
        if labels.keys() != odd.labels.keys():
            return f"names {list(labels)}"
    if odd.times is not None and tuple(source.start_s for source in good) != odd.times:
        return f"times {[source.start_s for source in good]}"
    if odd.contents is not None:
        contents = {}
        for source in good:
            with open_local(source.file) as path:
                contents[source.name] = path.read_bytes()
        if contents != odd.contents:
            return f"contents {list(contents)}"
    return "right"


def alter(data: bytes, draw: random.Random) -> bytes:
    """Overwrite, remove, insert, cut or repeat pieces of a file."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at, length = draw.randrange(max(1, len(out))), draw.choice([1, 10, 512, 1024])
        match draw.randrange(6):
            case 0 | 1 if out:
                out[at % len(out)] = draw.choice([0, 255, draw.randrange(256), *b'0123456789"\n,:{}[]\\'])
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = draw.randbytes(length)
            case 4:
                out[at:at] = out[:length]
            case _:
                del out[max(at, len(out) // 4) :]
    return bytes(out)


def fuzz(count: int, seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    seeds = [(f"t.{kind}", table(kind, ROWS)) for kind in ("csv", "tsv", "jsonl", "json", "parquet")]
    seeds.append(("t.txt", b"1.mp4\n2.mp4 3\nfile 'c.mp4'\n"))
    for number, form in enumerate(("gnu", "pax", "pax -S", "gnu -S")):
        place = folder / str(number)
        place.mkdir()
        command = f"ln a.mp4 l.mp4; truncate -s 100K h.mp4; tar --format={form} -cf x.tar *.mp4 a.json"
        path = packed(command, a__json=b'{"n":1}')(place)
        seeds += [("x.tar", path.read_bytes())] * 2
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        name, data = draw.choice(seeds)
        path = folder / name
        path.write_bytes(alter(data, draw))
        try:
            found = ingest([str(path)], spec=Spec())
            outcomes["refused in part" if any(source.refused for source in found) else "read"] += 1
        except BadInput:
            outcomes["refused"] += 1
        except Exception as error:  # noqa: BLE001  the point of this script
            outcomes[f"{name}: {type(error).__name__}: {str(error)[:80]}"] += 1
    print(f"{count} altered files: " + ", ".join(f"{times} {outcome}" for outcome, times in outcomes.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, default=0, help="number of altered files")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if given.fuzz:
            fuzz(given.fuzz, given.seed, Path(root))
            return
        for number, group in enumerate(GROUPS):
            fates: Counter[str] = Counter()
            for position, odd in enumerate(group()):
                folder = Path(root) / f"{number}-{position}"
                folder.mkdir()
                got = fate(odd, folder)
                fates[got if got in ("right", "refused") else "wrong"] += 1
                if got not in ("right", "refused"):
                    print(f"  {odd.name}: {got[:200]}")
            print(f"{group.__name__}: " + ", ".join(f"{times} {name}" for name, times in sorted(fates.items())))


if __name__ == "__main__":
    main()
