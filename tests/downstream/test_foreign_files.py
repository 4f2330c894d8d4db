"""Files of other projects and forks are recognized, and the log names their kind, or they are refused by name."""

import argparse
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_weights
from safetensors.torch import load_file, save_file

from vjepa.export.export import export
from vjepa.nn.encoder import Encoder
from vjepa.nn.grid import Grid
from vjepa.nn.positions import sine_cosine
from vjepa.weights.fair_checkpoints import Sizes
from vjepa.weights.import_checkpoint import import_checkpoint
from vjepa.weights.load import load_encoder, read_weights
from vjepa_data.settings import BadInput

SIZES = Sizes(heads=3, predictor_heads=2, px=32, frames=4, fps=8.0)
FRAMES = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (1, 4, 32, 32, 3), dtype=np.uint8))


def released(trained: Path, *, tokens: int = 2, table: Grid | None = None, prefix: str = "module.backbone.") -> dict:
    """Return the contents of a released file: with `tokens` mask tokens, and tables of positions of a grid."""
    parts = {part: load_weights(trained, part) for part in ("encoder", "target", "predictor")}
    own = parts["predictor"].pop("mask_tokens")
    parts["predictor"] |= {f"mask_tokens.{n}": own[n % len(own)] for n in range(tokens)}
    if table is not None:
        ids = torch.arange(table.tokens)[None]
        for part, name, width in (
            ("encoder", "pos_embed", 48), ("target", "pos_embed", 48), ("predictor", "predictor_pos_embed", 36)
        ):  # fmt: skip
            parts[part][name] = sine_cosine(table, ids, width)
    wrapped = {part: {prefix + name: tensor for name, tensor in named.items()} for part, named in parts.items()}
    return {"encoder": wrapped["encoder"], "target_encoder": wrapped["target"], "predictor": wrapped["predictor"]}


def imported(content: object, folder: Path, sizes: Sizes = SIZES) -> Path:
    torch.save(content, folder / "file.pt")
    import_checkpoint(folder / "file.pt", folder / "out", sizes)
    return folder / "out"


def same_features(one: Path, other: Path) -> bool:
    return torch.equal(load_encoder(one)(FRAMES), load_encoder(other)(FRAMES))


