"""Embedding writes the features that the encoder gives, for any videos, and continues after an interruption."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from vjepa.evals import embed as embed_module
from vjepa.evals import parts as parts_module
from vjepa.evals.embed import embed
from vjepa.evals.labels import read_class_labels
from vjepa.weights.load import load_encoder
from vjepa_data.builder.index_foreign import index_shards
from vjepa_data.evaluation import video_files as files_module
from vjepa_data.evaluation.clips import EvalClips, square_views
from vjepa_data.evaluation.video_files import file_clips, find_videos
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput


@pytest.fixture
def folder(write_scene: Callable[[Path, int], Path], tmp_path: Path) -> Path:
    """Three valid videos, of which one is in a subfolder, and three invalid videos."""
    videos = tmp_path / "videos"
    for name, number in (("b.mp4", 1), ("a.mp4", 0), ("below/c.mp4", 2)):
        write_scene(videos / name, number)
    (videos / "text.mp4").write_text("no video")
    (videos / "torn.mp4").write_bytes((videos / "a.mp4").read_bytes()[:900])
    (videos / "empty.mkv").write_bytes(b"")
    (videos / "notes.txt").write_text("not looked at")
    return videos


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out).to_pylist()


def test_foreign_shards_are_embedded_with_their_labels(
    trained: Path, write_scene: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    video = write_scene(tmp_path / "scene.mp4", 0)
    (tmp_path / "in").mkdir()
    said = {"a": None, "b": {"caption": "a disc", "views": 7}, "c": "no object", "d": {"labels": ["x"], "group": 3}}
    with tarfile.open(tmp_path / "in" / "webvid.tar", "w") as tar:
        for key, facts in said.items():
            tar.add(video, f"{key}.mp4")
            if facts is not None:
                (tmp_path / "facts.json").write_text(json.dumps(facts))
                tar.add(tmp_path / "facts.json", f"{key}.json")
    index_shards(tmp_path / "in")
    clips = EvalClips(tmp_path / "in", split="train", px=32, frames=4, fps=8.0)
    assert {clip.key: clip.labels for clip in clips} == {"a": {}, "b": said["b"], "c": {}, "d": said["d"]}
    assert embed(trained, [tmp_path / "in"], tmp_path / "f.parquet").broken == 0
    with pytest.raises(
        BadInput, match="no class label 'kind' in split 'train', which has caption, group, labels, views"
    ):
        read_class_labels(tmp_path / "in", "train", "kind")


def test_a_picture_is_a_clip_of_equal_frames(trained: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        header = tarfile.TarInfo("one.png")
        header.size = len(file.getvalue())
        tar.addfile(header, io.BytesIO(file.getvalue()))
    index_shards(tmp_path)
    embed(trained, [tmp_path], tmp_path / "f.parquet", clips_per_video=3)
    (row,) = rows_of(tmp_path / "f.parquet")
    still = torch.from_numpy(picture).expand(1, 4, -1, -1, -1)
    wanted = load_encoder(trained)(still).mean((1, 2, 3))[0]
    torch.testing.assert_close(torch.tensor(row["features"]), wanted)


def test_each_video_has_its_row(trained: Path, folder: Path, tmp_path: Path) -> None:
    summary = embed(trained, [folder], tmp_path / "f.parquet", clips_per_video=2)
    assert (summary.clips, summary.videos, summary.broken, summary.shape) == (6, 6, 3, (48,))
    rows = rows_of(tmp_path / "f.parquet")
    assert [Path(row["key"]).name for row in rows] == [
        "a.mp4", "a.mp4", "b.mp4", "b.mp4", "c.mp4", "c.mp4", "empty.mkv", "text.mp4", "torn.mp4",
    ]  # fmt: skip
    errors = {Path(row["key"]).name: row["error"].split(":")[0] for row in rows if row["error"]}
    assert errors == {"empty.mkv": "empty", "text.mp4": "not_video", "torn.mp4": "no_index"}
    clips = file_clips(folder / "b.mp4", px=32, frames=4, fps=8.0, per_video=2)
    wanted = load_encoder(trained)(torch.stack([clip.frames for clip in clips])).mean((1, 2, 3))
    got = torch.tensor([row["features"] for row in rows[2:4]])
    torch.testing.assert_close(got, wanted)
    assert [row["start_s"] for row in rows[2:4]] == [clip.start_s for clip in clips] == [0.0, 1.0]
    about = json.loads(pq.read_schema(tmp_path / "f.parquet").metadata[b"vjepa"])
    assert about["shape"] == [48]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("what", ["time", "token"])
def test_the_three_kinds_of_file_hold_the_same(trained: Path, scenes: Path, tmp_path: Path, what: str) -> None:
    for suffix in ("parquet", "npy", "safetensors"):
        embed(trained, [scenes], tmp_path / f"f.{suffix}", split="val", what=what)  # type: ignore[arg-type]
    shape = {"time": (2, 48), "token": (2, 4, 4, 48)}[what]
    array = np.load(tmp_path / "f.npy")
    assert array.shape == (24, *shape)
    with safe_open(tmp_path / "f.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("features"), array)
        said = json.loads(file.metadata()["vjepa"])
    rows = rows_of(tmp_path / "f.parquet")
    assert np.array_equal(np.array([row["features"] for row in rows], np.float32).reshape(24, *shape), array)
    assert said == json.loads((tmp_path / "f.json").read_text())
    assert [row["key"] for row in said["rows"]] == [row["key"] for row in rows]


def test_a_corpus_gives_the_features_of_its_clips(trained: Path, scenes: Path, tmp_path: Path) -> None:
    embed(trained, [scenes], tmp_path / "f.npy", split="val")
    encoder = load_encoder(trained)
    clips = list(EvalClips(scenes, split="val", px=32, frames=4, fps=8.0))
    wanted = encoder(torch.stack([clip.frames for clip in clips])).mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), wanted, atol=1e-5)


HANGING = """
import os, time

