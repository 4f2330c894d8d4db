"""Odd labels, short videos and odd names are answered, or left out with the reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from vjepa.evals.embed import embed
from vjepa.evals.features import trained_short
from vjepa.evals.labels import LabelValues, scalars
from vjepa.evals.shell import run_evaluation
from vjepa.weights.load import load_encoder
from vjepa_data.evaluation.clips import EvalClips
from vjepa_data.evaluation.video_files import file_clips
from vjepa_data.media.video import Refused
from vjepa_data.settings import BadInput

QUICK = {"random_seeds": 0, "clips_per_video": 1}


def test_missing_values_are_no_labels() -> None:
    labels = {"a": None, "b": float("nan"), "c": float("inf"), "d": [1], "e": "", "f": False, "g": 2, "h": 10**400}
    assert scalars(labels) == {"e": "", "f": False, "g": 2}


@pytest.mark.parametrize(
    ("fit", "report", "kind"),
    [
        (["a", "b"] * 4, ["a"], "class"),
        ([True, False] * 4, [True, True], "class"),
        ([1, 2] * 4, [2, 2], "class"),
        ([1, "1", 2, "2"], ["1"], "class"),
        ([0.5, 2, 3], [1, 4.5], "number"),
        (list(range(100)), [3, 4], "number"),
        ([0.5, 2, 3], [1], "all videos to report on have the same number"),
        (["a"], ["a"], "1 of the videos to fit on have it"),
        (["a", "b", "b"], [], "0 of the videos to report on have it"),
        (["a", "a"], ["a"], "all videos to fit on have the same value ('a')"),
        (list("abcd"), ["a"], "only 0 of 4 videos to fit on share their value with another"),
        ([f"{n % 1500}" for n in range(4000)], ["1"], "it has 1500 values in 4000 videos to fit on, more than 1000"),
    ],
)
def test_the_kind_of_a_label_or_the_reason_against_it(fit: list, report: list, kind: str) -> None:
    assert LabelValues(fit, report).kind() == kind


@pytest.fixture(scope="module")
def odd(write_corpus: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose `word` can be predicted. Other labels are sparse, unique, constant, missing or of mixed kinds."""
    labels = [
        {"word": "ab"[n % 2], "caption": f"film {n}", "site": "x", "size": n * 1.5, "mixed": ["x", 3][n % 2],
         "hole": None if n % 3 else float(n), "list": [n], "late": "ab"[n % 2] if n < 12 else "c"}
        | ({"rare": "u"} if n < 2 else {})
        for n in range(18)
    ]  # fmt: skip
    return write_corpus(tmp_path_factory.mktemp("corpora") / "odd", train=labels[:12], val=labels[6:])


def test_labels_that_cannot_be_predicted_are_left_out(trained: Path, odd: Path, tmp_path: Path) -> None:
    result = run_evaluation("probe", trained, odd, QUICK, out=tmp_path / "p.json")
    assert {row.task for row in result.rows} == {"word", "size", "mixed", "hole", "late"}
    assert set(result.details["left_out"]) == {"caption", "site"}
    assert "only 0 of 8 videos to fit on" in result.details["left_out"]["caption"]
    assert json.loads((tmp_path / "p.json").read_text())["left_out"] == result.details["left_out"]


def test_a_train_split_leaves_out_unseen_classes(trained: Path, odd: Path) -> None:
    result = run_evaluation("probe", trained, odd, {**QUICK, "train_split": "train"})
    left_out = result.details["left_out"]
    assert left_out["late"] == "has class 'c' only in the videos to report on"
    assert left_out["rare"] == "cannot be predicted: 0 of the videos to report on have it"
    assert {row.task for row in result.rows} == {"word", "size", "mixed", "hole"}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("caption", "label 'caption' cannot be predicted: only 0 of 12 videos to fit on share"),
        ("site", "label 'site' cannot be predicted: all videos to fit on have the same value"),
        ("rare", "no label 'rare' with words or numbers; use caption"),
        ("list", "no label 'list' with words or numbers"),
    ],
)
def test_a_wanted_label_is_refused_before_any_video_is_read(
    trained: Path, odd: Path, monkeypatch: pytest.MonkeyPatch, label: str, message: str
) -> None:
    monkeypatch.setattr("vjepa.evals.linear.read_features", lambda *_, **__: pytest.fail("a video was read"))
    with pytest.raises(BadInput, match=message):
        run_evaluation("probe", trained, odd, {**QUICK, "labels": (label,)})


@pytest.mark.parametrize("kind", ["knn", "attentive"])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("caption", "only 0 of 12 videos share their value of 'caption'"),
        ("site", r"all 12 videos have the same 'site' \('x'\)"),
        ("size", "label 'size' in split 'val' is not a class but float"),
        ("shape", "no class label 'shape' in split 'val', which has caption"),
    ],
)
def test_a_label_for_a_vote_or_an_attentive_probe_is_checked_first(
    trained: Path, odd: Path, monkeypatch: pytest.MonkeyPatch, kind: str, label: str, message: str
) -> None:
    monkeypatch.setattr(f"vjepa.evals.{kind}.clips_for", lambda *_, **__: pytest.fail("a video was read"))
    with pytest.raises(BadInput, match=message):
        run_evaluation(kind, trained, odd, {"label": label})


# ---- short videos


