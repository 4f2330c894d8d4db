"""Dense probes read maps from tokens, stand beside their baselines and name bad input; generated maps are exact."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vjepa.evals.base import EvaluationContext, Result
from vjepa.evals.dense import data, evaluation
from vjepa.evals.dense.data import MappedClip, read_map
from vjepa.evals.dense.evaluation import DenseSettings, cells_of, evaluate, tokens_of
from vjepa.evals.dense.scores import SUMS, score_rows
from vjepa.evals.shell import run_evaluation
from vjepa.weights.load import load
from vjepa_data.builder.shard import shard
from vjepa_data.settings import BadInput
from vjepa_data.spec import Spec
from vjepa_data.synthetic.maps import CLASSES
from vjepa_data.synthetic.physics import write_corpus

SETTINGS: dict[str, Any] = {"random_seeds": 1, "tokens_per_clip": 16}
PX = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 12 generated scenes of 16 frames."""
    folder = tmp_path_factory.mktemp("dense")
    write_corpus(folder / "videos", videos=12, seed=3, px=48, seconds=16 / 12)
    spec = Spec.model_validate({"encode": {"short_side_px": 48}, "split": {"val_share": 0.5}})
    shard([str(folder / "videos")], folder / "shards", spec=spec, workers=1)
    return folder / "shards"


