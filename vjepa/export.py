"""A trained model to others, and from others.

    vjepa export RUN --out DIR --format hf        loads with `transformers.AutoModel.from_pretrained(DIR)`
    vjepa export RUN --out DIR --format native    loads with `vjepa.export.load_encoder(DIR)`

An export is not finished before it was loaded again, by the program that it is meant for, and gave the same features
and the same predictions, bit for bit, in fp32 on the CPU. The table of names is `weights.HF_NAMES`.
"""

import importlib.util
import json
import logging
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vjepa import __version__
from vjepa.encoder import MEAN, STD, Encoder, View, normalise
from vjepa.evals.clips import centre_view
from vjepa.evals.pooler import Classifier, hf_probe_tensors, load_classifier
from vjepa.grid import Grid
from vjepa.output import check_free, new_folder
from vjepa.predictor import Guess, Predictor
from vjepa.weights import (
    Part,
    VideoEncoder,
    Weights,
    hf_config,
    hf_names,
    load_encoder,
    mask_token_order,
    native_json,
    read_weights,
)
from vjepa_data.draws import generator
from vjepa_data.settings import BadInput

__all__ = ["VideoEncoder", "export", "load_encoder"]

log = logging.getLogger(__name__)

Format = Literal["hf", "native"]


def export(
    source: Path,
    out: Path,
    *,
    format: Format = "hf",
    part: Part = "target",
    mask_kind: int | None = None,
    probe: Path | None = None,
    licence: str = "other",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model to a folder of its own, load it back, and compare.

    Args:
        source: a run, a checkpoint, or an earlier export.
        out: the new folder.
        format: `hf` for stock transformers, `native` for what it cannot express.
        part: whose features: `target` (the moving average, as V-JEPA 2 evaluates) or `encoder`.
        mask_kind: which kind of mask the predictor of an `hf` export answers to. `VJEPA2Model` can use one mask
            token only, the one at place 1, so that kind's token is put there. By default kind 1 (with the usual
            masks: the large blocks), or 0 where there is only one.
        probe: a probe that `vjepa eval attentive` trained on this model; an `hf` export is then a classifier, a
            `VJEPA2ForVideoClassification`, of which `AutoModel` still loads the encoder.
        licence: of the weights, for the model card; yours to decide.
        overwrite: replace an earlier export.

    Returns:
        The provenance that was written, with the result of the comparison under `check`.

    Raises:
        BadInput: no such model; the format cannot express it; transformers is missing; the place is taken.
        ValueError: what was written does not give the same features; nothing is left behind.
    """
    check_free(out, overwrite=overwrite)
    weights = read_weights(source, part)
    classifier = None if probe is None else _read_probe(probe, weights, format)
    if format == "hf":
        _require_transformers()
        _require_expressible(weights)
    order = mask_token_order(weights.mask_tokens, _mask_kind(weights, mask_kind))
    provenance = {
        **weights.provenance,
        "format": 1,
        "layout": format,
        "rope": weights.model.rope,
        "masks": [mask.model_dump(mode="json") for mask in weights.masks],
        "mask_token_order": order if format == "hf" else list(range(weights.mask_tokens)),
        "fps": weights.fps,
        "exported_by": {"vjepa": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    with new_folder(out, overwrite=overwrite, ours="provenance.json") as folder:
        if format == "hf":
            write_safetensors(folder / "model.safetensors", _with_probe(_hf_tensors(weights, order), classifier))
            _write_json(folder / "config.json", {**hf_config(weights), **_probe_config(classifier)})
            _write_json(folder / "video_preprocessor_config.json", hf_processor(weights.px))
            provenance["check"] = _check_hf(folder, weights, order)
            if classifier is not None:
                provenance["classes"] = list(classifier.classes)
                provenance["check"] |= _check_classifier(folder, weights, classifier)
        else:
            write_safetensors(folder / "model.safetensors", weights.tensors.items())
            _write_json(folder / "model.json", native_json(weights))
            provenance["check"] = _check_native(folder, weights)
        _write_json(folder / "provenance.json", provenance)
        (folder / "README.md").write_text(model_card(weights, provenance, licence))
    log.info("exported %s to %s (%s); loaded back: the same features, bit for bit", source, out, format)
    return provenance


# ---- what Hugging Face's model can express


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise BadInput(
            "an hf export is loaded back with transformers, which is not installed; "
            "pip install 'vjepa-pretrain[hf]', or take --format native"
        )


def _require_expressible(weights: Weights) -> None:
    """Refuse what `VJEPA2Model` would load without a word and compute differently."""
    if weights.model.rope != "tiled":
        raise BadInput(
            f"format hf cannot express model.rope {weights.model.rope!r}: VJEPA2Model knows only the tiled form; "
            "take --format native"
        )


def _mask_kind(weights: Weights, kind: int | None) -> int:
    count = weights.mask_tokens
    if kind is None:
        return 1 % count
    if not 0 <= kind < count:
        raise BadInput(f"mask_kind is {kind}, and the model has mask tokens 0 to {count - 1}; choose one of them")
    return kind


def _hf_tensors(weights: Weights, order: list[int]) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in hf_names(weights.model).items():
        tensor = weights.tensors[ours]
        if ours == "predictor.mask_tokens":
            tensor = tensor[order].reshape(len(order), 1, 1, -1)
        yield from zip(theirs, tensor.chunk(len(theirs)), strict=True)


def _read_probe(path: Path, weights: Weights, format: Format) -> Classifier:
    if format != "hf":
        raise BadInput(f"a probe is exported with format hf only, not {format}; leave --probe out")
    classifier, encoder = load_classifier(path), weights.model.encoder
    if (width := classifier.probe.linear.in_features) != encoder.width:
        raise BadInput(f"{path} was trained on features of width {width}, this model has {encoder.width}")
    if classifier.heads != encoder.heads:
        raise BadInput(
            f"{path} has {classifier.heads} heads, and VJEPA2ForVideoClassification gives a probe those of the encoder "
            f"({encoder.heads}); train it with as many"
        )
    return classifier


def _with_probe(tensors: Iterable[tuple[str, Tensor]], classifier: Classifier | None) -> Iterator[tuple[str, Tensor]]:
    if classifier is None:
        yield from tensors
        return
    yield from ((f"vjepa2.{name}", tensor) for name, tensor in tensors)
    yield from hf_probe_tensors(classifier.probe).items()


def _probe_config(classifier: Classifier | None) -> dict[str, Any]:
    if classifier is None:
        return {}
    return {
        "architectures": ["VJEPA2ForVideoClassification"],
        "num_pooler_layers": len(classifier.probe.pooler.blocks),
        "id2label": {str(number): name for number, name in enumerate(classifier.classes)},
        "label2id": {name: number for number, name in enumerate(classifier.classes)},
    }


def hf_processor(px: int) -> dict[str, Any]:
    """`video_preprocessor_config.json`: short side to px * 256 / 224, centre crop, ImageNet's mean and deviation."""
    return {
        "video_processor_type": "VJEPA2VideoProcessor",
        "size": {"shortest_edge": int(px * 256 / 224)},
        "crop_size": {"height": px, "width": px},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 2,
        "return_metadata": False,
    }


