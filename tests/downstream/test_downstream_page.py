"""All commands and programs of docs/downstream.md run in the order of the page, on a small run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from checkpoints import load_weights

from vjepa.checkpoints.checkpoint import resolve
from vjepa.cli import main
from vjepa.evals import registry

PAGE = Path(__file__).parents[2] / "docs" / "downstream.md"

pytestmark = [pytest.mark.filterwarnings("ignore:torch.distributed is disabled"), pytest.mark.timeout(900)]


@pytest.fixture
def workplace(
    trained: Path,
    scenes: Path,
    write_scene: Callable[[Path, int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with everything that the page mentions: a run, a corpus, videos, a released file."""
    run = tmp_path / "runs" / "X"
    shutil.copytree(trained, run)
    settings = json.loads((resolve(run) / "state.json").read_text())["settings"]
    settings["loader"]["decoder"] = "pyav"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "shards").symlink_to(scenes)
    for name in ("videos/a.mp4", "videos/b.mp4", "more.mp4"):
        write_scene(tmp_path / name, len(name))
    (tmp_path / "videos" / "broken.mkv").write_bytes(b"no video")
    content = {"encoder": load_weights(run, "encoder"), "target_encoder": load_weights(run, "target")}
    torch.save(content, tmp_path / "vitl.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str]) -> int:
    """Run a command in this process, or in its own if it traces the model: checked signatures cannot be traced."""
    if "pt2" not in words:
        return main(words)
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "vjepa", *words], check=False).returncode


def test_the_page_works(workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(registry, "EVALUATIONS", dict(registry.EVALUATIONS))  # the page adds one
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    verbs = []
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "vjepa"
            if words[1:3] == ["eval", "attentive"]:
                words += ["--epochs", "1"]  # the default of 20 trains 20 probes for three minutes
            assert run(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
            verbs.append(words[1] if words[1] != "eval" else words[2])
    assert set(verbs) == {"export", "import", "embed", "probe", "attentive", "knn", "report"}
    rows = pq.read_table(workplace / "features.parquet").to_pylist()
    assert [Path(row["key"]).name for row in rows] == ["a.mp4", "b.mp4", "broken.mkv", "more.mp4"]
    assert [row["error"] is None for row in rows] == [True, True, False, True]
    page = (workplace / "model" / "report.html").read_text()
    assert "max over heads" in page
    assert "Nearest neighbours" in page
    assert (workplace / "shards.html").read_text().count("<img") > 20
    assert json.loads((workplace / "tuned" / "config.json").read_text())["architectures"] == [
        "VJEPA2ForVideoClassification"
    ]
