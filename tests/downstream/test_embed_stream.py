"""Streams of whole videos: files, pipes and corpora, a row per tubelet, stopped and continued at a row."""

import os
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from vjepa.cli.models import embed as embed_command
from vjepa.evals import embed_stream as module
from vjepa.evals.embed_stream import Pace, embed_stream
from vjepa.weights.load import load_encoder
from vjepa_data.evaluation.clips import EvalClips
from vjepa_data.evaluation.frame_stream import FileFrames
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput


@pytest.fixture(scope="module")
def causal(make_trained: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can stream: 4 frames at 8 per second, 32 px, tubelets of 2 frames, width 48."""
    return make_trained(tmp_path_factory.mktemp("causal") / "run", causal=True, rope="interleaved")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 40 frames at 8 per second, a video of one frame, a video that is torn in the middle, and a text."""
    folder = tmp_path_factory.mktemp("streams")
    write(folder / "a.mkv", 40)
    write(folder / "b.mp4", 1)
    whole = (folder / "a.mkv").read_bytes()
    (folder / "c.mkv").write_bytes(whole[: len(whole) // 2] + bytes(400) + whole[len(whole) // 2 + 400 :])
    (folder / "d.mp4").write_text("no video")
    return folder


def write(path: Path, frames: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (frames, 4, 4, 3), np.uint8).repeat(12, 1).repeat(12, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8), options={"g": "8", "threads": "1"})
        stream.height = stream.width = 48
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out).to_pylist()


def features_of(rows: list[dict]) -> Tensor:
    return torch.tensor([row["features"] for row in rows if row["error"] is None])


def frames_of(path: Path) -> Tensor:
    return torch.cat(list(FileFrames([path], px=32, fps=8.0, tubelet_frames=2).frames(0)))


def test_every_tubelet_has_a_row_and_every_broken_video_a_reason(causal: Path, videos: Path, tmp_path: Path) -> None:
    summary = embed_stream(causal, [videos], tmp_path / "f.parquet", window=3)
    rows = rows_of(tmp_path / "f.parquet")
    of = {name: [row for row in rows if Path(row["key"]).name == name] for name in ("a.mkv", "b.mp4", "c.mkv", "d.mp4")}
    assert [(row["clip"], row["start_s"], row["seconds"]) for row in of["a.mkv"]] == [
        (n, n / 4, 0.25) for n in range(20)
    ]
    stream = load_encoder(causal).stream(3)
    wanted = torch.cat([stream(part[None]).mean((2, 3))[0] for part in frames_of(videos / "a.mkv").split(2)])
    torch.testing.assert_close(features_of(of["a.mkv"]), wanted, rtol=0, atol=1e-6)
    assert [row["error"] for row in of["b.mp4"]] == ["too_short: 0 tubelets of 0.25 s give no row"]
    assert of["d.mp4"][0]["error"].startswith("not_video")
    # Features before the damage are kept, and equal the features of the video without damage.
    *good, last = of["c.mkv"]
    assert last["error"].startswith("damaged")
    assert 0 < len(good) < 20
    assert [row["features"] for row in good] == [row["features"] for row in of["a.mkv"][: len(good)]]
    assert (summary.videos, summary.broken, summary.clips, summary.shape) == (4, 3, 20 + len(good), (48,))


def test_an_interrupted_stream_goes_on_to_the_bit(
    causal: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_ROWS", 3)
    embed_stream(causal, [videos / "a.mkv"], tmp_path / "whole.parquet", window=3)
    read = FileFrames.frames
    skipped: list[int] = []

    def torn(self: FileFrames, video: int, skip: int = 0) -> Iterator[Tensor]:
        skipped.append(skip)
        for number, frames in enumerate(read(self, video, skip)):
            if number == 1:
                raise KeyboardInterrupt
            yield frames[:14]

    monkeypatch.setattr(FileFrames, "frames", torn)
    with pytest.raises(KeyboardInterrupt):
        embed_stream(causal, [videos / "a.mkv"], tmp_path / "f.parquet", window=3)
    with pytest.raises(BadInput, match=r"parts of another command \(window was 3, is 4\)"):
        embed_stream(causal, [videos / "a.mkv"], tmp_path / "f.parquet", window=4)
    monkeypatch.setattr(FileFrames, "frames", read)
    embed_stream(causal, [videos / "a.mkv"], tmp_path / "f.parquet", window=3)
    assert skipped == [0]
    assert rows_of(tmp_path / "f.parquet") == rows_of(tmp_path / "whole.parquet")
    assert not list(tmp_path.glob(".*"))


def test_frames_after_a_seek_are_those_of_one_pass(videos: Path) -> None:
    reader = FileFrames([videos / "a.mkv"], px=32, fps=8.0, tubelet_frames=2)
    whole = torch.cat(list(reader.frames(0)))
    assert len(whole) == 40
    for skip in (2, 14, 38):
        assert torch.equal(torch.cat(list(reader.frames(0, skip))), whole[skip:])


def test_a_pipe_gives_the_rows_of_its_file(causal: Path, videos: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((videos / "a.mkv").read_bytes()))
    writer.start()
    embed_stream(causal, [tmp_path / "pipe"], tmp_path / "pipe.npy", every="1s", what="token")
    writer.join()
    embed_stream(causal, [videos / "a.mkv"], tmp_path / "file.npy", every="1s", what="token")
    found = np.load(tmp_path / "pipe.npy")
    assert found.shape == (5, 1, 4, 4, 48)
    assert np.array_equal(found, np.load(tmp_path / "file.npy"))


def test_a_corpus_is_streamed_by_its_samples(causal: Path, scenes: Path, tmp_path: Path) -> None:
    embed_stream(causal, [scenes], tmp_path / "f.parquet", split="val", window=2)
    rows = rows_of(tmp_path / "f.parquet")
    clip = next(iter(EvalClips(scenes, split="val", px=32, frames=12, fps=8.0)))
    (stream, of_clip) = load_encoder(causal).stream(2), [row for row in rows if row["key"] == clip.key]
    wanted = torch.cat([stream(part[None]).mean((2, 3))[0] for part in clip.frames.split(2)])
    torch.testing.assert_close(features_of(of_clip), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("every_s", "rows"), [("1", [3, 7]), ("0.3", [1, 2, 3, 4, 5, 7, 8]), ("0.25", range(9))])
def test_rows_keep_their_pace(every_s: str, rows: list[int]) -> None:
    pace = Pace(Fraction(1, 4), Fraction(every_s))
    assert [tubelet for tubelet in range(9) if pace.has_row(tubelet)] == list(rows)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stream": True, "every": "soon"}, "--every soon is not a time above 0; write 1s, 500ms or 2min"),
        ({"stream": True, "every": "0s"}, "is not a time above 0"),
        ({"stream": True, "every": "100ms"}, r"shorter than a tubelet of this model \(0.25 s\)"),
        ({"stream": True, "views": 3}, "--views cannot be combined with --stream"),
        ({"window": 4}, "--window belongs to streams; add --stream"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    causal: Path, videos: Path, tmp_path: Path, options: dict, reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        embed_command(causal, [videos], out=tmp_path / "f.npy", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_looks_ahead_is_refused(trained: Path, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot stream: its tokens attend to later tubelets"):
        embed_stream(trained, [videos], tmp_path / "f.npy")


def test_a_hanging_file_is_given_up(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FileFrames([videos / "a.mkv"], px=32, fps=8.0, tubelet_frames=2, timeout_s=0.0)
    with pytest.raises(Refused) as refused:
        list(reader.frames(0))
    assert refused.value.reason == "timed_out"