# ---- writing


_SAFE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors one after another, so that only one is in memory at a time.

    The library's own `save_file` wants them all at once, and doubles them.
    Source: the format of huggingface/safetensors: length of the header, header in JSON, data.
    """
    body = path.with_suffix(".body")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with body.open("wb") as file:
        for name, tensor in tensors:
            start = file.tell()
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            entry = {"dtype": _SAFE[tensor.dtype], "shape": list(tensor.shape)}
            header[name] = {**entry, "data_offsets": [start, file.tell()]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with path.open("wb") as file, body.open("rb") as data:
        file.write(len(text).to_bytes(8, "little") + text)
        while chunk := data.read(1 << 24):
            file.write(chunk)
    body.unlink()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---- loading it back


def _clip(weights: Weights) -> Tensor:
    """A fixed clip of noise, uint8 [1 T H W C]: as many frames as the model saw, but two at least."""
    frames = max(weights.frames, weights.model.tubelet_frames)
    draw = generator(0, "export check")
    return torch.from_numpy(draw.integers(0, 256, (1, frames, weights.px, weights.px, 3), dtype="uint8"))


def _sides(weights: Weights) -> tuple[Tensor, Tensor, Grid]:
    """The first half of the tokens is visible, the second hidden: indices [1 N/2], and the grid."""
    clip = _clip(weights)
    grid = Grid.of(clip.shape[1], weights.px, weights.px, weights.model)
    index = torch.arange(grid.tokens)[None]
    half = max(1, grid.tokens // 2)
    return index[:, :half], index[:, half:] if grid.tokens > 1 else index, grid


@torch.no_grad()
def _ours(weights: Weights, token: int) -> tuple[Tensor, Tensor]:
    """Features [1 N D] of the fixed clip, and predictions [1 N/2 D] of its second half from its first."""
    with torch.device("meta"):
        encoder, predictor = Encoder(weights.model), Predictor(weights.model, weights.mask_tokens)
    encoder.load_state_dict(weights.part("encoder"), assign=True)
    _settle(encoder)
    (features,) = encoder([View(normalise(_clip(weights)))])
    del encoder
    predictor.load_state_dict(weights.part("predictor"), assign=True)
    _settle(predictor)
    visible, hidden, grid = _sides(weights)
    (guess,) = predictor([Guess(features[:, : visible.shape[1]], visible, hidden, grid, token)])
    return features, guess


@torch.no_grad()
def _check_hf(folder: Path, weights: Weights, order: list[int]) -> dict[str, Any]:
    features, guess = _ours(weights, order[1 % len(order)])
    model, version = _load_with_transformers("AutoModel", folder)
    visible, hidden, _ = _sides(weights)
    got = model(_hf_clip(weights), context_mask=[visible], target_mask=[hidden])
    return {
        **_compare("transformers", features, got.last_hidden_state, guess, got.predictor_output.last_hidden_state),
        "transformers": version,
        "processor": _check_processor(folder, weights),
    }


@torch.no_grad()
def _check_classifier(folder: Path, weights: Weights, classifier: Classifier) -> dict[str, Any]:
    model, _ = _load_with_transformers("AutoModelForVideoClassification", folder)
    features, _ = _ours(weights, 0)
    _settle(classifier.probe)
    difference = (classifier.probe(features) - model(_hf_clip(weights)).logits).abs().max().item()
    if difference != 0:
        raise ValueError(f"loaded back with transformers, the classifier's logits differ by {difference}")
    return {"logits_max_abs_difference": difference}


def _hf_clip(weights: Weights) -> Tensor:
    return normalise(_clip(weights)).transpose(1, 2)  # [1 C T H W] to Hugging Face's [1 T C H W]


def _load_with_transformers(kind: str, folder: Path) -> tuple[Any, str]:
    """A model as any user of transformers loads it, every tensor in its place; and the version that loaded it."""
    import transformers

    shows = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    model, report = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, local_files_only=True
    )
    if shows:
        transformers.utils.logging.enable_progress_bar()
    kinds = ("missing_keys", "mismatched_keys") + (() if kind == "AutoModel" else ("unexpected_keys",))
    unmatched = [name for one in kinds for name in report[one]]
    assert not unmatched, f"names that transformers does not know or lacks: {unmatched}"
    return _settle(model.eval()), transformers.__version__


def _settle(model: nn.Module) -> Any:
    """Move parameters to memory of torch's own. In the last bit a product depends on how its inputs are aligned, and
    what was mapped from a file lies anywhere."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def _check_native(folder: Path, weights: Weights) -> dict[str, Any]:
    features, guess = _ours(weights, 0)
    got, got_guess = _ours(read_weights(folder), 0)
    return _compare("vjepa", features, got, guess, got_guess)


