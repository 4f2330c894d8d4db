"""The command line: exit codes, parsing, and single-line errors for everything that a user can fix."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vjepa.cli import APP, VERB_FILES, full_disk, main
from vjepa.evals import results, shell
from vjepa.evals.base import EvaluationSettings
from vjepa.evals.registry import EVALUATIONS, EvaluationEntry

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


def list_verbs() -> list[str]:
    """Every verb, and every verb of a group, as typed."""
    for name in VERB_FILES:
        importlib.import_module(f"vjepa.cli.{name}")
    names = [name for name in APP if not name.startswith("-")]
    return [
        " ".join(words)
        for name in names
        for words in [(name, part) for part in APP[name] if not part.startswith("-")] or [(name,)]
    ]


@pytest.mark.parametrize("words", list_verbs())
def test_every_verb_explains_itself(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help has a usage line, a sentence about the verb, a text for each option, and an example."""
    assert main([*words.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: vjepa {words}" in text
    assert f"Example: vjepa {words}" in text
    app = APP
    for word in words.split():
        app = app[word]
    for argument in app.assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help or not argument.parse, f"{argument.name} lacks a help text"


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
        ("show CONFIG --masks masks.xyz", "unsupported picture format '.xyz' of masks.xyz"),
        ("shard nowhere --out x", "nowhere: no such file or folder"),
        ("shard EMPTY --out x", "EMPTY"),
        ("shard NOTES --out x", "NOTES"),
        ("verify EMPTY", "manifest.json"),
        ("runs show EMPTY", "is not a run folder"),
        ("launch CONFIG --on h10", "h10 is neither a file nor one of the shipped h100, h200, local"),
        ("launch CONFIG --on ./h100", "h100: cannot be read"),
        ("launch CONFIG --on local parallel.accumulate=3", "parallel.accumulate (3) must divide"),
        ("verify RUN", "RUN is a run without a checkpoint"),
        ("demo --out NOTES", "is not empty and not from a demo"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: str, line: str, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "RUN" / "checkpoints").mkdir(parents=True)
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
        ("trian demo", "vjepa: unknown command 'trian'. Did you mean 'train'?"),
        ("runs lst", "vjepa runs: unknown command 'lst'. Did you mean 'list'?"),
        ("train demo --otu x", "vjepa train: unknown option '--otu'. Did you mean '--out'?"),
        ("show demo optim.lr", "vjepa show: unexpected argument 'optim.lr'; write settings as name=value"),
        ("verify EMPTY lr=3", "vjepa verify: unexpected argument 'lr=3'; this verb takes no settings"),
        ("verify", "vjepa verify: PLACE is missing; see `vjepa verify --help`"),
        ("shard EMPTY", "vjepa shard: --out is missing; see `vjepa shard --help`"),
        ("shard EMPTY --out", "vjepa shard: --out needs a value"),
        ("shard EMPTY --out x --task 3", "--task: '3' is not K/N with K from 0 to N - 1, such as 3/32"),
        ("shard EMPTY --out x --workers 0", "--workers: '0' is not a whole number of at least 1"),
        ("estimate demo --nodes 0", "--nodes: '0' is not a whole number of at least 1"),
        ("show demo --step -1", "--step: '-1' is not a whole number of at least 0"),
        ("embed model videos --out f.npy --timeout-s nan", "--timeout-s: nan must be > 0"),
        ("export model --out x --format pt", "--format: 'pt' is not one of hf, native, pt2, onnx"),
        ("import x.pt --out x --mask-tokens 0 -1", "--mask-tokens: '-1' is not a whole number of at least 0"),
    ],
)
def test_a_misspelt_command_line_is_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


@pytest.mark.parametrize(("words", "line"), [("", "vjepa VERB --help"), ("runs", "Print the log of a rank.")])
def test_without_a_verb_all_verbs_are_listed(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert line in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vjepa-pretrain 0.")


@pytest.mark.parametrize("words", ["seed=7 show CONFIG", "show seed=7 CONFIG", "show CONFIG --step 3 seed=7"])
def test_settings_may_stand_anywhere_after_the_verb(
    words: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = 2 if words.startswith("seed") else 0
    assert main([str(run_file) if word == "CONFIG" else word for word in words.split()]) == expected
    assert ("command line" in capsys.readouterr().out) == (expected == 0)


def test_the_last_value_of_a_repeated_option_counts(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run_file), "--masks", "first.xyz", "--masks=last.xyz"]) == 2
    assert "last.xyz" in capsys.readouterr().err


