"""The probe finds what features hold, shows what they must beat, and says what is wrong with its input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vjepa.evals import linear as probe_module
from vjepa.evals.features import ReadClips
from vjepa.evals.linear import probe
from vjepa.evals.object_labels import TokenLabels
from vjepa.evals.results import table
from vjepa_data.settings import BadInput


@pytest.fixture(scope="module")
def result(trained: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("probe") / "probe.json"
    found = probe(trained, scenes, out=out, random_seeds=2)
    assert json.loads(out.read_text()) == found
    return found


def value(result: dict, task: str, features: str) -> float:
    return next(row["value"] for row in result["rows"] if (row["task"], row["features"]) == (task, features))


def test_every_task_has_the_encoder_and_all_it_must_beat(result: dict) -> None:
    tasks = {row["task"] for row in result["rows"]}
    tokens = {"token shape", "token centre", "token velocity", "token direction"}
    assert tasks == {"shape", "speed", "clip velocity", *tokens}
    for task in tasks:
        rows = [row for row in result["rows"] if row["task"] == task]
        assert [row["features"] for row in rows] == ["pretrained", "random init", "pixels", "prior"]
        assert len(rows[1]["seeds"]) == 2
        assert all(row["low"] <= row["value"] <= row["high"] for row in rows if row["features"] != "random init")
    assert value(result, "token centre", "prior") == pytest.approx(0, abs=1e-9)


def test_the_videos_to_fit_and_to_report_are_apart(trained: Path, scenes: Path, monkeypatch) -> None:
    pairs = []
    honest = probe_module.ridge_score

    def spy(train, test, kind, *, seed):
        pairs.append((set(train.clip.tolist()), set(test.clip.tolist())))
        return honest(train, test, kind, seed=seed)

    monkeypatch.setattr(probe_module, "ridge_score", spy)
    probe(trained, scenes, random_seeds=0)
    assert pairs
    for fit, report in pairs:
        assert not fit & report
        assert (len(fit), len(report)) == (16, 8)


def test_an_encoder_that_knows_is_found_out(trained: Path, scenes: Path, monkeypatch) -> None:
    """Features in which each token carries the mean colour and place of what is bright: a probe must read them."""

    class Knows:
        def __call__(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            bright = (frames.float().mean((1, 4)) > 75).float()  # [B H W]
            places = (torch.arange(32) + 0.5) / 32
            mass = bright.sum((1, 2))
            centre = torch.stack([(bright * places).sum((1, 2)), (bright * places[:, None]).sum((1, 2))], -1)
            centre = centre / mass[:, None]  # [B 2]
            rows = (torch.arange(4) + 0.5) / 4
            here = torch.stack(torch.meshgrid(rows, rows, indexing="xy"), -1)  # [h w 2]
            tokens = (centre[:, None, None] - here)[:, None].repeat(1, 2, 1, 1, 1)
            return tokens, centre

    monkeypatch.setattr(probe_module, "EncoderReader", lambda encoder: Knows())
    found = probe(trained, scenes, labels=["token centre"], random_seeds=0)
    assert value(found, "token centre", "pretrained") > 0.8


def test_motion_is_read_from_a_clip_where_places_are_kept_in_time(trained: Path, scenes: Path, monkeypatch) -> None:
    class Follows:
        def __init__(self, frames: int) -> None:
            self.frames = frames

        def __call__(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            bright = (frames[:, : self.frames].float().mean(-1) > 75).float()  # [B T H W]
            places = (torch.arange(32) + 0.5) / 32
            along = torch.stack([(bright * places).sum((2, 3)), (bright * places[:, None]).sum((2, 3))], -1)
            along = (along / bright.sum((2, 3))[..., None]).flatten(1)  # [B 2T]
            return torch.zeros(len(frames), 2, 4, 4, 1), along

    found = {}
    for frames in (1, 4):
        monkeypatch.setattr(probe_module, "EncoderReader", lambda encoder, frames=frames: Follows(frames))
        found[frames] = value(
            probe(trained, scenes, labels=["clip velocity"], random_seeds=0), "clip velocity", "pretrained"
        )
    assert found[4] > 0.8 > 0.5 > found[1]


def test_the_result_is_the_same_twice(result: dict, trained: Path, scenes: Path) -> None:
    assert probe(trained, scenes, random_seeds=2)["rows"] == result["rows"]


def test_another_split_can_be_fitted_on(trained: Path, scenes: Path) -> None:
    found = probe(trained, scenes, train_split="train", labels=["shape"], random_seeds=0, max_videos=12)
    assert found["protocol"]["clips"] == {"fit": 36, "report": 36}
    assert {row["task"] for row in found["rows"]} == {"shape"}


def test_nothing_is_reported_on_what_was_fitted(trained: Path, scenes: Path) -> None:
    one, other = (probe(trained, scenes, train_split=name, labels=["shape"], random_seeds=0) for name in (None, "val"))
    assert one == other
    assert one["protocol"]["fit"] == "two thirds of the videos of val"


def test_the_table_has_a_line_for_each_task(result: dict) -> None:
    lines = table(result).splitlines()
    assert lines[0].split() == ["probe", "pretrained", "random", "init", "pixels", "prior"]
    assert len(lines) == 8
    assert "(2 seeds)" in lines[1]


def test_bad_input_is_named_in_one_line(trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text("{}")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"labels": ["colour"]}, "no label 'colour'; it has shape, speed, clip velocity, token shape"),
        ({"split": "test"}, "no split 'test'"),
        ({"max_videos": 5}, "has 5 videos; a probe needs 6"),
        ({"out": tmp_path / "probe.json"}, "exists already"),
    ]
    for options, message in cases:
        with pytest.raises(BadInput, match=message) as caught:
            probe(trained, scenes, random_seeds=0, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no such model"):
        probe(tmp_path / "nothing", scenes)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        probe(trained, tmp_path)
    assert (tmp_path / "probe.json").read_text() == "{}"


def test_a_class_never_fitted_is_named(trained: Path, scenes: Path, monkeypatch) -> None:
    honest = probe_module.read_features

    def strange(readers, clips, model):
        seen = honest(readers, clips, model)
        if clips.index.split == "val":
            return replace(seen, scalars=({"shape": "cube"}, *seen.scalars[1:]))
        return seen

    monkeypatch.setattr(probe_module, "read_features", strange)
    with pytest.raises(BadInput, match="'cube' to report on, which is not among those to fit on"):
        probe(trained, scenes, train_split="train", labels=["shape"], random_seeds=0)


def test_labels_are_told_apart_by_their_values() -> None:
    scalars = tuple({"word": w, "count": i % 3, "speed": i / 7, "same": 1} for i, w in enumerate("abab" * 5))
    rows = np.arange(len(scalars))
    keys = tuple(map(str, rows))
    side = (ReadClips(keys, rows, scalars, np.zeros((len(rows), 2)), TokenLabels.none(), {}), rows)
    kinds = {name: probe_module._kind(side, name) for name in ("word", "count", "speed", "same")}
    assert kinds == {"word": "class", "count": "class", "speed": "number", "same": None}
