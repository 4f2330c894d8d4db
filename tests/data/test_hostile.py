"""Hostile files and killed processes: no file is executed, no clip is lost, and no temporary file remains."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from vjepa_data.builder import shard
from vjepa_data.builder.labels import read_labels
from vjepa_data.builder.verify import verify
from vjepa_data.config_files import load_settings
from vjepa_data.corpus.format import Manifest
from vjepa_data.reader.bench import descendants
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

SMALL = ["encode.short_side_px=32", "encode.preset=ultrafast", "shard_samples=4", "name=toy"]


def build(source: Path, out: Path, *overrides: str) -> Manifest:
    spec = load_settings(Spec, None, [*SMALL, *overrides]).settings
    return shard([str(source)], out, spec=spec, workers=1, console=Console(file=io.StringIO()))


def rows_of(out: Path, table: str = "samples") -> list[dict]:
    return pq.read_table(out / f"{table}.parquet").to_pylist()


def reasons(out: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in rows_of(out, "rejects")}


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a corpus, except the report and the status."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    files = (path for path in files if path.parent.name != "status")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_video(path: Path, *, look: int = 0, times: list[int] | None = None, px: int = 48) -> Path:
    """Write a short video of 10 frames per second, or with frames at given times in tenths of a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = list(range(12)) if times is None else times
    with av.open(str(path), "w", format="matroska" if path.suffix == ".mkv" else "mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = px, px, "yuv420p", Fraction(1, 10)
        y, x = np.mgrid[:px, :px]
        for number, at in enumerate(times):
            picture = np.stack([x * 4 + number * 5, y * 5 + look * 31, x + y + number * 3 + look], axis=-1) % 256
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "videos"
    for number in range(9):
        write_video(folder / f"{number}.mp4", look=number)
    return folder


@pytest.fixture(scope="module")
def corpus(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build(videos, out)
    return out


def test_hostile_file_names_are_harmless(tmp_path: Path) -> None:
    names = ["-i.mp4", "a b'\"\n.mp4", "http:x.mp4", "<script>.mp4", "$(touch x).mp4", "ü#?%.mp4", "x...mp4"]
    for number, name in enumerate([*map(os.fsencode, names), b"\xff\xfe.mp4"]):
        video = write_video(tmp_path / "v.mp4", look=number)
        (tmp_path / "in").mkdir(exist_ok=True)
        os.rename(video, os.path.join(os.fsencode(tmp_path / "in"), name))
    build(tmp_path / "in", tmp_path / "o")
    assert {row["group"] for row in rows_of(tmp_path / "o")} == {f"in/{name}" for name in [*names, r"\xff\xfe.mp4"]}
    assert verify(tmp_path / "o").problems == ()
    assert "<script>.mp4" not in (tmp_path / "o" / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "o"]


def test_links_in_a_circle_and_long_names_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("b.mp4")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    long = tmp_path / ("n" * 300)
    for source in (tmp_path / "a.mp4", long):
        with pytest.raises(BadInput, match="no such file or folder; give folders"):
            build(source, tmp_path / "o")
    write_video(tmp_path / "in" / "fine.mp4")
    for out in (tmp_path / "a.mp4", long):
        with pytest.raises(BadInput, match=r"cannot be written \(File (exists|name too long)\); give another folder"):
            build(tmp_path / "in", out)


def test_invalid_labels_reject_only_their_video(tmp_path: Path) -> None:
    labels = {
        "deep": "[" * 100_000,
        "half": r'{"caption": "\ud800"}',
        "list": "[1]",
        "huge": json.dumps({"caption": "x" * (16 << 20)}),
        "torn": '{"a": ',
    }
    for number, (name, text) in enumerate(labels.items()):
        write_video(tmp_path / "in" / f"{name}.mp4", look=number)
        (tmp_path / "in" / f"{name}.json").write_text(text)
        with pytest.raises(ValueError, match=r"deep|surrogate|object|bytes|Expecting"):
            read_labels(text.encode())
    write_video(tmp_path / "in" / "fine.mp4", look=9)
    build(tmp_path / "in", tmp_path / "o")
    assert reasons(tmp_path / "o") == {f"in/{name}.mp4": "bad_labels" for name in labels}
    assert [row["group"] for row in rows_of(tmp_path / "o")] == ["in/fine.mp4"]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    write_video(tmp_path / "secret" / "v.mp4")
    write_video(tmp_path / "fine.mp4", look=1)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret/v.mp4\n")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/secret/v.mp4'\n")
    names = ["fine.mp4", "pipe.mp4", "/dev/zero", "secret", "list.mp4", "concat.mp4"]
    (tmp_path / "t.csv").write_text("path\n" + "".join(f"{name}\n" for name in names))
    build(tmp_path / "t.csv", tmp_path / "o", "timeout_s=20")
    assert reasons(tmp_path / "o") == {
        "pipe.mp4": "missing",
        "/dev/zero": "missing",
        "secret": "missing",
        "list.mp4": "not_video",
        "concat.mp4": "not_video",
    }


def test_declared_sizes_are_not_allocated(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    data = write_video(folder / "fine.mp4").read_bytes()
    (folder / "picture.y4m").write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1 C420\nFRAME\n" + bytes(1000))
    at = data.index(b"moov") - 4
    (folder / "box.mp4").write_bytes(data[:at] + (0xFFFFFFFF).to_bytes(4) + data[at + 4 :])
    at = data.index(b"stsz") + 8  # one size for all samples: 4 GB
    (folder / "sample.mp4").write_bytes(data[:at] + (0xFFFFFFF0).to_bytes(4) + data[at + 4 :])
    header = tarfile.TarInfo("a.mp4")
    header.size = 4 << 30
    (tmp_path / "x.tar").write_bytes(header.tobuf() + bytes(1024))
    build(folder, tmp_path / "o")
    assert reasons(tmp_path / "o") == {
        "in/picture.y4m": "too_large",
        "in/box.mp4": "no_index",
        "in/sample.mp4": "damaged",
    }
    with pytest.raises(BadInput, match=r"none of the 1 sources can be used"):
        build(tmp_path / "x.tar", tmp_path / "p")


def test_an_endless_video_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "endless.mkv", times=[590 * n for n in range(3000)])
    write_video(tmp_path / "in" / "fine.mp4")
    begin = time.monotonic()
    build(tmp_path / "in", tmp_path / "o", "encode.fps=240", "timeout_s=2")
    assert reasons(tmp_path / "o") == {"in/endless.mkv": "too_long"}
    assert [row["group"] for row in rows_of(tmp_path / "o")] == ["in/fine.mp4"]
    assert time.monotonic() - begin < 60


def start(videos: Path, out: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "vjepa", "shard", str(videos), "--out", str(out), "--workers", "1", *SMALL]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def complaints(stderr: bytes) -> list[str]:
    """Return the lines that are not progress."""
    lines = (line.strip() for line in stderr.decode().splitlines())
    return [line for line in lines if line and not line.startswith(("analyzing sources", "writing clips"))]


def test_killed_encoders_do_not_change_the_bytes(videos: Path, corpus: Path, tmp_path: Path) -> None:
    builder = start(videos, tmp_path / "o")
    killed: set[int] = set()
    while builder.poll() is None:
        for child in descendants(builder.pid) - {builder.pid} - killed:
            if len(killed) < 6:
                time.sleep(0.05 * len(killed))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    killed.add(child)
        time.sleep(0.01)
    assert complaints(builder.communicate()[1]) == []
    assert builder.returncode == 0
    assert len(killed) >= 3  # on a busy machine some end before they can be killed
    assert digests(tmp_path / "o") == digests(corpus)


def test_four_concurrent_builders_give_the_same_bytes(videos: Path, corpus: Path, tmp_path: Path) -> None:
    builders = [start(videos, tmp_path / "o") for _ in range(4)]
    for builder in builders:
        assert complaints(builder.communicate(timeout=200)[1]) == []
        assert builder.returncode == 0
    assert digests(tmp_path / "o") == digests(corpus)
    assert list((tmp_path / "o").rglob(".*")) == []
