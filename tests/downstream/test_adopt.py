"""Checkpoints of other projects are imported byte for byte, and unsupported models are rejected by name."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_weights
from safetensors.torch import load_file

from vjepa import config
from vjepa.export.export import export
from vjepa.nn.grid import Grid
from vjepa.nn.positions import sine_cosine
from vjepa.weights.fair_checkpoints import Sizes
from vjepa.weights.import_checkpoint import import_checkpoint
from vjepa.weights.load import load_encoder, read_weights
from vjepa.weights.weights import expected_shapes
from vjepa_data.settings import BadInput

SIZES = Sizes(heads=3, predictor_heads=2, px=32, frames=4, fps=8.0)


def as_released(trained: Path, *, average: str = "target_encoder") -> dict:
    """Return the tensors of a run as V-JEPA 2 writes them: behind the wrappers of DDP and of several clip lengths."""

    def wrap(part: str) -> dict:
        tensors = load_weights(trained, part)
        if "mask_tokens" in tensors:
            tensors |= {f"mask_tokens.{kind}": token for kind, token in enumerate(tensors.pop("mask_tokens"))}
        return {f"module.backbone.{name}": tensor for name, tensor in tensors.items()}

    return {
        "encoder": wrap("encoder"),
        average: wrap("target"),
        "predictor": wrap("predictor"),
        "epoch": 3,
        "loss": 0.5,
    }


@pytest.fixture
def released(trained: Path, tmp_path: Path) -> Path:
    torch.save(as_released(trained), tmp_path / "vit.pt")
    return tmp_path / "vit.pt"


def test_a_released_file_is_imported_byte_for_byte(trained: Path, released: Path, tmp_path: Path) -> None:
    path = import_checkpoint(released, tmp_path / "out", SIZES)
    assert path == tmp_path / "out" / "checkpoints" / "step_00000000"
    for part in ("encoder", "target", "predictor"):
        before, after = load_weights(trained, part), load_weights(tmp_path / "out", part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    frames = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(load_encoder(tmp_path / "out")(frames), load_encoder(trained)(frames))


def test_a_round_trip_through_hugging_face_is_exact(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again")]
    assert configs[0] == configs[1]


def test_a_hugging_face_folder_of_several_files_is_read(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export(trained, tmp_path / "hf")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "cut", max_shard_size="100KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    frames = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(load_encoder(tmp_path / "cut")(frames), load_encoder(tmp_path / "hf")(frames))
    next((tmp_path / "cut").glob("*00002*")).unlink()
    with pytest.raises(BadInput, match=r"00002-of-\d+\.safetensors is missing"):
        load_encoder(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(BadInput, match="its weight_map names no files"):
        read_weights(tmp_path / "cut")


def test_mask_tokens_are_assigned_to_our_kinds(trained: Path, released: Path, tmp_path: Path) -> None:
    sizes = Sizes(**{**SIZES.__dict__, "mask_tokens": (1, 1, 0)})
    import_checkpoint(released, tmp_path / "out", sizes)
    before, after = (load_weights(run, "predictor")["mask_tokens"] for run in (trained, tmp_path / "out"))
    assert torch.equal(after, before[[1, 1, 0]])
    assert len(read_weights(tmp_path / "out").masks) == 3
    with pytest.raises(BadInput, match="mask_tokens has 2"):
        import_checkpoint(released, tmp_path / "other", Sizes(**{**SIZES.__dict__, "mask_tokens": (2,)}))


def test_the_grid_of_a_vjepa_file_is_inferred(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    run = make_trained(tmp_path / "run", rope="sincos", predictor={"width": 36, "depth": 1, "heads": 3})
    content, grid = as_released(run), Grid(2, 4, 4)
    ids = torch.arange(grid.tokens)[None]
    for part in ("encoder", "target_encoder"):
        content[part]["module.backbone.pos_embed"] = sine_cosine(grid, ids, 48)
    content["predictor"]["module.backbone.predictor_pos_embed"] = sine_cosine(grid, ids, 36)
    torch.save(content, tmp_path / "vit.pt")
    import_checkpoint(tmp_path / "vit.pt", tmp_path / "out", Sizes(heads=3, fps=8.0))
    before, after = read_weights(run), read_weights(tmp_path / "out")
    assert (after.model, after.px, after.frames) == (before.model, 32, 4)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    with pytest.raises(BadInput, match=r"model\.rope is 'sincos', and VJEPA2Model has 'tiled'"):
        export(tmp_path / "out", tmp_path / "hf")
    content["target_encoder"]["module.backbone.pos_embed"] = sine_cosine(grid, ids, 48) + 1e-3
    torch.save(content, tmp_path / "learned.pt")
    with pytest.raises(BadInput, match="pos_embed differs"):
        import_checkpoint(tmp_path / "learned.pt", tmp_path / "other", Sizes(heads=3))


def test_an_imported_vjepa_equals_its_authors_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    live = importlib.import_module("import_live")
    model = config.Model(
        encoder=config.EncoderSize(name="custom", width=48, depth=2, heads=3),
        predictor=config.Transformer(width=36, depth=1, heads=3),
        patch_px=8,
        rope="sincos",
    )
    names = {name: shape for name, shape in expected_shapes(model, 2).items() if not name.endswith("mask_tokens")}
    names |= {f"predictor.mask_tokens.{kind}": (1, 1, 36) for kind in range(2)}
    parts: dict[str, dict] = {"encoder": {}, "predictor": {}}
    for name, shape in names.items():
        part, _, rest = name.partition(".")
        parts[part][f"module.backbone.{rest}"] = live.value_of(part, rest, shape)
    for part, table, width in (("encoder", "pos_embed", 48), ("predictor", "predictor_pos_embed", 36)):
        ids = torch.arange(live.GRID.tokens)[None]
        parts[part][f"module.backbone.{table}"] = sine_cosine(live.GRID, ids, width)
    torch.save({**parts, "target_encoder": parts["encoder"]}, tmp_path / "vit.pth.tar")
    import_checkpoint(tmp_path / "vit.pth.tar", tmp_path / "out", Sizes(heads=3))
    recorded = np.load(live.RECORDED)
    for name, found in live.ours(tmp_path / "out").items():
        np.testing.assert_allclose(found, recorded[name], rtol=0, atol=live.TOLERANCE, err_msg=name)


def test_the_levels_of_a_vjepa_2_1_file_are_inferred(make_trained: Callable[..., Path], tmp_path: Path) -> None:
    settings = {
        "levels": (0, 1),
        "still_tokens": True,
        "predict_context": True,
        "rope": "interleaved",
        "rope_cells": 16,
    }
    run = make_trained(tmp_path / "run", **settings)
    torch.save(as_released(run), tmp_path / "vit.pt")
    import_checkpoint(tmp_path / "vit.pt", tmp_path / "out", SIZES)
    before, after = read_weights(run), read_weights(tmp_path / "out")
    assert after.model == before.model
    assert set(after.tensors) == set(before.tensors)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_an_encoder_alone_gets_a_new_predictor(trained: Path, tmp_path: Path) -> None:
    content = as_released(trained, average="ema_encoder")
    torch.save({"ema_encoder": content["ema_encoder"]}, tmp_path / "small.pt")
    import_checkpoint(tmp_path / "small.pt", tmp_path / "out", SIZES)
    wanted = load_weights(trained, "target")
    assert all(torch.equal(wanted[name], tensor) for name, tensor in load_weights(tmp_path / "out", "encoder").items())


class Foreign:
    """An object that only unpickling could restore."""


def spoil(change: Callable[[dict], object]) -> Callable[[Path, dict], None]:
    def write(path: Path, content: dict) -> None:
        change(content)
        torch.save(content, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, _: path.write_bytes(b"not torch"), "cannot be read|not read"),
        (lambda path, _: torch.save(Foreign(), path), "holds Python objects"),
        (lambda path, _: torch.save([1], path), "holds a list"),
        (lambda path, _: torch.save({"model": {}}, path), "holds model; expected the parts"),
        (
            spoil(lambda content: content["encoder"].update({"module.backbone.pos_embed": torch.zeros(1, 32, 48)})),
            "its pos_embed .* is not a table of sines and cosines",
        ),
        (
            spoil(
                lambda content: content["encoder"].update({"module.backbone.blocks.0.mlp.fc3.weight": torch.zeros(1)})
            ),
            "is a model with SwiGLU .* which is not supported",
        ),
        (
            spoil(lambda content: content["predictor"].update({"module.backbone.action_encoder.bias": torch.zeros(1)})),
            r"predictor has action_encoder\.bias; this architecture is not supported",
        ),
        (
            spoil(lambda content: content["encoder"].pop("module.backbone.blocks.1.norm2.bias")),
            r"encoder lacks blocks\.1\.norm2\.bias",
        ),
        (
            spoil(lambda content: content["target_encoder"].update({"module.backbone.norm.bias": torch.zeros(7)})),
            r"target norm\.bias is \[7\], expected \[48\]",
        ),
        (
            spoil(lambda content: content["encoder"].update({"module.backbone.cls_token": torch.zeros(1)})),
            "encoder has cls_token",
        ),
    ],
)
def test_an_unsupported_file_is_rejected(
    trained: Path, tmp_path: Path, write: Callable[[Path, dict], object], message: str
) -> None:
    write(tmp_path / "other.pt", as_released(trained))
    with pytest.raises(BadInput, match=message) as caught:
        import_checkpoint(tmp_path / "other.pt", tmp_path / "out", SIZES)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unknown_sizes_are_asked_for(released: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="width 48 and depth 2 is not in the table of sizes; give its --heads"):
        import_checkpoint(released, tmp_path / "out")


def test_an_import_needs_a_source_and_a_free_folder(released: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such model"):
        import_checkpoint(tmp_path / "nothing.pt", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        import_checkpoint(released, tmp_path / "taken", SIZES)