def _compare(loader: str, features: Tensor, got: Tensor, guess: Tensor, got_guess: Tensor) -> dict[str, Any]:
    result = {
        "features_max_abs_difference": (features - got).abs().max().item(),
        "predictions_max_abs_difference": (guess - got_guess).abs().max().item(),
    }
    if any(value != 0 for value in result.values()):
        raise ValueError(
            f"loaded back with {loader}, the model does not give the same numbers: {result}; "
            "nothing was written. This is a defect of ours, or a version that was never tried: please report it"
        )
    return result


def _check_processor(folder: Path, weights: Weights) -> float | str:
    """Largest difference between Hugging Face's processing of a clip and ours; what is in the way, if it cannot run."""
    if importlib.util.find_spec("torchvision") is None:
        return "not checked: AutoVideoProcessor needs torchvision, which is not installed"
    from transformers import AutoVideoProcessor

    clip = _clip(weights)[0]
    theirs = AutoVideoProcessor.from_pretrained(folder, local_files_only=True)(
        clip.permute(0, 3, 1, 2), return_tensors="pt"
    )["pixel_values_videos"]
    ours = normalise(centre_view(clip, weights.px)[None]).transpose(1, 2)
    difference = (theirs - ours).abs().max().item()
    if difference > 0.02:  # one level of uint8 is 0.017 after normalisation
        raise ValueError(f"the exported processor and ours disagree by {difference:.3f}; nothing was written")
    return difference


