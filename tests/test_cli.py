"""The command line: its exit codes, and one clear line for what a user can fix."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vjepa.cli import main, parsers

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


@pytest.mark.parametrize("words", verbs(parsers()[0]), ids=" ".join)
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
        ("train vitl16_256px_16", "Did you mean vitl16_256px_16f?"),
        ("show EMPTY", "EMPTY is neither a file nor one of the shipped demo,"),
        ("show CONFIG batch_size=5 data.lanes=2", "batch_size (5) must be divisible by data.lanes (2)"),
        ("train CONFIG data.sources.0.shards=nowhere", "nowhere/manifest.json: No such file or directory"),
        ("export nowhere --out x", "nowhere"),
        ("show CONFIG --masks masks.xyz", "masks.xyz: a picture's name ends in .png, .svg or .pdf"),
        ("shard nowhere --out x", "nowhere: no such file or folder"),
        ("shard EMPTY --out x", "EMPTY"),
        ("shard NOTES --out x", "NOTES"),
        ("verify EMPTY", "manifest.json"),
        ("runs show EMPTY", "is not a run folder"),
        ("launch CONFIG --on h10", "h10 is neither a file nor one of the shipped h100, h200, local"),
        ("launch CONFIG --on ./h100", "h100: cannot be read"),
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


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("trian demo", "trian is no verb. Did you mean train?"),
        ("train demo --otu x", "--otu is no option of this verb. Did you mean --out?"),
        ("show demo optim.lr", "'optim.lr' is one word too many; settings are written name=value"),
        ("verify EMPTY lr=3", "this verb takes no settings"),
        ("shard EMPTY --out x --workers 0", "--workers: '0' is not a whole number of at least 1"),
        ("estimate demo --nodes 0", "--nodes: '0' is not a whole number of at least 1"),
        ("show demo --step -1", "--step: '-1' is not a whole number from 0"),
        ("embed model videos --out f.npy --timeout-s nan", "--timeout-s: 'nan' is not a number above 0"),
    ],
)
def test_a_word_that_means_nothing_is_answered_with_what_was_meant(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_without_a_verb_all_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "vjepa VERB --help" in capsys.readouterr().err


def test_a_file_or_a_value_that_looks_like_a_setting_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("label=cat").mkdir()
    assert main(["shard", "label=cat", "--out", "lr=3"]) == 2
    assert "no videos in label=cat" in capsys.readouterr().err
    assert main(["index", "label=cat", "--split", "a=val"]) == 2
    assert "label=cat: no tars below it" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_failure(run_file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "vjepa", "show", str(run_file)]
    with open(writer, "wb") as pipe:
        done = subprocess.run(words, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_folder_does_not_hide_the_run_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["show", "demo"]) == 0


def test_a_machine_without_any_network_interface_is_one_line(run_file: Path) -> None:
    alone = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here")
    words = [*alone, sys.executable, "-m", "vjepa", "train", str(run_file), "--out", str(run_file.parent / "run")]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("vjepa train: this machine has no network interface")
    assert done.stderr.count("\n") == 1
    assert not (run_file.parent / "run").exists()


def test_the_drill_that_its_help_tells_of_works_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["drill", "--on", "local", "--only", "refuse", "--out", str(tmp_path / "drill")]) == 0
    said = capsys.readouterr()
    assert "1 of 1: refuse, as expected" in said.err
    assert "bad_input" in said.out


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "vjepa", "show", "demo"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "vjepa: interrupted\n")


def test_a_disk_that_objects_is_one_line(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    assert main(["show", str(run_file), "--masks", f"{long}.png"]) == 2
    assert "File name too long; give another place" in capsys.readouterr().err.strip()


def test_a_list_of_runs_that_goes_to_a_file_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a-name-as-long-as-names-of-sweeps-are-003-optim.lr-0.0006-optim.weight_decay-0.05-seed-1"
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text("name: x\nsteps: 4\n")
    assert main(["runs", "list", "--root", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
    assert line.rstrip().endswith("not launched")


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
