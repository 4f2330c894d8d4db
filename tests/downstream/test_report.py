"""The page of a run shows its record in a single file and names missing parts."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vjepa.checkpoints.checkpoint import resolve
from vjepa.evals.shell import run_evaluation
from vjepa.export.export import export
from vjepa.report.build import report
from vjepa.report.run import read_lines
from vjepa.report.training_clips import training_clips
from vjepa.viz import plots
from vjepa.viz.plots import Curve
from vjepa.weights.load import read_weights
from vjepa_data.settings import BadInput

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def story(make_trained, scenes: Path, tmp_path: Path) -> Path:
    """A run folder with everything that a page can show."""
    folder = make_trained(tmp_path / "run")
    settings = json.loads((resolve(folder) / "state.json").read_text())["settings"]
    settings["loader"]["decoder"] = "pyav"
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        {"step": step, "loss/prediction": 0.8 - step / 200, "loss/explained": step / 100, "optim/grad_norm": 1.0}
        for step in range(1, 41)
    ]
    lines[9]["loss/prediction"] = None
    lines[39] |= {"monitor/rankme": 17.25, "speed/clips_per_s": 1234.0, "data/source_0_share": 1.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempts = [{"step": step, "time": "now", "host": "h<1>", "world": 1, "code": {}} for step in (0, 20)]
    (folder / "environment.json").write_text(json.dumps({"attempts": attempts}))
    reject = {"source": 0, "reason": "timeout", "key": "x"}
    (folder / "rejected.jsonl").write_text(json.dumps(reject) + "\n")
    return folder


def test_the_page_shows_everything_in_one_file(story: Path, scenes: Path) -> None:
    run_evaluation("probe", story, scenes, {"random_seeds": 1}, out=story / "probe.json")
    page = report(story).read_text()
    assert len(page) < 5e6
    for words in ("Learning", "Training clips", "Features", "Evaluations", "Data", "The run"):
        assert words in page
    assert page.count("<figure>") == 6
    assert "17.2" in page
    assert "1,234" in page
    assert "timeout: 1" in page
    assert "token centre" in page
    assert "h&lt;1&gt;" in page
    assert "optim.lr = 0.001" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page


def test_a_run_on_still_images_has_a_page(story: Path) -> None:
    """Clips of one frame are repeated to fill a tubelet of two, so the page shows them with their masks."""
    settings = yaml.safe_load((story / "config.yaml").read_text())
    settings["data"]["clip"]["frames"] = 1
    settings["masks"] = [{"mode": "balanced", "blocks": 2, "block_share": 0.2}]
    (story / "config.yaml").write_text(yaml.safe_dump(settings))
    page = report(story).read_text()
    assert "balanced) shows" in page
    assert "mask 0" in page


def test_metrics_of_any_method_are_plotted(story: Path) -> None:
    """Names come from metrics.jsonl. Names that differ in a number at the end share a plot."""
    names = ("loss/koleo", "loss/view_0", "loss/view_1", "monitor/entropy", "optim/temperature")
    lines = [{"step": step, **dict.fromkeys(names, step / 3)} for step in range(1, 5)]
    (story / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(story).read_text()
    learning = page[page.index("Learning") : page.index("Training clips")]
    assert learning.count("<svg") == 4
    for title in ("loss/koleo", "loss/view", "monitor/entropy", "optim/temperature"):
        assert title in learning


def test_the_same_run_gives_the_same_page(story: Path) -> None:
    first = report(story).read_text()
    assert report(story).read_text() == first


def test_the_page_names_missing_parts(story: Path) -> None:
    settings = yaml.safe_load((story / "config.yaml").read_text())
    settings["data"]["sources"][0]["shards"] = str(story / "gone")
    (story / "config.yaml").write_text(yaml.safe_dump(settings))
    (story / "metrics.jsonl").unlink()
    page = report(story).read_text()
    assert "Nothing is recorded yet" in page
    assert "The clips cannot be shown" in page
    assert "Features cannot be shown" in page
    assert "No results yet" in page


def test_bad_input_is_named(story: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a run"):
        report(tmp_path)
    mine = tmp_path / "page.html"
    mine.write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        report(story, mine)
    assert mine.read_text() == "mine"
    (story / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(BadInput, match="line 2 is not JSON"):
        report(story)
    assert not list(story.glob(".report*"))


def test_a_model_has_a_page(trained: Path, scenes: Path, tmp_path: Path) -> None:
    settings = {"label": "shape", "baselines": True}
    run_evaluation("knn", trained, scenes, settings, out=tmp_path / "knn.json")
    export(trained, tmp_path / "model", format="native")
    path = report(tmp_path / "model", clips=[scenes], results=[tmp_path / "knn.json"])
    page = path.read_text()
    assert path == tmp_path / "model" / "report.html"
    for words in ("40 steps in run <code>tiny</code>", "Nearest neighbours", "pixels", "c0ffee", "scene-00"):
        assert words in page, words
    assert page.count("<figure>") == 3
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    bare = report(tmp_path / "model", tmp_path / "bare.html").read_text()
    assert "Give videos with --clips" in bare
    with pytest.raises(BadInput, match="with --out"):
        report(resolve(trained))
    with pytest.raises(BadInput, match="is not an evaluation result"):
        report(tmp_path / "model", results=[tmp_path / "model" / "model.json"])


def test_a_corpus_has_a_page(scenes: Path, tmp_path: Path) -> None:
    page = report(scenes, tmp_path / "page.html").read_text()
    assert "40 clips, 4 frames of each" in page
    assert len(page) < 5e6
    with pytest.raises(BadInput, match="is not a model"):
        report(scenes, tmp_path / "other.html", clips=[scenes])


def test_attempts_are_shown_over_time(story: Path) -> None:
    began = 1_790_000_000
    attempts = [
        {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began + 60 * step)), "code": {}}
        for step in (0, 20)
    ]
    (story / "environment.json").write_text(json.dumps({"attempts": attempts}))
    lines = [{"step": step, "time": began + 60 * step + 30} for step in range(1, 41)]
    (story / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(story).read_text()
    assert "Steps over time" in page
    assert "minutes since the start of the first attempt" in page
    assert "attempt 2" in page


def test_an_incomplete_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert list(read_lines(tmp_path / "m.jsonl")) == [{"step": 1}]
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_training_clips_are_those_of_the_stream(story: Path) -> None:
    run = read_weights(story)
    from vjepa import config
    from vjepa_data.reader.loader import ClipLoader
    from vjepa_data.settings import Loader

    settings = config.load(story / "config.yaml").settings
    shown = training_clips(settings, step=3)
    with ClipLoader(
        settings.data, Loader(workers=0, decoder="pyav"), seed=settings.seed, batch_size=settings.batch_size, step=3
    ) as whole:
        batch = next(whole)
    by_slot = {slot: batch.groups[0].frames[row] for row, slot in enumerate(batch.groups[0].slots)}
    for clips in shown:
        for row, slot in enumerate(clips.slots):
            assert torch.equal(clips.frames[row], by_slot[slot])
    assert run.frames == shown[0].frames.shape[1]


def test_masks_cover_hidden_tokens() -> None:
    frames = np.full((4, 16, 16, 3), 200, np.uint8)
    visible = np.zeros((2, 2, 2), bool)
    visible[:, 0, 0] = True
    hidden = np.zeros_like(visible)
    hidden[:, 1, 1] = True
    drawn = plots.draw_masks(frames, visible, hidden)
    assert (drawn[:, :8, :8] == 200).all()
    red, green, blue = drawn[0, 12, 12].tolist()
    assert red > green > blue
    grey = drawn[0, 12, 2]
    assert grey.min() == grey.max() != 200


def test_feature_colours_are_the_main_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    strength = torch.tensor([9.0, 3.0, 1.0, 0.1, 0.1])
    tokens = torch.randn(2, 3, 4, 4, 5, generator=draw) * strength
    colours = plots.feature_colours(tokens)
    assert colours.shape == (2, 3, 4, 4, 3)
    for channel in range(3):
        a, b = tokens[..., channel].flatten().numpy(), colours[..., channel].flatten().astype(float)
        assert abs(np.corrcoef(a, b)[0, 1]) > 0.9
    assert np.array_equal(colours, plots.feature_colours(tokens + 100))


def test_a_plot_draws_finite_values_reproducibly() -> None:
    curve = Curve("a", np.arange(100.0), np.where(np.arange(100) == 5, np.nan, np.arange(100.0)))
    one, other = (plots.plot([curve], title="t", marks=[50]) for _ in range(2))
    assert one == other
    assert one.startswith("<svg")
    smooth = plots.running_mean(np.array([1.0, np.nan, 3.0]), 3)
    assert smooth.tolist() == [1.0, 2.0, 3.0]


def test_a_strip_runs_from_left_to_right() -> None:
    frames = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20)])
    assert plots.strip(frames, gap=2).shape == (4, 14, 3)
    assert plots.strip(frames, gap=0, height=8)[0, :, 0].tolist() == [10] * 12 + [20] * 12
