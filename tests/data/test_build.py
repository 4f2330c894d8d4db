"""Build shards from raw videos, with real files, processes and signals."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from rich.console import Console

from vjepa_data.builder import shard
from vjepa_data.builder.status import format_duration, read_status
from vjepa_data.builder.survey import survey
from vjepa_data.builder.verify import verify
from vjepa_data.config_files import load_settings
from vjepa_data.corpus.format import Manifest, read_manifest
from vjepa_data.reader.bench import descendants
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec

SMALL = ["encode.short_side_px=32", "encode.preset=ultrafast", "shard_samples=4", "name=toy"]


def spec(*overrides: str) -> Spec:
    return load_settings(Spec, None, [*SMALL, *overrides]).settings


def build(sources: Path | list[Path], out: Path, *overrides: str, workers: int = 1) -> Manifest:
    sources = [sources] if isinstance(sources, Path) else sources
    console = Console(file=io.StringIO())
    return shard([str(path) for path in sources], out, spec=spec(*overrides), workers=workers, console=console)


def write_video(path: Path, *, look: int = 0, frames: int = 20, px: int = 48) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = px, px, "yuv420p"
        y, x = np.mgrid[:px, :px]
        for number in range(frames):
            picture = np.stack([x * 4 + number * 5, y * 5 + look * 31, x + y + number * 3 + look], axis=-1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine good videos in two folders, some with labels, a copy, and three bad files."""
    folder = tmp_path_factory.mktemp("raw") / "videos"
    for number in range(9):
        path = write_video(folder / f"{'ab'[number % 2]}" / f"clip {number}.mp4", look=number)
        if number % 3 == 0:
            path.with_suffix(".json").write_text(json.dumps({"speed": number, "shape": "disc"}))
    data = (folder / "a" / "clip 0.mp4").read_bytes()
    (folder / "b" / "copy.mp4").write_bytes(data)
    (folder / "b" / "half.mp4").write_bytes(data[: len(data) // 2])
    (folder / "b" / "page.mp4").write_text("<html></html>")
    (folder / "notes.txt").write_text("not a video, and not called like one")
    return folder


@pytest.fixture(scope="module")
def corpus(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build(videos, out, "split.val_share=0.3")
    return out


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a corpus, except the report and the status."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    files = (path for path in files if path.parent.name != "status")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_source_is_stored_or_rejected_with_a_reason(corpus: Path) -> None:
    samples = pq.read_table(corpus / "samples.parquet").to_pylist()
    rejects = pq.read_table(corpus / "rejects.parquet").to_pylist()
    assert len(samples) == 9
    assert {(row["source"], row["stage"], row["reason"]) for row in rejects} == {
        ("videos/b/copy.mp4", "dedupe", "duplicate"),
        ("videos/b/half.mp4", "probe", "no_index"),
        ("videos/b/page.mp4", "probe", "not_video"),
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves tars open
def test_webdataset_and_offsets_read_the_same_bytes(corpus: Path) -> None:
    manifest = read_manifest(corpus)
    rows = pq.read_table(corpus / "samples.parquet").to_pylist()
    seen = []
    for number, entry in enumerate(manifest.shards):
        data = (corpus / entry.file).read_bytes()
        own = [row for row in rows if row["shard"] == number]
        urls = wds.WebDataset(  # pyright: ignore[reportAttributeAccessIssue]
            str(corpus / entry.file), shardshuffle=False, nodesplitter=None, empty_check=False
        )
        for position, (sample, row) in enumerate(zip(urls, own, strict=True)):
            assert (sample["__key__"], position) == (row["key"], row["position"])
            assert data[row["video_offset"] :][: row["video_size"]] == sample["mp4"]
            assert data[row["json_offset"] :][: row["json_size"]] == sample["json"]
            facts = json.loads(sample["json"])
            assert (facts["key"], facts["split"], facts["group"]) == (row["key"], row["split"], row["group"])
            assert facts["labels"] == json.loads(row["labels"])
            assert facts["stored"]["xxh64"] == row["xxh64"]
            seen.append(row["key"])
        with tarfile.open(corpus / entry.file) as tar:
            assert [member.name.split(".")[1] for member in tar] == ["json", "mp4"] * len(own)
    assert len(seen) == len(set(seen)) == 9


def test_labels_next_to_a_video_are_kept(corpus: Path) -> None:
    rows = pq.read_table(corpus / "samples.parquet").to_pylist()
    labels = {row["group"]: json.loads(row["labels"]) for row in rows}
    assert labels["videos/b/clip 3.mp4"] == {"speed": 3, "shape": "disc"}
    assert labels["videos/b/clip 1.mp4"] == {}


def test_a_group_is_never_divided_between_splits(corpus: Path, videos: Path, tmp_path: Path) -> None:
    assert set(read_manifest(corpus).splits) == {"train", "val"}
    build(videos, tmp_path / "o", "split.val_share=0.5", "split.group=folder", "cut.kind=fixed", "cut.length_s=0.7")
    rows = pq.read_table(tmp_path / "o" / "samples.parquet").to_pylist()
    assert len(rows) == 27
    splits = {row["group"]: row["split"] for row in rows}
    assert set(splits) == {"videos/a", "videos/b"}
    assert all(splits[row["group"]] == row["split"] for row in rows)


def test_bytes_do_not_depend_on_location_or_workers(videos: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "elsewhere" / "videos")
    build(tmp_path / "elsewhere" / "videos", tmp_path / "o", "split.val_share=0.3", workers=3)
    assert digests(tmp_path / "o") == digests(corpus)


def test_a_second_call_writes_no_shard_again(videos: Path, corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (corpus / "shards").iterdir()}
    assert build(videos, corpus, "split.val_share=0.3") == read_manifest(corpus)
    assert {path: path.stat().st_mtime_ns for path in (corpus / "shards").iterdir()} == before


def start(videos: Path, out: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from vjepa_data.builder import shard;"
        "from vjepa_data.spec import Spec;"
        "from vjepa_data.config_files import load_settings;"
        "shard([sys.argv[1]], Path(sys.argv[2]), spec=load_settings(Spec, None, sys.argv[3:]).settings, workers=1)"
    )
    words = [sys.executable, "-c", code, str(videos), str(out), *SMALL, "split.val_share=0.3"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_build_resumes_to_the_same_bytes(videos: Path, corpus: Path, tmp_path: Path) -> None:
    """No process survives the kill, and temporary files of the killed builder are removed."""
    out = tmp_path / "o"
    builder = start(videos, out)
    wait_for(lambda: list((out / "shards").glob("*.tar")) != [] if (out / "shards").exists() else False)
    children = descendants(builder.pid) - {builder.pid}
    builder.kill()
    builder.communicate()
    for folder in ("", "plan/", "status/"):
        (out / f"{folder}.x.json.{socket.gethostname()}.{builder.pid}.tmp").write_text("half")
    assert not (out / "manifest.json").exists()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert children
    build(videos, out, "split.val_share=0.3")
    assert digests(out) == digests(corpus)


def test_sigterm_exits_with_75_and_removes_temporary_files(videos: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    builder = start(videos, out)
    wait_for(lambda: list((out / "shards").glob(".*.tmp")) != [] if (out / "shards").exists() else False)
    builder.send_signal(signal.SIGTERM)
    builder.communicate(timeout=30)
    assert builder.returncode == 75
    assert list(out.rglob(".*")) == []
    build(videos, out, "split.val_share=0.3")
    assert digests(out) == digests(corpus)


def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_bytes(write_video(tmp_path / "v.mp4").read_bytes()[:500])
    for name, message in {
        "empty": r"no videos in .*empty \(empty\); give",
        "texts": r"no videos in .*texts \(1 other files: 1 x .txt\); give",
        "bad": r"none of the 1 sources can be used \(1 no_index\), for example bad/a.mp4: .*; repair",
        "absent": r"absent: no such file or folder; give",
    }.items():
        with pytest.raises(BadInput, match=message) as caught:
            build(tmp_path / name, tmp_path / "o")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "o").exists()


def test_a_folder_with_other_content_is_not_touched(videos: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match=r"holds other files \(thesis.tex\); give"):
        build(videos, tmp_path)
    with pytest.raises(BadInput, match=r"--out /proc/x cannot be written .*; give another folder"):
        build(videos, Path("/proc/x"))
    with pytest.raises(BadInput, match=r"different spec \(encode.crf was 23, now 20\); give another --out"):
        build(videos, corpus, "encode.crf=20", "split.val_share=0.3")
    (tmp_path / "later").mkdir()
    write_video(tmp_path / "later" / "a.mp4")
    with pytest.raises(BadInput, match=r"different sources; give another --out.* mix them with `vjepa merge`"):
        build(tmp_path / "later", corpus, "split.val_share=0.3")
    with pytest.raises(BadInput, match=r"videos is --out or lies inside it; write"):
        build(videos, videos)
    assert verify(corpus).problems == ()


def test_too_many_rejects_fail_the_build(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"3 of 12 sources were rejected .*, more than 10%\. Repair"):
        build(videos, tmp_path / "o", "max_rejects=0.1")


def test_each_filter_has_its_own_reason(videos: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "short.mp4", frames=3)
    write_video(tmp_path / "in" / "tiny.mp4", px=16)
    write_video(tmp_path / "in" / "long.mp4", frames=60)
    write_video(tmp_path / "in" / "banned.mp4", look=5)
    write_video(tmp_path / "in" / "fine.mp4", look=6)
    (tmp_path / "deny.txt").write_text("in/banned.mp4\n")
    (tmp_path / "spec.yaml").write_text("filter: {max_duration_s: 5, deny: deny.txt}\n")  # in the folder of the spec
    found = load_settings(Spec, tmp_path / "spec.yaml", SMALL).settings
    shard([str(tmp_path / "in")], tmp_path / "o", spec=found, workers=1)
    rejects = pq.read_table(tmp_path / "o" / "rejects.parquet").to_pylist()
    assert {(row["source"], row["reason"]) for row in rejects} == {
        ("in/short.mp4", "too_short"),
        ("in/tiny.mp4", "too_small"),
        ("in/long.mp4", "too_long"),
        ("in/banned.mp4", "denied"),
    }


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_give_labels_time_ranges_and_splits(kind: str, tmp_path: Path) -> None:
    write_video(tmp_path / "a, b.mp4", look=1)
    write_video(tmp_path / "c.mp4", look=2)
    rows = [
        {"path": "a, b.mp4", "start_s": 0.5, "end_s": 1.5, "label": "left", "split": "val"},
        {"path": "c.mp4", "start_s": None, "end_s": None, "label": "right", "split": "train"},
    ]
    path = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(rows[0])]
        lines += [
            mark.join("" if v is None else f'"{v}"' if "," in str(v) else str(v) for v in r.values()) for r in rows
        ]
        path.write_text("\n".join(lines) + "\n")
    build(path, tmp_path / "o")
    found = {row["group"]: row for row in pq.read_table(tmp_path / "o" / "samples.parquet").to_pylist()}
    assert json.loads(found["a, b.mp4"]["labels"]) == {"label": "left"}
    assert (found["a, b.mp4"]["frames"], found["a, b.mp4"]["split"]) == (10, "val")
    assert (found["c.mp4"]["frames"], found["c.mp4"]["split"]) == (20, "train")


def test_a_missing_column_is_an_error_that_lists_all_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,label\na.mp4,1\n")
    with pytest.raises(BadInput, match=r"no column 'path' among file, label; set columns.path=NAME"):
        build(tmp_path / "t.csv", tmp_path / "o")


def test_copy_mode_keeps_canonical_files_byte_for_byte(corpus: Path, videos: Path, tmp_path: Path) -> None:
    row = pq.read_table(corpus / "samples.parquet").to_pylist()[0]
    data = (corpus / read_manifest(corpus).shards[0].file).read_bytes()[row["video_offset"] :][: row["video_size"]]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kept.mp4").write_bytes(data)
    write_video(tmp_path / "in" / "encoded.mp4", look=77)
    build(tmp_path / "in", tmp_path / "o", "mode=copy")
    found = {row["group"]: row["xxh64"] for row in pq.read_table(tmp_path / "o" / "samples.parquet").to_pylist()}
    assert found["in/kept.mp4"] == row["xxh64"]
    assert found["in/encoded.mp4"] != row["xxh64"]


def test_a_folder_that_cannot_be_written_is_an_error(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match=r"cannot be written|is a file"):
        build(videos, tmp_path / "file")
    with pytest.raises(BadInput, match=r"cannot be written \(Not a directory\)"):
        build(videos, tmp_path / "file" / "below")
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 300 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_build_resumes_after_a_full_disk(videos: Path, corpus: Path, small_disk: Path) -> None:
    out = small_disk / "o"
    (small_disk / "ballast").write_bytes(bytes(230_000))
    with pytest.raises(BadInput, match=r"cannot be written \(No space left on device\); free some space"):
        build(videos, out, "split.val_share=0.3")
    assert not (out / "manifest.json").exists()
    assert list(out.rglob(".*")) == []
    (small_disk / "ballast").unlink()
    build(videos, out, "split.val_share=0.3")
    assert digests(out) == digests(corpus)


def test_a_read_only_disk_is_an_error(videos: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(BadInput, match=r"cannot be written \(Read-only file system\)"):
        build(videos, small_disk / "o")


def test_a_survey_predicts_the_build_and_writes_nothing(videos: Path, corpus: Path) -> None:
    before = sorted(videos.rglob("*"))
    found = survey([str(videos)], spec=spec("split.val_share=0.3"), workers=1, console=Console(file=io.StringIO()))
    assert (found.sources, found.clips, found.trials) == (12, 9, 9)
    assert found.rejects == {"duplicate": 1, "no_index": 1, "not_video": 1}
    manifest = read_manifest(corpus)
    assert found.shards == len(manifest.shards)
    assert found.splits == {name: totals["samples"] for name, totals in manifest.splits.items()}
    rows = pq.read_table(corpus / "samples.parquet").to_pylist()
    assert found.bytes_out == pytest.approx(sum(row["video_size"] for row in rows))
    assert 0 < found.core_hours < 0.1
    assert sorted(videos.rglob("*")) == before


def test_a_corpus_below_its_sources_is_not_a_source(videos: Path, tmp_path: Path) -> None:
    raw = shutil.copytree(videos, tmp_path / "videos")
    built = build(raw, raw / "corpus", "split.val_share=0.3")
    assert build(raw, raw / "corpus", "split.val_share=0.3").hash == built.hash
    found = survey([str(raw)], spec=spec(), workers=1, out=raw / "corpus", console=Console(file=io.StringIO()))
    assert found.sources == 12


def test_a_broken_link_is_rejected_as_missing(videos: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "gone.mp4").symlink_to("/nonexistent/gone.mp4")
    (raw / "here.mp4").symlink_to(videos / "a" / "clip 0.mp4")
    os.mkfifo(raw / "pipe.mp4")
    build(raw, tmp_path / "o")
    rows = pq.read_table(tmp_path / "o" / "rejects.parquet").to_pylist()
    assert {row["source"]: row["reason"] for row in rows} == {"raw/gone.mp4": "missing", "raw/pipe.mp4": "skipped"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.42, "3.4 s"), (119, "119.0 s"), (125, "2.1 min"), (9e3, "2.5 h"), (4e6, "1,111.1 h")]
)
def test_a_duration_has_a_suitable_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_status_is_read_from_the_files_of_a_build(videos: Path, corpus: Path, tmp_path: Path) -> None:
    found = read_status(corpus)
    assert (found.stage, found.shards, found.shards_done) == ("complete", 3, 3)
    assert (found.clips, found.clips_done) == (9, 9)
    assert sum(builder.tally.clips for builder in found.builders) == 9
    shutil.copytree(corpus, tmp_path / "half")
    (tmp_path / "half" / "manifest.json").unlink()
    (tmp_path / "half" / "shards" / "000001.json").unlink()
    found = read_status(tmp_path / "half")
    assert (found.stage, found.shards_done, found.clips_done < 9) == ("writing", 2, True)
    (tmp_path / "half" / "plan" / "plan.json").unlink()
    found = read_status(tmp_path / "half")
    assert (found.stage, found.sources, found.sources_done) == ("analyzing", 12, 12)
    with pytest.raises(BadInput, match="holds no build"):
        read_status(tmp_path)


def test_attempts_of_an_array_task_share_a_status_file(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    sources, quiet = [str(videos)], Console(file=io.StringIO())
    for number in (2, 0, 2):
        shard(sources, out, spec=spec(), workers=1, task=(number, 3), console=quiet)
    files = {path.name: json.loads(path.read_bytes()) for path in (out / "status").iterdir()}
    assert sorted(files) == ["task-00000-of-00003.json", "task-00002-of-00003.json"]
    assert {name: one["tally"]["clips"] for name, one in files.items()} == {
        "task-00000-of-00003.json": 0,
        "task-00002-of-00003.json": 9,
    }
    assert "  task 2 of 3: 9 clips" in read_status(out).text()
    (out / "status" / "task-00009-of-00009.json").write_text('{"builder": "of another version"}')
    with pytest.raises(BadInput, match=r"task-00009-of-00009\.json: unknown format"):
        read_status(out)


def test_stored_analyses_are_reused(videos: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "plan", tmp_path / "o" / "plan")
    (tmp_path / "o" / "plan" / "plan.json").unlink()
    seen = tmp_path / "o" / "plan" / "seen-000000.json"
    seen.write_text(seen.read_text().replace('"reason":"not_video"', '"reason":"denied"'))
    build(videos, tmp_path / "o", "split.val_share=0.3")
    rejects = pq.read_table(tmp_path / "o" / "rejects.parquet").to_pylist()
    assert ("videos/b/page.mp4", "denied") in {(row["source"], row["reason"]) for row in rejects}
