"""Linear probes find the information in features, stand next to their baselines, and name bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vjepa.evals import features as features_module
from vjepa.evals import linear
from vjepa.evals.base import EvaluationContext, Result
from vjepa.evals.features import LabelledClips, PixelEncoder
from vjepa.evals.linear import ProbeSettings
from vjepa.evals.object_labels import TokenLabels
from vjepa.evals.results import format_table, read_result
from vjepa.evals.shell import run_evaluation
from vjepa.weights.load import load
from vjepa.weights.video_encoder import VideoEncoder
from vjepa_data.settings import BadInput


def probe(model: Path, shards: Path, *, out: Path | None = None, **settings: Any) -> Result:
    return run_evaluation("probe", model, shards, {"random_seeds": 0, **settings}, out=out)


@pytest.fixture(scope="module")
def written(trained: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("probe") / "probe.json"
    return probe(trained, scenes, out=out, random_seeds=2), out


def test_the_file_holds_the_result(written: tuple[Result, Path]) -> None:
    result, out = written
    assert json.loads(out.read_text()) == result.to_json()
    assert read_result(out).to_json() == result.to_json()
    assert (result.kind, result.model["step"]) == ("probe", 40)


def test_every_task_has_all_baselines(written: tuple[Result, Path]) -> None:
    result, _ = written
    tokens = {"token shape", "token centre", "token velocity", "token direction"}
    assert {row.task for row in result.rows} == {"shape", "speed", "clip velocity", *tokens}
    assert result.columns == ["pretrained", "random init", "pixels", "prior"]
    for cells in result.tasks.values():
        assert list(cells) == result.columns
        assert len(cells["random init"].extra["seeds"]) == 2
        assert all(row.low <= row.value <= row.high for name, row in cells.items() if name != "random init")
    assert result.value("token centre", "prior") == pytest.approx(0, abs=1e-9)


def test_the_videos_to_fit_and_to_report_are_apart(trained: Path, scenes: Path, monkeypatch) -> None:
    pairs = []
    honest = linear.ridge_score

    def spy(train, test, kind, *, seed):
        pairs.append((set(train.clip.tolist()), set(test.clip.tolist())))
        return honest(train, test, kind, seed=seed)

    monkeypatch.setattr(linear, "ridge_score", spy)
    probe(trained, scenes)
    assert pairs
    for fit, report in pairs:
        assert not fit & report
        assert (len(fit), len(report)) == (16, 8)


class Tracker(PixelEncoder):
    """An encoder that gives the position of bright pixels, relative to each token, at each time."""

    def __init__(self, like: VideoEncoder, *, frames: int) -> None:
        super().__init__(like)
        self.moving = frames
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        bright = (frames.float().mean(-1) > 75).float()  # [B T H W]
        bright[:, self.moving :] = bright[:, :1]
        position = (torch.arange(32) + 0.5) / 32
        centre = torch.stack([(bright * position).sum((2, 3)), (bright * position[:, None]).sum((2, 3))], -1)
        centre = (centre / bright.sum((2, 3))[..., None]).unflatten(1, (2, 2)).flatten(2)  # [B t 2x2]
        cells = (torch.arange(4) + 0.5) / 4
        here = torch.stack(torch.meshgrid(cells, cells, indexing="xy"), -1).repeat(1, 1, 2)  # [h w 2x2]
        return centre[:, :, None, None] - here


def track_objects(
    trained: Path, scenes: Path, context: EvaluationContext, label: str, monkeypatch: pytest.MonkeyPatch, frames: int
) -> float:
    model = load(trained)
    tracker = Tracker(model.encoder, frames=frames)
    monkeypatch.setattr(Tracker, "shrink", lambda self, frames: self(frames).mean((2, 3)).flatten(1))
    honest = features_module.fingerprint
    monkeypatch.setattr(features_module, "fingerprint", lambda encoder: f"{honest(encoder)} {frames}")
    monkeypatch.setattr(type(context), "encoders", lambda self, model: {"pretrained": tracker, "pixels": tracker})
    settings = ProbeSettings(labels=(label,), random_seeds=0)
    return linear.evaluate(model, scenes, settings, context).value(label, "pretrained")


def test_a_token_task_reads_tokens(trained: Path, scenes: Path, context, monkeypatch) -> None:
    assert track_objects(trained, scenes, context, "token centre", monkeypatch, frames=4) > 0.8


@pytest.mark.parametrize(("frames", "low", "high"), [(4, 0.8, 1), (1, -10, 0.5)])
def test_motion_is_read_only_where_positions_are_kept_in_time(
    trained: Path, scenes: Path, context, monkeypatch, frames: int, low: float, high: float
) -> None:
    assert low < track_objects(trained, scenes, context, "clip velocity", monkeypatch, frames=frames) <= high


def test_a_second_call_gives_the_same_scores(written: tuple[Result, Path], trained: Path, scenes: Path) -> None:
    assert probe(trained, scenes, random_seeds=2).rows == written[0].rows


def test_cached_features_are_used_again(
    written: tuple[Result, Path], trained: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "encode", None)
    result, out = written
    again = run_evaluation("probe", trained, scenes, ProbeSettings(random_seeds=2), out=out, overwrite=True)
    assert again.to_json() == result.to_json()


def test_an_interrupted_evaluation_continues(
    trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that were written before the interruption are not encoded again, and the result is the same."""
    monkeypatch.setattr("vjepa.evals.parts.PART_VIDEOS", 8)
    honest, keys = features_module._encode_batch, []

    def stop_at_seventh(encoders, batch, pooling, *, tokens):
        keys.extend(clip.key for clip in batch)
        if len(keys) == 7 * 8:
            raise KeyboardInterrupt
        return honest(encoders, batch, pooling, tokens=tokens)

    monkeypatch.setattr(features_module, "_encode_batch", stop_at_seventh)
    out = tmp_path / "probe.json"
    with pytest.raises(KeyboardInterrupt):
        probe(trained, scenes, out=out)
    assert not out.exists()
    first, keys[:] = set(keys[:48]), []
    resumed = probe(trained, scenes, out=out)
    assert not first & set(keys)
    monkeypatch.undo()
    assert resumed.rows == probe(trained, scenes).rows


