"""Commands for models answer invalid input with a single line and exit code 2, and change no file."""

from pathlib import Path

import pytest

from vjepa.cli import main

NOT_HERE = "no such model"


@pytest.fixture
def folder(trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, a corpus, and invalid inputs."""
    (tmp_path / "run").symlink_to(trained)
    (tmp_path / "shards").symlink_to(scenes)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "photo.jpg").write_text("mine")
    (tmp_path / "taken.json").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.json").write_text('{"format": 1, "model": {')
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export gone --out x", NOT_HERE),
        ("export empty --out x", "not a model"),
        ("export torn --out x --format native", "not JSON"),
        ("export other --out x", "only vjepa2 can be read"),
        ("export run --out taken", "exists already"),
        ("export run --out taken --overwrite", "is not replaced"),
        ("export run --out x --probe taken.json", "not a probe"),
        ("export run --out x --mask-kind 7", "mask tokens 0 to 1"),
        ("import gone.pt --out x", NOT_HERE),
        ("import torn.pt --out x", "cannot be read|not read"),
        ("embed gone videos --out x.npy", NOT_HERE),
        ("embed run gone --out x.npy", "no such file"),
        ("embed run empty --out x.npy", "no file there has the name of a video"),
        ("embed run shards --split test --out x.npy", "no split 'test'"),
        ("embed run shards --out x.csv", "unsupported feature format"),
        ("embed run shards --out x.npy --device gpu0", "--device gpu0 cannot be used here"),
        ("embed run shards --split val --out taken.json", "exists already|unsupported feature format"),
        ("eval probe gone shards", NOT_HERE),
        ("eval probe run gone", "gone"),
        ("eval probe run shards --split test", "no split 'test'"),
        ("eval probe run shards --labels colour", "no label 'colour'"),
        ("eval probe run shards --out taken.json", "exists already"),
        ("eval attentive run shards --label colour --out x.json", "no class label 'colour'"),
        ("eval attentive run shards --label shape --split test --out x.json", "no split 'test'"),
        ("eval knn run shards --label colour --out x.json", "no class label 'colour'"),
        ("eval knn run shards --label shape --split test --out x.json", "no split 'test'"),
        ("eval knn run shards --query taken/photo.jpg --out x.html", "give a video that can be decoded"),
        ("report gone", "is not a run"),
        ("report empty", "is not a run"),
        ("report torn --out x.html", "not JSON"),
        ("report shards --out taken.json", "exists already"),
    ],
)
def test_invalid_input_is_one_line_and_changes_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(words.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert any(one in said[0] for one in message.split("|")), said[0]
    assert sorted(folder.rglob("*")) == before
    assert (folder / "taken" / "photo.jpg").read_text() == (folder / "taken.json").read_text() == "mine"
