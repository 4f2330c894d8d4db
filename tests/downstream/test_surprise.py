"""Violation of expectation: the protocol, its ceiling, its audit, and what counts as wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vjepa.evals.base import Result
from vjepa.evals.shell import run_evaluation
from vjepa.evals.surprise import shortcuts
from vjepa.evals.surprise.baselines import pixel_baselines
from vjepa.evals.surprise.evaluation import auroc, score_rows
from vjepa_data.evaluation.violations import Film, ViolationSet, read_films, read_violations
from vjepa_data.settings import BadInput
from vjepa_data.synthetic.violations import LAWS, write_violations

SETTINGS = {"untrained": 1, "slide": 4, "batch": 8}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("violations")
    write_violations(folder, quadruplets=len(LAWS), seed=0)
    return folder


@pytest.fixture(scope="module")
def out(films: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("result") / "surprise.json"
    run_evaluation("surprise", trained, films, SETTINGS, out=file)
    return file


@pytest.fixture(scope="module")
def result(out: Path) -> Result:
    return Result.from_json(json.loads(out.read_text()))


def test_every_score_stands_beside_its_baselines(result: Result) -> None:
    baselines = {"random init", "random predictor", "copy features", "copy pixels", "extrapolate pixels"}
    assert set(result.columns) == {"pretrained", "oracle", "flow", "frame difference", *baselines}
    assert {row.task for row in result.rows} == {"all", *LAWS}
    assert len(result.tasks["all", "pairs"]["random init"].extra["seeds"]) == 1
    reported = {row["context_frames"] for row in result.details["by_context"]}
    assert reported == set(result.protocol["contexts"])


def test_an_oracle_is_right_about_every_pair(result: Result) -> None:
    for law in LAWS:
        assert result.tasks[law, "pairs"]["oracle"].value == 1.0


def test_a_repeated_evaluation_reads_what_was_measured(
    out: Path, films: Path, trained: Path, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vjepa.evals.surprise.evaluation.read_films", lambda *_, **__: pytest.fail("watched again"))
    again = run_evaluation("surprise", trained, films, SETTINGS, out=out, overwrite=True)
    assert [row.to_json() for row in again.rows] == [row.to_json() for row in result.rows]


def test_the_page_shows_pairs_over_time(out: Path) -> None:
    page = out.with_suffix(".html").read_text()
    assert page.count("<figure>") == 6
    assert "obeys" in page
    assert "breaks" in page
    assert page.count("<svg") >= 2 + 6


def test_shortcuts_are_at_chance(tmp_path: Path) -> None:
    write_violations(tmp_path, quadruplets=42, seed=1, px=32)
    found = read_violations(tmp_path)
    frames = read_films(found.films, px=32, fps=12, frame_step=None, workers=1)
    hints = [
        shortcuts.features(shown, film.path, number)
        for number, (film, shown) in enumerate(zip(found.films, frames, strict=True))
        if isinstance(shown, np.ndarray)
    ]
    rows = shortcuts.audit(found, {name: [one[name] for one in hints] for name in shortcuts.NAMES})
    assert [row for row in rows if not row["is_chance"]] == []


def test_halves_of_films_are_equal_after_compression(films: Path) -> None:
    """So that a surprise without expectations ties in each group."""
    found = read_violations(films)
    frames = [np.asarray(shown) for shown in read_films(found.films, px=32, fps=12, frame_step=None, workers=1)]
    for first in range(0, len(frames), 4):
        aa, bb, ab, ba = frames[first : first + 4]
        assert np.array_equal(ab, np.concatenate((aa[:24], bb[24:])))
        assert np.array_equal(ba, np.concatenate((bb[:24], aa[24:])))
        sizes = [film.path.stat().st_size for film in found.films[first : first + 4]]
        assert sizes[0] + sizes[1] == sizes[2] + sizes[3]
        assert np.array_equal(aa[23:25], bb[23:25])


@pytest.mark.parametrize(("trace", "accuracy"), [(0.0, 0.5), (0.2, 1.0)])
def test_an_audit_compares_groups(trace: float, accuracy: float, tmp_path: Path) -> None:
    """Ends differ by far more than the trace, so that no regression on single films sees it."""
    films = [Film(f"{n}", tmp_path, "law", f"{n // 4}", n % 4 < 2) for n in range(40)]
    violations = ViolationSet("test", films, [(n + k, n + k + 2) for n in range(0, 40, 4) for k in (0, 1)])
    ends = (100.0, 0.0, 0.0, 100.0)
    values = [np.array([n // 4 * 10 + ends[n % 4] + trace * (n % 4 > 1)], np.float32) for n in range(40)]
    rows = {row["statistic"]: row for row in shortcuts.audit(violations, {"file size": values})}
    assert rows["file size"]["is_chance"]
    assert (rows["file size, groups"]["accuracy"], rows["file size, groups"]["is_chance"]) == (accuracy, trace == 0)


def test_an_audit_finds_a_shortcut(tmp_path: Path) -> None:
    films = [Film(f"{n}", tmp_path, "law", f"{n // 2}", n % 2 == 0) for n in range(60)]
    violations = ViolationSet("test", films, [(n, n + 1) for n in range(0, 60, 2)])
    values = [np.array([float(n % 2)], np.float32) + n / 1000 for n in range(60)]
    (row,) = shortcuts.audit(violations, {"file size": values})
    assert (row["accuracy"], row["is_chance"]) == (1.0, False)


@pytest.mark.parametrize(
    ("impossible", "accuracy"), [([1.0, 3.0], 1.0), ([0.5, 0.5], 0.0), ([0.4, 0.9], 0.5), ([np.nan, 0.9], 0.5)]
)
def test_ties_and_missing_numbers_count_as_wrong(impossible: list[float], accuracy: float, tmp_path: Path) -> None:
    films = [Film(f"{n}", tmp_path, "law", f"{n // 2}", n % 2 == 0) for n in range(4)]
    violations = ViolationSet("test", films, [(0, 1), (2, 3)])
    windows = [np.array([[value]], np.float32) for value in (0.5, impossible[0], 0.5, impossible[1])]
    rows = {row.metric: row for row in score_rows(violations, "all", "model", windows)}
    assert rows["pairs"].value == accuracy


def test_the_area_under_the_curve_is_that_of_all_pairs() -> None:
    values, labels = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert auroc(values, labels)[0] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert auroc(np.array([1.0, np.nan]), np.array([False, True]))[0] == 0.0


def test_a_group_cancels_what_films_look_like(tmp_path: Path) -> None:
    """Each end adds 5 or 0, and each film that is impossible adds 1: pairs are half right, groups are all right."""
    films = [Film(f"{n}", tmp_path, "law", "one", possible=n < 2) for n in range(4)]
    violations = ViolationSet("test", films, [(0, 2), (1, 3)])
    windows = [np.array([[value]], np.float32) for value in (5.0, 0.0, 1.0, 6.0)]
    rows = {row.metric: row for row in score_rows(violations, "law", "model", windows)}
    assert (rows["pairs"].value, rows["groups"].value, rows["groups"].clips) == (0.5, 1.0, 1)


def test_a_secret_split_is_answered(films: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("filename\n" + "".join(f"film{n}\n" for n in range(2)))
    for number, path in enumerate(sorted((films / "possible").glob("*.mp4"))[:2]):
        (tmp_path / f"film{number}.mp4").write_bytes(path.read_bytes())
    run_evaluation("surprise", trained, tmp_path, {**SETTINGS, "frame_step": 2}, out=tmp_path / "held.json")
    answers = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    assert sorted(answer["model_answer"] for answer in answers) == [0, 1]
    assert [answer["row_id"] for answer in answers] == ["film0", "film1"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clip_frames": 5}, "multiple of the model's tubelet"),
        ({"context_frames": (3,)}, "must be multiples of 2 below"),
        ({"frame_step": 40}, "give a smaller --frame-step"),
    ],
)
def test_windows_that_do_not_fit_are_named(settings: dict[str, object], said: str, films: Path, trained: Path) -> None:
    with pytest.raises(BadInput, match=said):
        run_evaluation("surprise", trained, films, {**SETTINGS, **settings})


def test_a_model_without_a_predictor_expects_nothing(films: Path, make_trained: object, tmp_path: Path) -> None:
    model = make_trained(tmp_path / "run", _without_predictor=True)  # pyright: ignore[reportCallIssue]
    with pytest.raises(BadInput, match="no masked predictor, and so no expectation"):
        run_evaluation("surprise", model, films, SETTINGS)


def test_without_cv2_the_other_baselines_remain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "flow" in pixel_baselines()
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert list(pixel_baselines()) == ["copy pixels", "extrapolate pixels", "frame difference"]
    assert "install the extra physics" in caplog.text


@pytest.mark.parametrize("option", ["split", "max_videos", "short"])
def test_options_of_corpora_are_refused(option: str, films: Path, trained: Path) -> None:
    with pytest.raises(BadInput, match=f"invalid setting {option}"):
        run_evaluation("surprise", trained, films, {option: "1"})