@pytest.fixture(scope="module")
def results(corpus: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of two kinds of maps."""
    folder = tmp_path_factory.mktemp("result")
    kinds = {"objects": "four", "flow": "last"}
    return {
        kind: run_evaluation(
            "dense", trained, corpus, {**SETTINGS, "map": kind, "levels": levels}, out=folder / f"{kind}.json"
        )
        for kind, levels in kinds.items()
    }


def test_every_map_stands_beside_its_baselines(results: dict[str, Result]) -> None:
    metrics = {kind: [metric for _, metric in result.tasks] for kind, result in results.items()}
    assert metrics == {
        "objects": ["mIoU"],
        "flow": ["end-point error", "end-point error, moving"],
    }
    for result in results.values():
        assert result.columns == ["pretrained", "random init", "pixels", "prior", "ceiling"]
        assert all(row.low <= row.value <= row.high for row in result.rows)
    assert results["objects"].value("objects", "ceiling") > results["objects"].value("objects", "prior") + 0.1
    assert results["objects"].details["iou"]["ceiling"].keys() <= set(CLASSES)


def test_a_repeated_probe_reads_what_was_measured(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "map": "depth", "max_videos": 3}
    first = run_evaluation("dense", trained, corpus, settings, out=tmp_path / "a.json")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<figure>") == 3
    assert "ceiling" in page
    assert first.columns == ["pretrained", "random init", "pixels", "prior", "ceiling"]
    assert first.value("depth", "ceiling") < first.value("depth", "prior")
    monkeypatch.setattr(evaluation, "_clips", lambda *_: iter(()))
    again = run_evaluation("dense", trained, corpus, settings, out=tmp_path / "b.json")
    assert [row.to_json() for row in again.rows] == [row.to_json() for row in first.rows]


def test_features_that_hold_the_map_reach_the_ceiling(
    corpus: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, context: EvaluationContext
) -> None:
    """The encoder is replaced by the true cells."""
    model, settings = load(trained), DenseSettings.model_validate({**SETTINGS, "map": "depth", "random_seeds": 0})
    cells: dict[bytes, torch.Tensor] = {}
    honest = data.CorpusMaps._with_maps

    def remember(self: Any, video: int, clip: Any) -> MappedClip:
        found = honest(self, video, clip)
        cells[found.frames.numpy().tobytes()] = cells_of(found, (2, 4, 4), "depth", 0, 4)
        return found

    monkeypatch.setattr(data.CorpusMaps, "_with_maps", remember)
    monkeypatch.setattr(evaluation, "tokens_of", lambda _, frames, __: cells[frames[0].numpy().tobytes()][None])
    result = evaluate(model, corpus, settings, context)
    assert result.value("depth", "pretrained") == pytest.approx(result.value("depth", "ceiling"), abs=1e-3)


def test_four_levels_are_those_of_the_model_or_of_its_blocks(trained: Path, make_trained: Any, tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (2, 4, PX, PX, 3), dtype=torch.uint8)
    plain, levels = load(trained).encoder, load(make_trained(tmp_path / "levels", levels=[0, 1])).encoder
    assert tokens_of(plain, frames, "four").shape == tokens_of(levels, frames, "four").shape == (2, 2, 4, 4, 96)
    assert torch.equal(tokens_of(levels, frames, "four").flatten(1, 3), levels.features(frames, levels=True))


# ---- tables


def write_table(folder: Path, kind: str, rows: int = 8, **columns: str) -> Path:
    """Write pictures of a bright square, and maps of it: as PNG, or flow as NPY."""
    draw = np.random.default_rng(0)
    lines = []
    for number in range(rows):
        x, y = draw.integers(0, 40, 2)
        picture, inside = np.full((48, 64, 3), 40, np.uint8), np.zeros((48, 64), np.uint8)
        inside[y % 24 : y % 24 + 20, x : x + 20] = 1
        picture[inside > 0] = 220
        Image.fromarray(picture).save(folder / f"{number}.png")
        if kind == "flow":
            np.save(folder / f"{number}_map.npy", np.stack((inside * 6.4, inside * 0.0), -1))
        else:
            Image.fromarray(inside + (kind == "depth")).save(folder / f"{number}_map.png")
        suffix = "npy" if kind == "flow" else "png"
        row = {"image": f"{number}.png", "map": f"{number}_map.{suffix}", **columns}
        lines.append(row | ({"before": f"{number}.png"} if kind == "flow" else {}))
    with open(folder / "table.csv", "w", newline="") as text:
        writer = csv.DictWriter(text, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    return folder / "table.csv"


@pytest.mark.parametrize("kind", ["objects", "depth", "flow"])
def test_pictures_and_maps_come_from_a_table(kind: str, trained: Path, tmp_path: Path) -> None:
    result = run_evaluation("dense", trained, write_table(tmp_path, kind), {**SETTINGS, "map": kind})
    assert result.protocol["report"] == "3 of val"
    best, prior = (
        result.rows[[row.features for row in result.rows].index(name)].value for name in ("ceiling", "prior")
    )
    assert best > 0.7 if kind == "objects" else best < prior


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("image,map\n", "lacks the column 'image'"),
        ("image,label\n0.png,1\n", "lacks the column 'map'"),
        ("image,map\n0.png,none.png\n", "line 2: none.png does not exist"),
        ("image,map\n0.png,0.png\n" * 1, "has 1 rows"),
        ("image,map,split\n0.png,0.png,train\n0.png,0.png,train\n", "split 'val' of the table has 0 rows"),
    ],
)
def test_an_invalid_table_is_named(change: str, said: str, trained: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path, "objects")
    table.write_text(change)
    with pytest.raises(BadInput, match=said):
        run_evaluation("dense", trained, table, {**SETTINGS, "map": "objects"})


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (np.zeros((4, 4, 3), np.float32), "depth", r"shape \[4, 4, 3\]; a map of depth is \[H W\]"),
        (np.zeros((4, 4), np.float32), "flow", r"a map of flow is \[H W 2\]"),
        (np.full((4, 4), 1.5), "objects", "class numbers are 0 to 254"),
        (np.full((4, 4), 300), "objects", "class numbers are 0 to 254"),
    ],
)
def test_an_invalid_map_is_named(values: np.ndarray, kind: Any, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "map.npy", values)
    with pytest.raises(BadInput, match=said):
        read_map(tmp_path / "map.npy", kind)


def test_unknown_pixels_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).save(tmp_path / "a.png")
    assert np.isnan(read_map(tmp_path / "a.png", "objects")[..., 0]).tolist() == [[False, False], [False, True]]
    assert np.isnan(read_map(tmp_path / "a.png", "depth")[..., 0]).tolist() == [[True, False], [False, False]]
    flow = np.array([[[2.0, 1.0], [2e9, 2e9]]], "<f4")
    head = np.array([202021.25], "<f4").tobytes() + np.array([2, 1], "<i4").tobytes()
    (tmp_path / "a.flo").write_bytes(head + flow.tobytes())
    np.testing.assert_allclose(read_map(tmp_path / "a.flo", "flow"), [[[1.0, 1.0], [np.nan, np.nan]]])
    (tmp_path / "a.flo").write_bytes(head)
    with pytest.raises(BadInput, match=r"not a complete \.flo file"):
        read_map(tmp_path / "a.flo", "flow")


# ---- scores


def test_scores_are_those_of_the_definitions() -> None:
    """Two classes: 2 of 3 and 1 of 2 pixels; depth off by 3 and 4; two pixels, of which one moves."""
    truth = np.array([0, 0, 1, np.nan], np.float32).reshape(1, 2, 2, 1)
    told = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]].reshape(1, 2, 2, 2)
    (row,) = score_rows("objects", "x", SUMS["objects"](told, truth)[None], 0)
    assert row.value == pytest.approx((1 / 2 + 1 / 2) / 2)
    sums = SUMS["depth"](np.array([3.0, 4.0]).reshape(2, 1, 1, 1), np.zeros((2, 1, 1, 1)))
    assert score_rows("depth", "x", sums[None], 0)[0].value == pytest.approx(np.sqrt(12.5))
    flow = np.array([[0.03, 0.04], [0.0, 0.0]]).reshape(2, 1, 1, 2)
    every, moving = score_rows("flow", "x", SUMS["flow"](np.zeros_like(flow), flow)[None], 0)
    assert (every.value, moving.value) == (pytest.approx(2.5), pytest.approx(5.0))


def test_cells_are_means_of_known_pixels() -> None:
    maps = np.array([[1, 1, 3, np.nan], [1, 0, np.nan, np.nan]], np.float32).reshape(1, 2, 4, 1).repeat(2, axis=1)
    clip = MappedClip(0, 0, torch.zeros(2, 4, 4, 3, dtype=torch.uint8), maps)
    assert cells_of(clip, (1, 2, 2), "depth", 0, 1)[0, 0, :, 0].tolist() == [1.0, 3.0]
    assert cells_of(clip, (1, 1, 2), "depth", 0, 2)[0, 0, 0].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert cells_of(clip, (1, 1, 2), "objects", 4, 1)[0, 0].tolist() == [[0.25, 0.75, 0, 0], [0, 0, 0, 1]]


def test_labels_without_a_scene_are_named(scenes: Path, write_corpus: Any, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="write the videos again with `vjepa synthesize`"):
        run_evaluation("dense", trained, scenes, {**SETTINGS, "map": "depth"})
    plain = write_corpus(tmp_path / "plain", train=[{"word": "a"}] * 3, val=[{"word": "b"}] * 3)
    with pytest.raises(BadInput, match=r"do not describe a scene \(they are word\)"):
        run_evaluation("dense", trained, plain, {**SETTINGS, "map": "depth"})
    with pytest.raises(BadInput, match="split and train_split are both"):
        run_evaluation("dense", trained, scenes, {**SETTINGS, "map": "depth", "split": "train"})
