"""The attentive probe is V-JEPA 2's, learns what is there, and goes to Hugging Face without loss."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vjepa.evals import attentive as attentive_module
from vjepa.evals.attentive import EncodedClips, Recipe, accuracy, attentive, fit_probe
from vjepa.evals.ridge import wilson
from vjepa.export.export import export
from vjepa.nn.attentive_probe import AttentiveProbe, hf_probe_tensors, load_classifier
from vjepa.weights.load import load_encoder
from vjepa_data.settings import BadInput

SMALL = Recipe(rates=(3e-3, 1e-4), decays=(0.01,), epochs=2, batch=8, blocks=1)


@pytest.fixture(scope="module")
def result(trained: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("attentive") / "probe.json"
    found = attentive(trained, scenes, label="shape", out=out, recipe=SMALL)
    assert json.loads(out.read_text()) == found
    return found, out


def needle(count: int, seed: int) -> EncodedClips:
    """Clips of noise in which one token, anywhere, tells the class: a mean would drown it, attention finds it."""
    draw = np.random.default_rng(seed)
    tokens = draw.standard_normal((count, 12, 16)).astype(np.float32)
    label = draw.integers(0, 2, count)
    where = draw.integers(0, 12, count)
    tokens[np.arange(count), where, 0] = 6
    tokens[np.arange(count), where, 1] = np.where(label == 1, 6, -6)
    return EncodedClips(tokens, np.arange(count), np.arange(count), label)


def test_it_finds_the_one_token_that_matters() -> None:
    recipe = Recipe(epochs=12, batch=16, blocks=1)
    probe = fit_probe(needle(256, 0), 2, 4, recipe, rate=3e-3, decay=0.01, seed=0)
    assert accuracy(probe, needle(100, 1)) > 0.9


def test_clips_of_one_video_vote_together() -> None:
    probe = AttentiveProbe(4, 1, 2, blocks=0)
    probe.forward = lambda tokens: tokens[:, 0, :2]  # type: ignore[method-assign]
    tokens = np.zeros((4, 1, 4), np.float32)
    tokens[:, 0, 0] = [1, 0, 1, 0]
    tokens[:, 0, 1] = [0, 3, 0, 0.5]
    clips = EncodedClips(tokens, np.arange(4), np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    assert accuracy(probe, clips) == 1.0


def test_the_result_names_the_choice_and_what_it_would_have_been(result: tuple[dict, Path]) -> None:
    found, _ = result
    assert found["protocol"]["videos"] == {"fit": 12, "choose": 4, "report": 8}
    assert len(found["grid"]) == 2
    chosen = found["grid"][found["chosen"]["number"]]
    assert chosen["choose"] == max(one["choose"] for one in found["grid"])
    assert found["accuracy"] == chosen["report"]
    assert found["accuracy_if_chosen_on_what_is_reported"] == max(one["report"] for one in found["grid"])
    assert found["interval"][0] < found["accuracy"] < found["interval"][1] or found["accuracy"] in (0, 1)


def test_tokens_are_computed_once(
    result: tuple[dict, Path], trained: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out = result
    monkeypatch.setattr(attentive_module, "write_features", None)
    again = attentive(trained, scenes, label="shape", out=out, recipe=SMALL, overwrite=True)
    assert again == found


RANKS = """
import sys
from pathlib import Path
from vjepa.evals import embed
from vjepa.evals.attentive import Recipe, attentive
embed.PART_VIDEOS = 8  # or the first rank would have them all
model, shards, out = map(Path, sys.argv[1:])
recipe = Recipe(rates=(3e-3, 1e-4), decays=(0.01,), epochs=2, batch=8, blocks=1)
attentive(model, shards, label="shape", out=out / "probe.json", recipe=recipe)
"""


def test_two_ranks_find_what_one_finds(result: tuple[dict, Path], trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, tmp_path / "ranks.py", trained, scenes, tmp_path], check=True, capture_output=True)
    assert json.loads((tmp_path / "probe.json").read_text()) == result[0]
    ours, theirs = (load_file(out.with_suffix(".safetensors")) for out in (result[1], tmp_path / "probe.json"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (one,), (two,) = (list(out.parent.glob(".probe.tokens/*/val.npy")) for out in (result[1], tmp_path / "probe.json"))
    assert np.array_equal(np.load(one), np.load(two))


def test_views_vote_and_baselines_stand_beside(trained: Path, scenes: Path, tmp_path: Path) -> None:
    found = attentive(
        trained,
        scenes,
        label="shape",
        out=tmp_path / "p.json",
        recipe=SMALL,
        clips_per_video=1,
        views=3,
        baselines=True,
    )
    tokens = tmp_path.glob(".p.tokens/*-1x3/val.npy")
    shapes = sorted(np.load(one, mmap_mode="r").shape for one in tokens)
    assert shapes == [(24 * 3, 2, 4, 4, width) for width in (48, 48, 2 * 8 * 8 * 3)]
    assert [row["features"] for row in found["rows"]] == [
        "pretrained", "random init", "pixels", "pretrained, max over heads", "prior",
    ]  # fmt: skip
    assert found["baselines"].keys() == {"random init", "pixels"}
    assert {one["videos"] for one in found["baselines"].values()} == {found["videos"]} == {8}
    assert found["rows"][3]["value"] >= found["rows"][0]["value"]


def test_the_classifier_is_hugging_faces(result: tuple[dict, Path], trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    probe = result[1].with_suffix(".safetensors")
    said = export(trained, tmp_path / "hf", probe=probe)
    assert said["check"]["logits_max_abs_difference"] == 0
    model = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "VJEPA2ForVideoClassification"
    assert model.config.id2label == {0: "disc", 1: "square"}
    frames = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(load_encoder(tmp_path / "hf")(frames), load_encoder(trained)(frames))
    with pytest.raises(BadInput, match="format hf only"):
        export(trained, tmp_path / "native", probe=probe, format="native")


def test_every_tensor_of_the_probe_has_a_name_at_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.VJEPA2Config(
        hidden_size=16, num_attention_heads=4, num_hidden_layers=1, crop_size=32, frames_per_clip=2, num_labels=3,
        pred_hidden_size=12, pred_num_attention_heads=2, pred_num_hidden_layers=1,
    )  # fmt: skip
    theirs = transformers.VJEPA2ForVideoClassification(settings)
    probe = AttentiveProbe(16, 4, 3, seed=1)
    for parameter in probe.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    found = hf_probe_tensors(probe)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items() if not name.startswith("vjepa2.")}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    theirs.load_state_dict(found, strict=False)
    tokens = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(probe(tokens), theirs.classifier(theirs.pooler(tokens)))


def test_bad_input_is_named(trained: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no class called 'colour' in split 'val'; it has shape, speed, tracks"):
        attentive(trained, scenes, label="colour", out=tmp_path / "p.json")
    with pytest.raises(BadInput, match="no split 'test'"):
        attentive(trained, scenes, label="shape", split="test", out=tmp_path / "p.json")
    (tmp_path / "p.json").write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        attentive(trained, scenes, label="shape", out=tmp_path / "p.json")
    with pytest.raises(BadInput, match="not a probe"):
        load_classifier(tmp_path / "p.json")


def test_the_interval_is_wilsons() -> None:
    # 8 of 10: a textbook value.
    assert wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=2e-4)