def test_another_split_can_be_fitted_on(trained: Path, scenes: Path) -> None:
    found = probe(trained, scenes, train_split="train", labels=["shape"], max_videos=12)
    assert found.protocol["clips"] == {"fit": 36, "report": 36}
    assert {row.task for row in found.rows} == {"shape"}


def test_the_reported_split_is_cut_if_it_is_named_twice(trained: Path, scenes: Path) -> None:
    one, other = (probe(trained, scenes, train_split=name, labels=["shape"]) for name in (None, "val"))
    assert one == other
    assert one.protocol["fit"] == "two thirds of the videos of val"


def test_the_table_has_a_line_for_each_task(written: tuple[Result, Path]) -> None:
    lines = format_table(written[0]).splitlines()
    assert lines[0].split() == ["probe", "pretrained", "random", "init", "pixels", "prior"]
    assert len(lines) == 8
    assert "(2 seeds)" in lines[1]


def test_bad_input_is_named_in_one_line(trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text("{}")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"labels": ["colour"]},
            "no label 'colour' with words or numbers; use shape, speed, clip velocity, token shape",
        ),
        ({"split": "test"}, "no split 'test'"),
        ({"max_videos": 5}, "has 5 videos; a probe needs at least 6"),
        ({"out": tmp_path / "probe.json"}, "exists already"),
        ({"clips_per_video": 0}, r"invalid setting clips_per_video \(0\)"),
        ({"lables": ["shape"]}, "invalid setting lables"),
    ]
    for options, message in cases:
        with pytest.raises(BadInput, match=message) as caught:
            probe(trained, scenes, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no such model"):
        probe(tmp_path / "nothing", scenes)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        probe(trained, tmp_path)
    with pytest.raises(BadInput, match="unknown evaluation 'prob'; did you mean 'probe'"):
        run_evaluation("prob", trained, scenes, {})
    assert (tmp_path / "probe.json").read_text() == "{}"


def test_a_class_that_was_never_fitted_is_named(trained: Path, scenes: Path, monkeypatch) -> None:
    honest = features_module._encode_batch

    def strange(encoders, batch, pooling, *, tokens):
        read = honest(encoders, batch, pooling, tokens=tokens)
        return replace(read, scalars=({"shape": "cube"}, *read.scalars[1:])) if read.keys[0] > "scene-0015" else read

    monkeypatch.setattr(features_module, "_encode_batch", strange)
    with pytest.raises(BadInput, match="has class 'cube' only in the videos to report on"):
        probe(trained, scenes, train_split="train", labels=["shape"])


def test_labels_are_told_apart_by_their_values() -> None:
    scalars = tuple({"word": w, "count": i % 3, "speed": i / 7, "same": 1} for i, w in enumerate("abab" * 5))
    rows = np.arange(len(scalars))
    clips = LabelledClips(tuple(map(str, rows)), rows, scalars, np.zeros((len(rows), 2)), TokenLabels.none(), {})
    subset = linear.ClipSubset(clips, rows)
    kinds = {name: linear._kind(subset, subset, name) for name in ("word", "count", "speed", "same")}
    assert kinds == {"word": "class", "count": "class", "speed": "number", "same": kinds["same"]}
    assert "all videos to fit on have the same value" in kinds["same"]
