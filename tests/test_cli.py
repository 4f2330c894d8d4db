"""The command line: its exit codes, and one clear line for what a user can fix."""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vjepa.cli import main, parser

RUN = """
name: tiny
steps: 2
batch_size: 2
data: {sources: [{shards: SHARDS}]}
model: {encoder: vit_tiny}
optim: {lr: 1e-3}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RUN)
    return path


def verbs(whole: argparse.ArgumentParser) -> list[list[str]]:
    """Every verb, and every verb of a group."""
    found = []
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += [[name, *rest] for rest in verbs(inner)] or [[name]]
    return found


@pytest.mark.parametrize("words", verbs(parser()), ids=" ".join)
def test_every_verb_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    assert f"usage: vjepa {' '.join(words)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("show CONFIG optim.lrr=1", "command line: optim.lrr is not a setting. Did you mean optim.lr?"),
        ("show demoo", "demoo is neither a file nor one of the shipped demo,"),
        ("show CONFIG batch_size=5 data.lanes=2", "batch_size (5) must be divisible by data.lanes (2)"),
        ("train CONFIG data.sources.0.shards=nowhere", "nowhere/manifest.json: No such file or directory"),
        ("export nowhere --out x", "nowhere"),
        ("shard nowhere --out x", "nowhere: no such file or folder"),
        ("shard EMPTY --out x", "EMPTY"),
        ("shard NOTES --out x", "NOTES"),
        ("verify EMPTY", "manifest.json"),
        ("runs show EMPTY", "is not a run folder"),
        ("verify EMPTY lr=3", "takes no settings"),
        ("launch CONFIG --on moonbase", "moonbase: cannot be read"),
        ("demo --out NOTES", "is not empty and no demo made it"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: str, line: str, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NOTES").mkdir()
    (tmp_path / "NOTES" / "notes.mp4").write_text("not a video")
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    code = main([str(run_file) if word == "CONFIG" else word for word in words.split()])
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert line in said
    assert len([one for one in said.splitlines() if one.startswith("vjepa ")]) == 1
    left = {path for path in tmp_path.rglob("*") if not path.is_dir() and path.suffix not in (".lock", ".txt", "")}
    assert left <= set(before), "something half-written was left behind"


def test_show_says_where_each_value_came_from(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run_file), "seed=7"]) == 0
    rows = [re.split(r"\s{2,}", line.rstrip()) for line in capsys.readouterr().out.splitlines()]
    assert ["seed", "7", "command line"] in rows
    assert ["optim.lr", "0.001", str(run_file)] in rows
    assert ["precision", "bf16", "default"] in rows


def test_settings_are_shown_at_once(run_file: Path) -> None:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vjepa", "show", str(run_file)], check=True, capture_output=True)
    assert time.perf_counter() - started < 10, "settings need no torch, so they should not take as long as importing it"
