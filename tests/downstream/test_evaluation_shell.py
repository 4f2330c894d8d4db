"""The evaluation shell runs evaluations of any module, shows progress, and needs no torch to list them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa.cli.evals import make_options
from vjepa.evals.registry import EVALUATIONS, EvaluationEntry
from vjepa.evals.results import find_results
from vjepa.evals.shell import run_evaluation, settings_class
from vjepa.report.build import report
from vjepa_data.settings import BadInput

CUSTOM = '''
"""An evaluation from outside of the package, in one file."""

from pydantic import Field

from vjepa.evals.base import Baselines, EvaluationSettings, Result, ScoreRow
from vjepa.evals.features import clips_for, read_features


class SpreadSettings(EvaluationSettings):
    clips_per_video: int = Field(default=1, ge=1)
    """Clips of each video."""

    def wanted_baselines(self):
        return Baselines(untrained_seeds=(self.seed, self.seed + 1), pixels=True)


def evaluate(model, data, settings, context):
    clips = clips_for(model, data, split=settings.split, per_video=settings.clips_per_video)
    read = read_features(context.encoders(model), data, clips, context, pooling="clip", tokens=False)
    spread = {name: found.pooled.std(0).mean().item() for name, found in read.features.items()}
    rows = [ScoreRow("spread", "std", name, value, value, value, clips.videos) for name, value in spread.items()]
    return Result({"split": settings.split}, rows)
'''


@pytest.fixture
def spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An evaluation that a file and a registry line have added."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "spread_evaluation.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setitem(
        EVALUATIONS, "spread", EvaluationEntry("spread_evaluation", "SpreadSettings", "spread", "Spread")
    )
    return "spread"


def test_an_evaluation_is_one_file_and_one_line(spread: str, trained: Path, scenes: Path, tmp_path: Path) -> None:
    """It gets baselines and a cache, and its result is found by the report and by pages of models."""
    out = tmp_path / "results" / "spread.json"
    result = run_evaluation(spread, trained, scenes, {"clips_per_video": 2}, out=out)
    assert result.columns == ["pretrained", "random init 0", "random init 1", "pixels"]
    assert json.loads(out.read_text())["kind"] == "spread"
    assert find_results(out.parent)[0] == result
    assert list((out.parent / ".vjepa-features").iterdir())
    assert "Clips of each video." in str(make_options(settings_class(spread)))


def test_a_result_of_an_unknown_evaluation_is_reported(make_trained, tmp_path: Path) -> None:
    folder = make_trained(tmp_path / "run")
    rows = [{"task": "a<b", "metric": "m", "features": "pretrained", "value": 0.5, "low": 0, "high": 1, "clips": 3}]
    (folder / "other.json").write_text(json.dumps({"kind": "other", "protocol": {"by": "us"}, "rows": rows}))
    state = json.loads(next(folder.glob("checkpoints/*/state.json")).read_text())
    (folder / "config.yaml").write_text(json.dumps(state["settings"]))
    page = report(folder).read_text()
    assert "a&lt;b" in page
    assert "by: us" in page


def test_the_registry_needs_no_torch() -> None:
    code = "import sys, vjepa.evals.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_invalid_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"kind": "probe", "protocol": {}, "rows": [{"task": "shape"}]}')
    with pytest.raises(BadInput, match="invalid evaluation result: 'metric' is missing"):
        find_results(tmp_path)
