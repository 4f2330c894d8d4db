"""Traces, pictures and probes in the course of a run do not change it."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vjepa.config import Run
from vjepa.engine.signals import Stop
from vjepa.engine.trainer import train
from vjepa.monitoring.sample_pictures import draw
from vjepa.monitoring.stragglers import Stragglers
from vjepa.nn.encoder import Encoder
from vjepa_data.reader.batch import Batch, Clips
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_trace_pictures_and_probe_change_no_step(tiny_run: MakeRun, tiny_corpus: Path, tmp_path: Path) -> None:
    probe = {"shards": str(tiny_corpus), "label": "look", "split": "train", "videos": 16, "every_steps": 2}
    looks = {"profile": {"at": 3, "steps": 2}, "pictures_every_steps": 4, "probe": probe}
    assert train(tiny_run(), tmp_path / "plain") == 0
    assert train(tiny_run(track=looks), tmp_path / "looked") == 0
    plain, looked = (records(tmp_path / name) for name in ("plain", "looked"))
    assert [one["loss/prediction"] for one in plain] == [one["loss/prediction"] for one in looked]

    (trace,) = (tmp_path / "looked" / "profile").iterdir()
    assert trace.name == "step_00000003_rank_00000.json.gz"
    with gzip.open(trace, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum(name == "optimizer step" for name in names) == 2  # steps 3 and 4

    (picture,) = (tmp_path / "looked" / "pictures").iterdir()
    assert picture.name == "step_00000004.jpg"
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape[0] > 4 * 90  # the clip, two masks, features
    assert pixels.std() > 10

    scores = [(one["step"], one["probe/score"]) for one in looked if "probe/score" in one]
    assert [step for step, _ in scores] == [2, 4, 6]
    # Videos of a look are copies of each other, so that any features that tell videos apart tell looks.
    assert scores[-1][1] > looked[-1]["probe/prior"]
    assert looked[-1]["time/look_s"] > 0
    assert looked[-1]["time/prepare_s"] > 0


class OnGPU(torch.Tensor):
    """Frames that pretend to be on a GPU: numpy cannot read them there."""

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    to = cpu


def test_a_picture_is_drawn_of_frames_that_are_on_the_device(tiny_run: MakeRun) -> None:
    run = tiny_run()
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    drawn = []
    for given in (frames, frames.as_subclass(OnGPU)):
        clips = Clips(given, slots=(0, 1), keys=("a", "b"), sources=(0, 0), start_s=(0.0, 0.0))
        batch = Batch(step=0, groups=(clips,), rejected=())
        drawn.append(draw(Encoder(run.model), batch, run, torch.device("cpu")))
    assert (drawn[0] == drawn[1]).all()


def test_a_run_that_stops_between_two_records_lacks_no_line(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(steps=4, track={"every_steps": 4}, checkpoint={"every_steps": 100})
    calls = iter(range(9))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self: next(calls) == 3)
        assert train(run, tmp_path) == 75
    assert [one["step"] for one in records(tmp_path)] == [1, 2, 3]
    assert train(run, tmp_path) == 0
    assert [one["step"] for one in records(tmp_path)] == [1, 2, 3, 4]


def test_a_probe_of_a_missing_label_is_an_error(tiny_run: MakeRun, tiny_corpus: Path, tmp_path: Path) -> None:
    probe = {"shards": str(tiny_corpus), "label": "smell", "split": "train"}
    with pytest.raises(BadInput, match=r"track\.probe: 0 of the videos .* have the label 'smell'"):
        train(tiny_run(track={"probe": probe}), tmp_path)


def test_a_rank_that_is_late_three_times_in_a_row_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Stragglers(1.5)
    hosts = ["a", "b", "c", "d"]
    for times in ([1, 1, 1, 9], [1, 1, 9, 1], [1, 1, 9, 1], [1, 1, 1, 1]):
        watch.see("waiting", times, hosts, at_least_s=0.5)
    assert caplog.text == ""
    for _ in range(5):
        watch.see("waiting", [1, 1, 9, 1], hosts, at_least_s=0.5)
        watch.see("a product", [1e-3, 1e-3, 1e-3, 9e-3], hosts, at_least_s=0.5)  # too little to matter
    assert caplog.text.count("rank 2 on c is slow at waiting: 9 s where the median rank takes 1 s") == 1
    assert "rank 3" not in caplog.text