def test_a_file_or_value_that_looks_like_a_setting_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("label=cat").mkdir()
    assert main(["shard", "label=cat", "--out", "lr=3"]) == 2
    assert "no videos in label=cat" in capsys.readouterr().err
    assert main(["index", "label=cat", "--split", "a=val"]) == 2
    assert "label=cat: no tars found" in capsys.readouterr().err


def test_a_reader_that_closes_the_pipe_is_not_an_error(run_file: Path) -> None:
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
    starting, refusal = done.stderr.splitlines()
    assert "starting tiny" in starting
    assert refusal.startswith("vjepa train: this machine has no network interface")
    assert not (run_file.parent / "run").exists()


def test_the_drill_of_the_help_example_passes_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--on", "local", "--only", "refuse", "--out", str(tmp_path / "drill")]) == 0
    said = capsys.readouterr()
    assert "1 of 1: refuse, as expected" in said.err
    assert "bad_input" in said.out


def test_ctrl_c_during_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "vjepa", "show", "demo"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "vjepa show: interrupted\n")


def test_an_error_of_the_file_system_is_one_line(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300
    assert main(["show", str(run_file), "--masks", f"{long}.png"]) == 2
    assert "File name too long; choose another path" in capsys.readouterr().err.strip()


def test_launching_a_run_that_is_done_submits_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "done" / "checkpoints" / "step_00009999").mkdir(parents=True)
    assert main(["launch", str(run_file), "--on", "local", "--out", str(tmp_path / "done"), "steps=9999"]) == 0
    assert "done is done at step 9999" in capsys.readouterr().out
    assert not (tmp_path / "done" / "launch").exists()


def test_torchrun_hears_the_reason_of_a_refusal(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["show", str(run_file), "seed=-1"]) == 2
    assert "vjepa show: command line: seed" in (tmp_path / "error.json").read_text()


def test_a_working_folder_that_was_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["show", "demo"]) == 2
    assert capsys.readouterr().err == "vjepa: the working folder does not exist any more; change to another folder\n"


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "demo", "--out", str(tmp_path), "steps=1"]
    assert full_disk(words) == ""
    full = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert Path(full_disk(words)).is_mount()


def test_a_list_of_runs_in_a_file_is_not_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_settings_are_shown_without_importing_torch(run_file: Path) -> None:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "vjepa", "show", str(run_file)], check=True, capture_output=True)
    assert time.perf_counter() - started < 10, "settings need no torch, so they should not take as long as importing it"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("eval toy model corpus", {"split": "val", "size": 3, "names": None, "flip": False}),
        ("eval toy model corpus --size 5 --names a 1 --flip", {"size": 5, "names": ("a", "1"), "flip": True}),
        ("eval toy model corpus size=6 --split test", {"size": 6, "split": "test"}),
    ],
)
def test_the_fields_of_an_evaluation_are_options_and_settings(
    words: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(shell, "run_evaluation", lambda name, model, data, settings, **how: seen.append(settings))
    monkeypatch.setattr(shell, "settings_class", lambda name: ToySettings)
    monkeypatch.setattr(results, "format_table", lambda result: "")
    monkeypatch.setitem(EVALUATIONS, "toy", EvaluationEntry("toy", "ToySettings", "a toy"))
    verbs = importlib.import_module("vjepa.cli.evals")
    verbs.declare("toy")
    try:
        assert main(words.split()) == 0
    finally:
        del verbs.EVAL["toy"]
    assert {name: getattr(seen[0], name) for name in expected} == expected


class ToySettings(EvaluationSettings):
    """Settings of an evaluation that only this file knows."""

    size: int = 3
    """A number."""

    names: tuple[str, ...] | None = None
    """Several words."""

    flip: bool = False
    """A flag."""