def test_ten_mask_tokens_tell_a_left_over_table(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    out = imported(released(trained, tokens=10, table=Grid(2, 4, 4)), tmp_path)
    assert read_weights(out).model.rope == "tiled"
    assert same_features(out, trained)
    assert "is taken for V-JEPA 2 with tiled positions, 3 heads, 2 in the predictor" in caplog.text
    assert "its pos_embed is left over and not used" in caplog.text


def test_the_positions_can_be_given(trained: Path, tmp_path: Path) -> None:
    content = released(trained, table=Grid(2, 4, 4))
    for positions, rope in (("rope", "tiled"), ("sincos", "sincos"), (None, "sincos")):
        (tmp_path / rope / str(positions)).mkdir(parents=True)
        out = imported(content, tmp_path / rope / str(positions), Sizes(**{**vars(SIZES), "positions": positions}))
        assert read_weights(out).model.rope == rope
    with pytest.raises(BadInput, match="has no pos_embed, so its positions are not sines and cosines"):
        imported(released(trained), tmp_path, Sizes(**{**vars(SIZES), "positions": "sincos"}))


def test_contradictory_marks_are_asked_about(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"2 mask tokens .* 8 x 16 x 16 tokens, .* --positions rope for the second"):
        imported(released(trained, table=Grid(8, 16, 16)), tmp_path)


def test_a_table_of_unknown_positions_is_left_unused_on_request(trained: Path, tmp_path: Path) -> None:
    content = released(trained)
    content["encoder"]["module.backbone.pos_embed"] = torch.randn(1, 32, 48)
    with pytest.raises(BadInput, match="Learned positions are not supported, and --positions rope ignores them"):
        imported(content, tmp_path)
    assert same_features(imported(content, tmp_path, Sizes(**{**vars(SIZES), "positions": "rope"})), trained)


def test_a_table_in_a_vjepa_2_1_file_is_left_over(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"levels": (0, 1), "still_tokens": True, "predict_context": True, "rope": "interleaved"}
    run = make_trained(tmp_path / "run", rope_cells=16, **settings)
    content = released(run, table=Grid(2, 4, 4))
    assert same_features(imported(content, tmp_path), run)


def flat(trained: Path, prefix: str) -> dict:
    parts = released(trained, prefix="")
    return {f"{prefix}{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}


@pytest.mark.parametrize(
    "content",
    [
        lambda run: released(run, prefix="_orig_mod.module.backbone."),
        lambda run: {"state_dict": flat(run, "model.")},
        lambda run: {"model": released(run)},
        lambda run: flat(run, "module."),
        lambda run: {part: {f"module.{n}": t.bfloat16().float().half().float() for n, t in named.items()}
                     for part, named in released(run, prefix="").items()},
        lambda run: {**released(run), "loss": np.float64(0.5), "lr": np.float32(1e-3), "rates": np.arange(3)},
        lambda run: {**released(run), "args": argparse.Namespace(lr=1e-3), "opt": {"state": {}}, "epoch": 3},
    ],
    ids=["compiled", "lightning", "nested", "flat", "rounded", "numpy", "namespace"],
)  # fmt: skip
def test_files_of_forks_are_read(trained: Path, tmp_path: Path, content: Callable[[Path], dict]) -> None:
    out = imported(content(trained), tmp_path)
    torch.testing.assert_close(load_encoder(out)(FRAMES), load_encoder(trained)(FRAMES), atol=0.05, rtol=0)
    assert read_weights(out).mask_tokens == 2


def test_a_bare_encoder_and_an_old_file_are_read(trained: Path, tmp_path: Path) -> None:
    content = released(trained, prefix="module.")["target_encoder"]
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    import_checkpoint(tmp_path / "old.pt", tmp_path / "out", SIZES)
    assert same_features(tmp_path / "out", trained)


def test_the_object_in_the_way_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"in addition to tensors and numbers \(pathlib.*PosixPath\).* save the parts"):
        imported({**released(trained), "folder": tmp_path}, tmp_path)


def test_a_model_with_a_class_token_is_imported(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run", _without_predictor=True, causal=True)
    export(run, tmp_path / "native", format="native")
    content = json.loads((tmp_path / "native" / "model.json").read_text())
    content["model"]["class_token"] = True
    (tmp_path / "native" / "model.json").write_text(json.dumps(content))
    tensors = load_file(tmp_path / "native" / "model.safetensors") | {"encoder.cls_token": torch.ones(1, 1, 48)}
    save_file(tensors, tmp_path / "native" / "model.safetensors")
    import_checkpoint(tmp_path / "native", tmp_path / "out")
    assert same_features(tmp_path / "out", tmp_path / "native")
    assert read_weights(tmp_path / "out").provenance["settings"]["objective"]["name"] == "levjepa"
    with pytest.raises(BadInput, match="its class token is of levjepa, and --objective is vjepa2"):
        import_checkpoint(tmp_path / "native", tmp_path / "other", Sizes(objective="vjepa2"))


def test_an_encoder_of_vjepa_2_1_gets_its_own_predictor(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run", levels=(0, 1), predict_context=True, rope="interleaved")
    content = {"ema_encoder": released(run)["target_encoder"]}
    for objective, name in ((None, "vjepa2_1"), ("vjepa2", "vjepa2")):
        (tmp_path / name).mkdir()
        out = imported(content, tmp_path / name, Sizes(**{**vars(SIZES), "objective": objective}))
        assert read_weights(out).provenance["settings"]["objective"]["name"] == name


# ---- Hugging Face folders


@pytest.fixture(scope="module")
def hf(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("folders") / "hf"
    export(trained, out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_folder_of_any_float_type_is_loaded_in_fp32(hf: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    shutil.copytree(hf, tmp_path / "half")
    tensors = load_file(hf / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "half" / "model.safetensors")
    encoder = load_encoder(tmp_path / "half")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert export(tmp_path / "half", tmp_path / "again")["check"]["features_max_abs_difference"] == 0
    assert same_features(tmp_path / "half", tmp_path / "again")


def changed(hf: Path, out: Path, settings: dict, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(hf, out)
    content = json.loads((hf / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**content, **settings}))
    save_file({**load_file(hf / "model.safetensors"), **tensors}, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"use_rope_interleave": True}, {}, "config.json has use_rope_interleave, as folders of V-JEPA 2.1 have"),
        ({"num_distillation_outputs": 4}, {}, "config.json has num_distillation_outputs"),
        ({}, {"encoder.norms_block.0.weight": torch.ones(48)}, r"has encoder\.norms_block\.0\.weight, which"),
        ({}, {"encoder.layernorm.bias": torch.ones(48, dtype=torch.int8)}, "bias is int8, as in quantized models"),
    ],
)  # fmt: skip
def test_a_folder_of_another_model_is_refused(
    hf: Path, tmp_path: Path, settings: dict, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        load_encoder(changed(hf, tmp_path / "other", settings, tensors))


def test_a_folder_with_those_fields_unset_is_read(hf: Path, tmp_path: Path) -> None:
    unset = {"use_rope_interleave": False, "img_temporal_dim_size": None, "n_output_distillation": 1}
    assert same_features(changed(hf, tmp_path / "same", unset, {}), hf)


def test_tensors_that_could_run_code_are_refused(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin, which could run code"):
        load_encoder(tmp_path / "bin")


# ---- tracers


def test_a_traced_encoder_stays_usable(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa.nn.encoder._statistics", {})
    encoder = load_encoder(trained)
    clips = torch.cat([FRAMES, FRAMES])
    program = torch.export.export(encoder, (clips,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert type(load_encoder(trained)(FRAMES)) is torch.Tensor
    assert isinstance(encoder.encoder, Encoder)
    for batch in (FRAMES, torch.cat([clips, FRAMES])):  # the program takes any number of clips
        torch.testing.assert_close(program.module()(batch), encoder(batch))


def test_statistics_made_in_inference_mode_serve_training(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vjepa.nn.encoder._statistics", {})
    encoder = load_encoder(trained).requires_grad_(True)
    with torch.inference_mode():
        encoder(FRAMES)
    encoder(FRAMES).mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
