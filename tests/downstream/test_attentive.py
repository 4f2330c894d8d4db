"""The attentive probe is V-JEPA 2's, finds class information in tokens, and exports to Hugging Face without loss."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vjepa.evals import attentive as attentive_module
from vjepa.evals.attentive import AttentiveSettings, EncodedClips, accuracy, fit_probe
from vjepa.evals.base import Result
from vjepa.evals.ridge import wilson
from vjepa.evals.shell import run_evaluation
from vjepa.export.export import export
from vjepa.nn.attentive_probe import AttentiveProbe, hf_probe_tensors, load_classifier
from vjepa.weights.load import load_encoder
from vjepa_data.settings import BadInput

SMALL = AttentiveSettings(label="shape", rates=(3e-3, 1e-4), decays=(0.01,), epochs=2, batch=8, blocks=1)


def small(**settings: Any) -> AttentiveSettings:
    return SMALL.model_copy(update=settings)


@pytest.fixture(scope="module")
def written(trained: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("attentive") / "probe.json"
    return run_evaluation("attentive", trained, scenes, SMALL, out=out), out


def needle(count: int, seed: int) -> EncodedClips:
    """Clips of noise in which a single token tells the class. A mean would drown it, attention finds it."""
    draw = np.random.default_rng(seed)
    tokens = draw.standard_normal((count, 12, 16)).astype(np.float32)
    label = draw.integers(0, 2, count)
    where = draw.integers(0, 12, count)
    tokens[np.arange(count), where, 0] = 6
    tokens[np.arange(count), where, 1] = np.where(label == 1, 6, -6)
    return EncodedClips(tokens, np.arange(count), np.arange(count), label)


def test_the_single_informative_token_is_found() -> None:
    settings = AttentiveSettings(label="", epochs=12, batch=16, blocks=1)
    probe = fit_probe(needle(256, 0), 2, 4, settings, rate=3e-3, decay=0.01)
    assert accuracy(probe, needle(100, 1)) > 0.9


def test_clips_of_one_video_vote_together() -> None:
    probe = AttentiveProbe(4, 1, 2, blocks=0)
    probe.forward = lambda tokens: tokens[:, 0, :2]  # type: ignore[method-assign]
    tokens = np.zeros((4, 1, 4), np.float32)
    tokens[:, 0, 0] = [1, 0, 1, 0]
    tokens[:, 0, 1] = [0, 3, 0, 0.5]
    clips = EncodedClips(tokens, np.arange(4), np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    assert accuracy(probe, clips) == 1.0


def test_the_result_reports_the_selected_probe(written: tuple[Result, Path]) -> None:
    """It also reports the score that selecting on the reported videos would have given."""
    result, out = written
    found = json.loads(out.read_text())
    assert found == result.to_json()
    assert found["protocol"]["videos"] == {"fit": 12, "choose": 4, "report": 8}
    assert len(found["grid"]) == 2
    chosen = found["grid"][found["chosen"]["number"]]
    assert chosen["choose"] == max(point["choose"] for point in found["grid"])
    assert found["accuracy"] == chosen["report"]
    assert found["accuracy_if_chosen_on_what_is_reported"] == max(point["report"] for point in found["grid"])
    assert found["interval"][0] < found["accuracy"] < found["interval"][1] or found["accuracy"] in (0, 1)


def test_tokens_are_computed_once(
    written: tuple[Result, Path], trained: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, out = written
    monkeypatch.setattr(attentive_module, "embed_parts", None)
    again = run_evaluation("attentive", trained, scenes, SMALL, out=out, overwrite=True)
    assert again.to_json() == result.to_json()


RANKS = """
import json, sys
from pathlib import Path
from vjepa.evals import parts
from vjepa.evals.shell import run_evaluation
parts.PART_VIDEOS = 8  # or the first rank would have them all
name, settings, model, shards, out = sys.argv[1:]
run_evaluation(name, Path(model), Path(shards), json.loads(settings), out=Path(out))
"""


def run_two_ranks(name: str, settings: str, model: Path, shards: Path, out: Path) -> None:
    script = out.with_name("ranks.py")
    script.write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, script, name, settings, model, shards, out], check=True, capture_output=True)


def test_two_ranks_give_the_result_of_one(
    written: tuple[Result, Path], trained: Path, scenes: Path, tmp_path: Path
) -> None:
    result, out = written
    run_two_ranks("attentive", SMALL.model_dump_json(), trained, scenes, tmp_path / "probe.json")
    assert json.loads((tmp_path / "probe.json").read_text()) == result.to_json()
    one, two = (load_file(path.with_suffix(".safetensors")) for path in (out, tmp_path / "probe.json"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    (one,), (two,) = (list(folder.glob(".vjepa-features/val-tokens-*.npy")) for folder in (out.parent, tmp_path))
    assert np.array_equal(np.load(one), np.load(two))


def test_two_ranks_share_the_linear_probes(trained: Path, scenes: Path, tmp_path: Path) -> None:
    settings = {"random_seeds": 0, "labels": ["shape", "speed"]}
    run_two_ranks("probe", json.dumps(settings), trained, scenes, tmp_path / "linear.json")
    alone = run_evaluation("probe", trained, scenes, settings)
    assert json.loads((tmp_path / "linear.json").read_text()) == alone.to_json()


def test_views_vote_together(trained: Path, scenes: Path, tmp_path: Path) -> None:
    """Baselines stand next to the encoder, with tokens of their own."""
    settings = small(clips_per_video=1, views=3, baselines=True)
    result = run_evaluation("attentive", trained, scenes, settings, out=tmp_path / "p.json")
    tokens = tmp_path.glob(".vjepa-features/val-tokens-*.npy")
    shapes = sorted(np.load(path, mmap_mode="r").shape for path in tokens)
    assert shapes == [(24 * 3, 2, 4, 4, width) for width in (48, 48, 2 * 8 * 8 * 3)]
    assert result.columns == ["pretrained", "random init", "pixels", "pretrained, max over heads", "prior"]
    baselines = result.details["baselines"]
    assert baselines.keys() == {"random init", "pixels"}
    assert {findings["videos"] for findings in baselines.values()} == {result.details["videos"]} == {8}
    assert result.rows[3].value >= result.rows[0].value


def test_max_videos_limits_the_encoded_videos(trained: Path, scenes: Path, tmp_path: Path) -> None:
    result = run_evaluation("attentive", trained, scenes, small(max_videos=12), out=tmp_path / "p.json")
    assert result.protocol["videos"] == {"fit": 6, "choose": 2, "report": 4}
    (tokens,) = tmp_path.glob(".vjepa-features/val-tokens-*.npy")
    assert len(np.load(tokens, mmap_mode="r")) == 12 * 2


def test_the_classifier_is_hugging_faces(written: tuple[Result, Path], trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    probe = written[1].with_suffix(".safetensors")
    provenance = export(trained, tmp_path / "hf", probe=probe)
    assert provenance["check"]["logits_max_abs_difference"] == 0
    model = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "VJEPA2ForVideoClassification"
    assert model.config.id2label == {0: "disc", 1: "square"}
    frames = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(load_encoder(tmp_path / "hf")(frames), load_encoder(trained)(frames))
    with pytest.raises(BadInput, match="only be exported with format hf"):
        export(trained, tmp_path / "native", probe=probe, format="native")


def test_every_tensor_of_the_probe_has_a_hugging_face_name() -> None:
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
    out = tmp_path / "p.json"
    for settings, message in (
        ({"label": "colour"}, "no class label 'colour' in split 'val', which has shape, speed, tracks"),
        ({"label": "shape", "split": "test"}, "no split 'test'"),
        ({"label": "shape", "max_videos": 11}, "has 11 labelled videos; the probe needs at least 12"),
    ):
        with pytest.raises(BadInput, match=message):
            run_evaluation("attentive", trained, scenes, settings, out=out)
    out.with_suffix(".safetensors").write_text("mine")
    with pytest.raises(BadInput, match=r"p\.safetensors exists already"):
        run_evaluation("attentive", trained, scenes, SMALL, out=out)
    out.write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        run_evaluation("attentive", trained, scenes, SMALL, out=out)
    with pytest.raises(BadInput, match="not a probe"):
        load_classifier(out)


def test_the_interval_is_wilsons() -> None:
    # 8 of 10: a textbook value.
    assert wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=2e-4)