# ---- the model card


def model_card(weights: Weights, provenance: dict[str, Any], licence: str) -> str:
    """README.md of an export."""
    encoder, where = weights.model.encoder, provenance
    tokens = (weights.frames // weights.model.tubelet_frames) * (weights.px // weights.model.patch_px) ** 2
    millions = sum(torch.Size(weights.tensors.shape(name)).numel() for name in weights.tensors) / 1e6
    rows = [
        ("encoder", f"{encoder.name}: width {encoder.width}, depth {encoder.depth}, heads {encoder.heads}"),
        ("parameters", f"{millions:.1f} M, predictor included"),
        ("input", f"{weights.frames} frames at {weights.fps:g} per second, {weights.px} x {weights.px} pixels"),
        ("output", f"{tokens} tokens of {encoder.width} channels, one for each {weights.model.tubelet_frames} frames x "
                   f"{weights.model.patch_px} x {weights.model.patch_px} pixels"),
        ("weights", {"target": "moving average of the encoder (target)", "encoder": "encoder as trained (online)"}.get(
            where.get("part", ""), "not recorded")),
        ("trained", f"{where['step']:,} steps in run `{where['run']}`" if "step" in where else "not recorded"),
        ("settings", f"`{where.get('settings_hash', 'not recorded')}`, in full in `provenance.json`"),
        ("data", ", ".join(f"`{one}`" for one in where.get("manifests", [])) or "not recorded"),
        ("masks", ", ".join(mask.mode for mask in weights.masks) or "not recorded"),
        ("positions", f"rotary in time, height and width ({weights.model.rope})"),
        ("loaded back", f"features differ by {where['check']['features_max_abs_difference']}"),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    library = "transformers" if where["layout"] == "hf" else "vjepa"
    usage = _HF_USAGE if library == "transformers" else _NATIVE_USAGE
    return _CARD.format(
        licence=licence,
        library=library,
        table=table,
        usage=usage.format(frames=weights.frames, px=weights.px),
        notes=_notes(weights, where),
    )


def _notes(weights: Weights, where: dict[str, Any]) -> str:
    notes = [
        f"Frames must be {weights.px} x {weights.px}: `VJEPA2Model` takes the positions of tokens from `crop_size` and "
        "gives wrong features for another size without an error."
        if where["layout"] == "hf"
        else "Frames may have any size that is a multiple of the patch.",
        "Sample frames by time, not by number, at the rate above.",
    ]
    if where["layout"] == "hf":
        kind = where["mask_token_order"][1 % weights.mask_tokens]
        notes.append(
            f"`VJEPA2Model` uses one mask token, that of kind {kind}. It encodes all tokens before it picks the "
            "visible ones, so its predictions have seen what they predict; ours encodes the visible ones alone."
        )
    return "\n".join(f"- {note}" for note in notes)


_CARD = """---
license: {licence}
library_name: {library}
pipeline_tag: video-classification
tags: [video, self-supervised, world-model, vjepa2, feature-extraction]
---

# A video encoder, pretrained by predicting features of what is hidden

| | |
|---|---|
{table}

## Use

```python
{usage}
```

## Mind

{notes}
"""

_HF_USAGE = """import torch
from transformers import AutoModel, AutoVideoProcessor

model = AutoModel.from_pretrained("THIS FOLDER").eval()
processor = AutoVideoProcessor.from_pretrained("THIS FOLDER")  # needs torchvision
video = torch.randint(0, 256, ({frames}, 3, 480, 640), dtype=torch.uint8)  # T C H W
with torch.no_grad():
    outputs = model(**processor(video, return_tensors="pt"), skip_predictor=True)
features = outputs.last_hidden_state  # [1 tokens channels]"""

_NATIVE_USAGE = """import torch
from vjepa.export import load_encoder

encoder = load_encoder("THIS FOLDER")
frames = torch.randint(0, 256, (1, {frames}, {px}, {px}, 3), dtype=torch.uint8)  # B T H W C
features = encoder(frames)  # [B t h w D]"""