@pytest.fixture(scope="module")
def short(write_corpus: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of two frames at 8 per second. A clip of the model has four frames."""
    labels = [{"word": "ab"[n % 2]} for n in range(8)]
    return write_corpus(tmp_path_factory.mktemp("corpora") / "short", frames=2, train=labels, val=labels)


def test_a_model_that_held_short_videos_evaluates_them(
    make_trained: Callable[..., Path], short: Path, tmp_path: Path
) -> None:
    run = make_trained(tmp_path / "run")
    state = next(run.rglob("state.json"))
    content = json.loads(state.read_text())
    content["settings"]["data"]["clip"]["short"] = "hold"
    state.write_text(json.dumps(content))
    assert trained_short(load_encoder(run)) == "hold"
    assert embed(run, [short], tmp_path / "f.parquet").clips == 8
    result = run_evaluation("probe", run, short, {**QUICK, "labels": ("word",)})
    assert result.protocol["short_videos"] == {"val": "held"}


def test_short_videos_are_held_on_request(trained: Path, short: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none of the 8 videos .* or --short hold"):
        embed(trained, [short], tmp_path / "f.parquet")
    embed(trained, [short], tmp_path / "f.parquet", short="hold")
    (clip, *_) = EvalClips(short, split="train", px=32, frames=4, fps=8.0, short="hold")
    assert clip.numbers == (0, 1, 1, 1)
    wanted = load_encoder(trained)(clip.frames[None]).mean((1, 2, 3))[0]
    torch.testing.assert_close(torch.tensor(pq.read_table(tmp_path / "f.parquet")["features"][0].as_py()), wanted)


@pytest.mark.parametrize("frames", range(2, 8))
@pytest.mark.parametrize("fps", [4.0, 6.0, 8.0])
def test_files_and_corpora_agree_on_short_videos(
    write_corpus: Callable[..., Path], tmp_path: Path, frames: int, fps: float
) -> None:
    corpus = write_corpus(tmp_path / "corpus", frames=frames, train=[{}])
    form = {"px": 32, "frames": 4, "fps": fps}
    held = next(iter(EvalClips(corpus, split="train", short="hold", **form)))
    file = tmp_path / "a.mp4"
    file.write_bytes(EvalClips(corpus, split="train", short="hold", **form).index.read(0).video)
    try:
        fits = bool(len(EvalClips(corpus, split="train", **form)))
    except BadInput:
        fits = False
    try:
        file_clips(file, **form)
        fits_as_a_file = True
    except Refused:
        fits_as_a_file = False
    assert fits == fits_as_a_file
    (clip,) = file_clips(file, short="hold", **form)
    assert clip.frames.shape == held.frames.shape


def test_a_clip_spans_the_wanted_seconds(
    trained: Path, write_scene: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    video = write_scene(tmp_path / "a.mp4", 0)
    embed(trained, [video], tmp_path / "f.parquet", clip_s=1.0)
    (row,) = pq.read_table(tmp_path / "f.parquet").to_pylist()
    assert row["seconds"] == 1.0
    (clip,) = file_clips(video, px=32, frames=4, fps=4.0)
    wanted = load_encoder(trained)(clip.frames[None]).mean((1, 2, 3))[0]
    torch.testing.assert_close(torch.tensor(row["features"]), wanted)


def test_windows_of_a_video_may_overlap(
    trained: Path, scenes: Path, write_scene: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    clips = file_clips(write_scene(tmp_path / "a.mp4", 0), px=32, frames=4, fps=8.0, every_s=0.25)
    assert len(clips) > 4
    assert [clip.start_s for clip in clips] == [0.25 * number for number in range(len(clips))]
    embed(trained, [scenes], tmp_path / "f.parquet", split="val", every_s=0.25)
    rows = pq.read_table(tmp_path / "f.parquet").to_pylist()
    first = [row for row in rows if row["key"] == rows[0]["key"]]
    assert [row["start_s"] for row in first] == pytest.approx(
        [0.25 * row["clip"] for row in rows[: len(first)]], abs=0.04
    )
    assert {row["seconds"] for row in rows} == {0.5}
    assert (
        first[-1]["start_s"] + 0.25
        > EvalClips(scenes, split="val", px=32, frames=4, fps=8.0, per_video=2).chosen[1][1] / 8
    )
    with pytest.raises(BadInput, match="--clips-per-video 2 and --every-s 1 exclude each other"):
        embed(trained, [scenes], tmp_path / "x.parquet", clips_per_video=2, every_s=1.0)


def test_more_windows_than_fit_into_memory_are_refused(
    write_scene: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    video = write_scene(tmp_path / "a.mp4", 0)
    with pytest.raises(Refused, match=r"at most 1365 fit into memory; give a longer --every-s"):
        file_clips(video, px=256, frames=8, fps=16.0, every_s=1e-4)


# ---- names


def test_odd_names_are_rows(trained: Path, write_scene: Callable[[Path, int], Path], tmp_path: Path) -> None:
    video = write_scene(tmp_path / "scene.mp4", 0).read_bytes()
    (tmp_path / "in").mkdir()
    names = [b"caf\xe9.mp4", b"a b.mp4", b"two\nlines.mp4", b"%s{}.mp4", "ä".encode() * 100 + b".mp4", b"-x.mp4"]
    for name in names:
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(video)
    for suffix in ("parquet", "npy", "safetensors"):
        assert embed(trained, [tmp_path / "in"], tmp_path / f"f.{suffix}").clips == len(names)
    keys = [Path(row["key"]).name for row in pq.read_table(tmp_path / "f.parquet").to_pylist()]
    assert sorted(keys) == sorted(name.decode("utf-8", "backslashreplace") for name in names)
