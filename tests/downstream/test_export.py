"""Exports give the same numbers in other programs, and models that they would compute differently are rejected."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_weights
from safetensors.torch import load_file, save_file

from vjepa.evals.shell import run_evaluation
from vjepa.export import export as export_module
from vjepa.export import verify
from vjepa.export.export import export
from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.predictor import Predictor, PredictorInput
from vjepa.weights.huggingface import mask_token_order
from vjepa.weights.load import load_encoder, read_weights
from vjepa.weights.tensors import write_safetensors
from vjepa_data.settings import BadInput

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def clip(px: int = 32, frames: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).integers(0, 256, (2, frames, px, px, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def hf_folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "hf"
    export(trained, out)
    return out


def test_stock_transformers_gives_the_same_features(trained: Path, hf_folder: Path) -> None:
    run = read_weights(trained)
    encoder = Encoder(run.model)
    encoder.load_state_dict(load_weights(trained, "target"))
    model = transformers.AutoModel.from_pretrained(hf_folder)
    assert type(model).__name__ == "VJEPA2Model"
    verify.align(model)
    pixels = normalise(clip())
    with torch.no_grad():
        (ours,) = encoder([View(pixels)])
        theirs = model(pixels.transpose(1, 2), skip_predictor=True).last_hidden_state
    assert (ours - theirs).abs().max() == 0


@pytest.mark.parametrize("kind", [0, 1])
def test_the_exported_predictor_uses_the_chosen_mask_kind(trained: Path, tmp_path: Path, kind: int) -> None:
    export(trained, tmp_path / "hf", mask_kind=kind)
    model = verify.align(transformers.AutoModel.from_pretrained(tmp_path / "hf"))
    weights = read_weights(trained)
    features = torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(0))
    visible, hidden = torch.arange(20)[None], torch.arange(20, 32)[None]
    predictor = Predictor(weights.model, 2)
    predictor.load_state_dict(weights.tensors.part("predictor"))
    from vjepa.nn.grid import Grid

    with torch.no_grad():
        theirs = model.predictor(features, [visible], [hidden]).last_hidden_state
        answers = [
            predictor([PredictorInput(features[:, :20], visible, hidden, Grid(2, 4, 4), token)])[0]
            for token in range(2)
        ]
    assert (answers[kind] - theirs).abs().max() == 0
    assert (answers[1 - kind] - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [0, 1])
def test_a_hugging_face_folder_is_read_byte_for_byte(trained: Path, tmp_path: Path, kind: int) -> None:
    export(trained, tmp_path / "hf", mask_kind=kind)
    before, after = read_weights(trained), read_weights(tmp_path / "hf")
    assert after.model == before.model
    assert after.masks == before.masks
    assert set(after.tensors) == set(before.tensors)
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in before.tensors)


def test_models_that_hugging_face_lacks_go_native(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run", rope="interleaved")
    with pytest.raises(BadInput, match=r"cannot express.*interleaved.*--format native"):
        export(run, tmp_path / "out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run"]
    export(run, tmp_path / "out", format="native")
    frames = clip(px=48, frames=6)
    assert torch.equal(load_encoder(tmp_path / "out")(frames), load_encoder(run)(frames))
    assert load_encoder(tmp_path / "out")(frames).shape == (2, 3, 6, 6, 48)


def test_target_and_trained_weights_are_distinguished(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "online", part="encoder")
    said = json.loads((tmp_path / "online" / "provenance.json").read_text())
    assert (said["part"], said["step"], said["manifests"]) == ("encoder", 40, ["c0ffee"])
    wanted = load_weights(trained, "encoder")["norm.weight"]
    assert torch.equal(load_file(tmp_path / "online" / "model.safetensors")["encoder.layernorm.weight"], wanted)
    assert not torch.equal(load_weights(trained, "target")["norm.weight"], wanted)


def test_an_export_is_complete_and_describes_itself(hf_folder: Path) -> None:
    names = sorted(one.name for one in hf_folder.iterdir())
    files = ["README.md", "config.json", "model.safetensors", "provenance.json", "video_preprocessor_config.json"]
    assert names == files
    card = (hf_folder / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    assert "40 steps in run `tiny`" in card
    assert "c0ffee" in card
    processor = json.loads((hf_folder / "video_preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 36}
    assert transformers.VJEPA2Config.from_pretrained(hf_folder).crop_size == 32


def test_the_card_lists_the_results_of_these_weights(
    make_trained: Callable[..., Path], scenes: Path, tmp_path: Path
) -> None:
    run = make_trained(tmp_path / "run")
    run_evaluation("knn", run, scenes, {"label": "shape"}, out=run / "knn.json")
    other = json.loads((run / "knn.json").read_text())
    other["model"]["step"] = 20
    (run / "older.json").write_text(json.dumps(other))
    said = export(run, tmp_path / "out", format="native")
    assert [result["model"]["step"] for result in said["results"]] == [40]
    (line,) = [one for one in (tmp_path / "out" / "README.md").read_text().splitlines() if one.startswith("| shape |")]
    assert f"{said['results'][0]['accuracy']:.3f}" in line
    with pytest.raises(BadInput, match="is not an evaluation result"):
        export(run, tmp_path / "more", format="native", results=[tmp_path / "out" / "model.json"])


def test_an_export_with_other_numbers_fails(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export_module._hf_tensors

    def swapped(*args):
        found = dict(honest(*args))
        one, other = "encoder.layer.0.norm1.bias", "encoder.layer.0.norm2.bias"
        found[one], found[other] = found[other], found[one]
        yield from found.items()

    monkeypatch.setattr(export_module, "_hf_tensors", swapped)
    with pytest.raises(ValueError, match="does not give the same numbers"):
        export(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told_otherwise(hf_folder: Path, trained: Path, tmp_path: Path) -> None:
    before = (hf_folder / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match=r"exists already.*--overwrite"):
        export(trained, hf_folder)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "photo.jpg").write_text("mine")
    with pytest.raises(BadInput, match=r"holds no provenance\.json"):
        export(trained, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "photo.jpg").read_text() == "mine"
    export(trained, hf_folder, overwrite=True)
    assert (hf_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such model"),
        (lambda folder: folder.mkdir(), "not a model"),
        (lambda folder: (folder / "checkpoints").mkdir(parents=True), "no complete checkpoint"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "not JSON"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "vit"}')), "only vjepa2"),
        (lambda folder: (folder.mkdir(), (folder / "model.json").write_text("{}")), "Export the model again"),
    ],
)
def test_an_invalid_source_is_reported_in_one_line(tmp_path: Path, make: Callable, message: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(BadInput, match=message) as caught:
        export(tmp_path / "source", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_rejected(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run")
    shard = next((run / "checkpoints").glob("step_*/*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BadInput, match="no complete checkpoint"):
        read_weights(run)
    with pytest.raises(BadInput, match="changed since it was written"):
        read_weights(shard.parent)


def test_a_damaged_hugging_face_folder_is_rejected(tmp_path: Path, hf_folder: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    with pytest.raises(BadInput, match="is missing"):
        read_weights(torn)
    (torn / "model.safetensors").write_bytes((hf_folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(BadInput, match="truncated"):
        read_weights(torn)
    content = json.loads((hf_folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (torn / "config.json").write_text(json.dumps(content))
    (torn / "model.safetensors").write_bytes((hf_folder / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match=r"lacks encoder\.layer\.2\.norm1\.weight"):
        read_weights(torn)


def test_the_streamed_file_equals_the_librarys(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7).bfloat16(), "empty": torch.zeros(0, 2)}
    write_safetensors(tmp_path / "ours.safetensors", tensors.items())
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [one.name for one in tmp_path.glob("ours*")] == ["ours.safetensors"]


def test_the_chosen_mask_token_goes_to_the_used_index() -> None:
    assert mask_token_order(1, 0) == [0]
    assert mask_token_order(2, 1) == [0, 1]
    assert mask_token_order(2, 0) == [1, 0]
    assert mask_token_order(4, 3) == [0, 3, 2, 1]


def test_without_transformers_the_native_format_is_offered(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"vjepa-pretrain\[hf\].*--format native"):
        export(trained, tmp_path / "out")
    export(trained, tmp_path / "out", format="native")


def test_an_exported_program_needs_none_of_our_code(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run", encoder={"name": "custom", "width": 24, "depth": 1, "heads": 2})
    # In a separate process, because the signature checks of tests cannot be traced.
    trace = (
        "import json, pathlib, sys; from vjepa.export.export import export; "
        "run, out = map(pathlib.Path, sys.argv[1:]); print(json.dumps(export(run, out, format='pt2')['check']))"
    )
    words = [sys.executable, "-W", "ignore", "-c", trace, str(run), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    check = json.loads(done.stdout.splitlines()[-1])
    assert check["features_max_abs_difference"] < 1e-5
    assert check["clips"] == [1, 3]
    code = (
        "import sys, torch\n"
        f"model = torch.export.load({str(tmp_path / 'out' / 'model.pt2')!r}).module()\n"
        "frames = torch.arange(2 * 4 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(2, 4, 32, 32, 3)\n"
        f"torch.save(model(frames), {str(tmp_path / 'features.pt')!r})\n"
        "assert not any(name.startswith('vjepa') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    frames = torch.arange(2 * 4 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(2, 4, 32, 32, 3)
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), load_encoder(run)(frames), rtol=0, atol=1e-5)


def test_a_step_of_a_stream_is_exported_with_its_cache(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    encoder = {"name": "custom", "width": 24, "depth": 1, "heads": 2}
    run = make_trained(tmp_path / "run", encoder=encoder, causal=True, rope="interleaved")
    # In a separate process, because the signature checks of tests cannot be traced.
    trace = (
        "import json, pathlib, sys; from vjepa.export.export import export\n"
        "run, out = map(pathlib.Path, sys.argv[1:])\n"
        "for format in ('pt2', 'onnx'):\n"
        "    print(json.dumps(export(run, out / format, format=format, stream=True, window=3)['check']))"
    )
    words = [sys.executable, "-W", "ignore", "-c", trace, str(run), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    frames = torch.randint(0, 256, (1, 10, 32, 32, 3), dtype=torch.uint8)
    expected = load_encoder(run).stream(3)(frames)[0].flatten(1, 2)
    for text, name in zip(done.stdout.splitlines()[-2:], ("pt2", "onnx"), strict=True):
        check = json.loads(text)
        assert check["features_max_abs_difference"] < 1e-5
        assert (check["window"], check["cache"]) == (3, [1, "B", 2, 48, 12])
        # The usage of the card gives a stream's features.
        card = (tmp_path / name / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0].replace("THIS FOLDER", str(tmp_path / name))
        code = re.sub(r"(for frames in )[^:]*(dtype=torch.uint8\)|\"u1\"\)):", r"\1FRAMES:", code)
        inputs = frames.unflatten(1, (5, 2)).transpose(0, 1)
        names = {"FRAMES": inputs if name == "pt2" else inputs.numpy()}
        exec(code, names)
        torch.testing.assert_close(torch.as_tensor(names["features"])[0], expected[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "pt2", "stream": True}, "cannot stream: its tokens attend to later tubelets"),
        ({"format": "hf", "stream": True}, "a stream is exported as a program, not as hf; use --format pt2 or onnx"),
        ({"format": "pt2", "window": 3}, "--window belongs to streams"),
    ],
)
def test_streams_that_cannot_be_exported_are_refused(trained: Path, tmp_path: Path, options: dict, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        export(trained, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_levels_go_native(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run", levels=(0, 1), still_tokens=True, rope_cells=4)
    with pytest.raises(BadInput, match=r"rope_cells.*levels.*still_tokens"):
        export(run, tmp_path / "out")
    export(run, tmp_path / "out", format="native")
    assert torch.equal(load_encoder(tmp_path / "out")(clip()), load_encoder(run)(clip()))


def test_a_model_without_a_predictor_is_exported(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run", _without_predictor=True)
    assert read_weights(run).mask_tokens == 0
    export(run, tmp_path / "native", format="native")
    said = export(run, tmp_path / "hf")
    assert said["predictor"] == "not trained"
    assert "The predictor is not trained" in (tmp_path / "hf" / "README.md").read_text()
    for name in ("native", "hf"):
        assert torch.equal(load_encoder(tmp_path / name)(clip()), load_encoder(run)(clip()))
