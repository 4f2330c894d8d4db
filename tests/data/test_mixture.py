"""`vjepa merge` writes the sources of a run, which then accepts only these corpora."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vjepa.config import load
from vjepa_data.corpus.format import read_manifest
from vjepa_data.corpus.merge import merge, write_mixture
from vjepa_data.reader.pipeline import open_plan
from vjepa_data.settings import BadInput

SETTINGS = "name: mixed\nsteps: 1\nbatch_size: 2\nmodel: {encoder: vit_tiny}\noptim: {lr: 1.0e-3}\n"


@pytest.fixture
def corpora(corpus: Path, videos: list[bytes], make_corpus: Callable[..., Path], edit_manifest, tmp_path: Path):
    """Two corpora: 26 clips, and 4 clips with a licence. One of the 4 is in both."""
    facts = {"frames": 48, "fps": 12.0, "width": 96, "height": 64}
    samples = [
        {"key": f"b-{n}", "video": v, **facts} for n, v in enumerate([videos[0], *[b"x" * n for n in (3, 4, 5)]])
    ]
    other = make_corpus(tmp_path / "b", [samples], name="b", split="train")

    def licence(manifest: dict) -> None:
        manifest["spec"] = {"licence": "CC-BY-4.0", "origin": "https://example.org/ü: 'b'"}

    edit_manifest(other, licence)
    return [str(corpus), str(other)]


def test_a_mixture_is_the_base_of_a_run(corpora: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"base: mixture.yaml\n{SETTINGS}")
    write_mixture(merge(corpora), tmp_path / "mixture.yaml")
    sources = load(tmp_path / "run.yaml").settings.data.sources
    assert [source.shards for source in sources] == corpora
    assert [source.corpus for source in sources] == [read_manifest(Path(place)).hash for place in corpora]
    assert [source.weight for source in sources] == pytest.approx([26 / 30, 4 / 30], abs=1e-6)
    assert (sources[1].licence, sources[1].origin) == ("CC-BY-4.0", "https://example.org/ü: 'b'")
    assert open_plan(load(tmp_path / "run.yaml").settings.data, seed=0, batch_size=2)


def test_a_mixture_with_a_base_is_a_run(corpora: list[str], tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(f"{SETTINGS}data: {{sources: [{{shards: x}}]}}\n")
    (tmp_path / "mixtures").mkdir()
    mixture = merge(corpora, weights=[3, 1])
    write_mixture(mixture, tmp_path / "mixtures" / "mixture.yaml", base=tmp_path / "all.yaml")
    run = load(tmp_path / "mixtures" / "mixture.yaml").settings
    assert [source.weight for source in run.data.sources] == [0.75, 0.25]
    assert run.steps == 1
    with pytest.raises(BadInput, match="exists already"):
        write_mixture(mixture, tmp_path / "mixtures" / "mixture.yaml")


def test_shared_clips_are_reported(corpora: list[str]) -> None:
    assert merge(corpora).warnings == ("1 clips of toy (train) are also in b (train)",)
    assert merge(corpora[1:]).warnings == ()


def test_a_run_rejects_a_replaced_corpus(corpora: list[str], edit_manifest, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"base: mixture.yaml\n{SETTINGS}")
    write_mixture(merge(corpora), tmp_path / "mixture.yaml")
    edit_manifest(Path(corpora[1]), lambda manifest: manifest.update(tools={"av": "1"}))
    with pytest.raises(BadInput, match=r"b holds the corpus \w+, not \w+; restore that corpus"):
        open_plan(load(tmp_path / "run.yaml").settings.data, seed=0, batch_size=2)


def test_invalid_mixtures_are_rejected(corpora: list[str]) -> None:
    for places, words, message in [
        ([corpora[0], corpora[0]], {}, "2 paths are 1 corpora .*; give each once"),
        (corpora, {"weights": [1.0]}, r"1 weights \[1.0\] for 2 corpora; give each a weight above 0"),
        (corpora, {"split": "val"}, "has no split 'val', only train; give --split"),
        (["/nowhere"], {}, "No such file"),
    ]:
        with pytest.raises(BadInput, match=message):
            merge(places, **words)


def test_paths_of_a_mixture_count_from_its_folder(
    corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixture may be read from any folder, and moved together with its corpora."""
    home, moved = tmp_path / "home", tmp_path / "moved"
    shutil.copytree(corpora[1], home / "sets" / "b")
    monkeypatch.chdir(home / "sets")
    write_mixture(merge(["b"]), home / "mixture.yaml")
    (home / "run.yaml").write_text(f"base: mixture.yaml\n{SETTINGS}")
    home.rename(moved)
    monkeypatch.chdir("/")
    settings = load(moved / "run.yaml").settings.data
    assert settings.sources[0].shards == str(moved / "sets" / "b")
    assert open_plan(settings, seed=0, batch_size=2)


def test_a_path_that_is_missing_beside_its_file_counts_from_the_working_directory(
    corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text(f"{SETTINGS}data: {{sources: [{{shards: b}}]}}\n")
    monkeypatch.chdir(tmp_path)
    assert load("configs/run.yaml").settings.data.sources[0].shards == "b"


def test_weights_that_draw_nothing_are_named(corpora: list[str]) -> None:
    assert "b has a share of 1e-18" in merge(corpora, weights=[1e9, 1e-9]).warnings[-1]
    with pytest.raises(BadInput, match=r"2 weights \[nan, 1.0\] .*; give each a weight above 0"):
        merge(corpora, weights=[float("nan"), 1.0])