def work(wanted):
    while wanted.path.name == "a.mp4":
        time.sleep(1)
    os.abort()
"""


def test_files_that_hang_or_crash_their_decoder_have_a_row(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "hanging.py").write_text(HANGING)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(files_module, "__name__", "hanging")  # the module that children run
    for name, timeout_s, said in (("a.mp4", 1, "timed_out: no progress for 1 s"), ("b.mp4", 120, "crashed")):
        out = tmp_path / f"{name}.parquet"
        summary = embed(trained, [folder / name], out, timeout_s=timeout_s)
        assert (summary.clips, summary.broken) == (0, 1)
        assert rows_of(out)[0]["error"].startswith(said)


def test_files_without_an_end_are_rejected_at_once(trained: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "zero.mp4"):
        out = tmp_path / f"{name}.parquet"
        summary = embed(trained, [tmp_path / name], out, timeout_s=10_000)
        assert (summary.clips, summary.broken) == (0, 1)
        assert rows_of(out)[0]["error"] == "missing: not a file"


def test_two_ranks_write_the_file_of_one_process(
    trained: Path, write_scene: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    for number in range(parts_module.PART_VIDEOS + 6):  # work for two
        if number < 4:
            write_scene(videos / f"{number:03d}.mp4", number)
        else:
            os.link(videos / f"{number % 4:03d}.mp4", videos / f"{number:03d}.mp4")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for name, start in (("one", []), ("two", torchrun)):
        words = ["-m", "vjepa", "embed", trained, videos, "--workers", "1", "--out", tmp_path / f"{name}.parquet"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *start, *words], check=True, env=environment, timeout=240)
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert one.num_rows == parts_module.PART_VIDEOS + 6
    assert one.equals(two, check_metadata=True)


def test_views_are_squares_from_left_to_right() -> None:
    frames = np.zeros((1, 8, 24, 3), np.uint8)
    frames[:, :, 8:16], frames[:, :, 16:] = 100, 200
    levels = [int(view.float().mean()) for view in square_views(frames, 8, 3)]
    assert levels == [0, 100, 200]
    assert [int(view.float().mean()) for view in square_views(frames.transpose(0, 2, 1, 3), 8, 3)] == levels
    assert square_views(frames, 8, 1)[0].shape == (1, 8, 8, 3)


def test_an_interrupted_embedding_continues(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(trained, [folder], tmp_path / "whole.parquet")
    monkeypatch.setattr(parts_module, "PART_VIDEOS", 2)
    honest, calls = embed_module._rows, []

    def stop_at_third(encoder, request, videos, advance):
        calls.append([Path(request.videos.keys[video]).name for video in videos])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(encoder, request, videos, advance)

    monkeypatch.setattr(embed_module, "_rows", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed(trained, [folder], tmp_path / "f.parquet")
    assert not (tmp_path / "f.parquet").exists()
    with pytest.raises(BadInput, match="parts of another command \\(what was 'clip', is 'time'\\)"):
        embed(trained, [folder], tmp_path / "f.parquet", what="time")
    embed(trained, [folder], tmp_path / "f.parquet")
    assert calls[2:] == [["text.mp4", "torn.mp4"]] * 2
    assert rows_of(tmp_path / "f.parquet") == rows_of(tmp_path / "whole.parquet")
    assert not list(tmp_path.glob(".*"))


def test_bad_input_is_named_first(trained: Path, folder: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "taken.npy").write_text("mine")
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[list[Path], Path, str]] = [
        ([folder], tmp_path / "f.csv", "unsupported feature format '.csv' of .*; use .parquet, .npy, .safetensors"),
        ([folder], tmp_path / "taken.npy", "exists already"),
        ([tmp_path / "gone"], tmp_path / "f.npy", "no such file"),
        ([tmp_path / "nothing"], tmp_path / "f.npy", "no file there has the name of a video"),
        ([scenes, folder], tmp_path / "f.npy", "is a corpus and cannot be mixed"),
    ]
    for places, out, message in cases:
        with pytest.raises(BadInput, match=message):
            embed(trained, places, out)
    assert (tmp_path / "taken.npy").read_text() == "mine"


def test_a_file_is_cut_by_time(write_scene: Callable[[Path, int], Path], tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.mp4", 4)
    dense = file_clips(path, px=64, frames=12, fps=8.0)[0].frames
    sparse = file_clips(path, px=64, frames=3, fps=4.0, per_video=3)
    assert [clip.start_s for clip in sparse] == pytest.approx([0, 0.4375, 0.875])
    assert torch.equal(sparse[0].frames, dense[[0, 2, 4]])
    with pytest.raises(Refused, match="too_short"):
        file_clips(path, px=64, frames=16, fps=8.0)
    assert find_videos([path, tmp_path]) == [path]
