"""A trained model to others, and from others.

    vjepa export RUN --out DIR --format hf        loads with `transformers.AutoModel.from_pretrained(DIR)`
    vjepa export RUN --out DIR --format native    loads with `vjepa.release.export.load_encoder(DIR)`
    vjepa export RUN --out DIR --format pt2       loads with `torch.export.load("DIR/model.pt2")`, without our code

An export is not finished before it was loaded again, by the program that it is meant for, and gave the same features
and the same predictions, bit for bit, in fp32 on the CPU. The table of names is `weights.HF_NAMES`.
"""

import importlib.util
import json
import logging
import platform
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vjepa import __version__
from vjepa.evals.clips import centre_view
from vjepa.evals.pooler import Classifier, hf_probe_tensors, load_classifier
from vjepa.model.encoder import MEAN, STD, Encoder, View, normalise
from vjepa.model.grid import Grid
from vjepa.model.predictor import Guess, Predictor
from vjepa.output import check_free, new_folder
from vjepa.release.card import model_card
from vjepa.release.weights import (
    InMemory,
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

Format = Literal["hf", "native", "pt2"]


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
        format: `hf` for stock transformers, `native` for what it cannot express, `pt2` for a program of the encoder
            alone: uint8 frames [B T H W C] to features [B t h w D], for any B but only this T, H and W.
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
        weights = _with_predictor(weights)
    order = mask_token_order(weights.mask_tokens, _mask_kind(weights, mask_kind)) if weights.mask_tokens else []
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
        elif format == "pt2":
            provenance["check"] = _write_program(folder / "model.pt2", weights)
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
    model = weights.model
    reasons = [
        reason
        for is_so, reason in (
            (model.rope != "tiled", f"model.rope is {model.rope!r}, and VJEPA2Model knows only the tiled form"),
            (model.rope_cells is not None, "model.rope_cells stretches positions"),
            (bool(model.levels), "model.levels gives features of several blocks, each with a norm"),
            (model.still_tokens, "model.still_tokens has a tokenizer for still pictures"),
            (model.guess_visible, "model.guess_visible has a second output layer"),
        )
        if is_so
    ]
    if reasons:
        raise BadInput(f"format hf cannot express this model: {'; '.join(reasons)}. Take --format native")


def _with_predictor(weights: Weights) -> Weights:
    """`VJEPA2Model` always has a predictor; a model without one gets one that is not trained, and the card says so."""
    if weights.mask_tokens:
        return weights
    log.warning("the model has no predictor; the export gets one that is not trained, only its features mean something")
    fresh = {f"predictor.{name}": tensor for name, tensor in Predictor(weights.model, 1).state_dict().items()}
    encoder = {f"encoder.{name}": tensor for name, tensor in weights.part("encoder").items()}
    return replace(
        weights,
        tensors=InMemory({**encoder, **fresh}),
        provenance={**weights.provenance, "predictor": "not trained"},
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


class _Program(nn.Module):
    """What a `pt2` export computes: bytes in, features out, nothing of ours needed."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.encoder = VideoEncoder(weights).encoder
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None])

    def forward(self, frames: Tensor) -> Tensor:
        tubelet, patch = self.encoder.settings.tubelet_frames, self.encoder.settings.patch_px
        (tokens,) = self.encoder([View((frames.movedim(-1, 1).float() / 255 - self.mean) / self.std)])
        _, steps, height, width, _ = frames.shape
        return tokens.unflatten(1, (steps // tubelet, height // patch, width // patch))


@torch.no_grad()
def _write_program(path: Path, weights: Weights) -> dict[str, Any]:
    """Trace the encoder with a free number of clips, load it back and compare at two numbers of clips."""
    eager, clip = _Program(weights), _clip(weights)
    clips = torch.cat([clip, clip.flip(1)])
    program = torch.export.export(eager, (clips,), dynamic_shapes=({0: torch.export.Dim("clips")},), strict=True)
    torch.export.save(program, path)
    back = torch.export.load(path).module()
    differences = [(back(x) - eager(x)).abs().max().item() for x in (clip, torch.cat([clips, clip]))]
    if max(differences) > 1e-4:
        raise ValueError(f"loaded back, the program's features differ by {max(differences)}; nothing was written")
    return {"features_max_abs_difference": max(differences), "clips": [1, 3], "torch": torch.__version__}


@torch.no_grad()
def _ours(weights: Weights, token: int) -> tuple[Tensor, Tensor]:
    """Features [1 N D] of the fixed clip, and predictions [1 N/2 D] of its second half from its first, if it can."""
    with torch.device("meta"):
        encoder, predictor = Encoder(weights.model), Predictor(weights.model, max(1, weights.mask_tokens))
    encoder.load_state_dict(weights.part("encoder"), assign=True)
    _settle(encoder)
    view = View(normalise(_clip(weights)))
    (features,) = encoder([view])
    if not weights.mask_tokens:
        return features, features
    (context,) = encoder([view], levels=True) if weights.model.levels else (features,)
    del encoder
    predictor.load_state_dict(weights.part("predictor"), assign=True)
    _settle(predictor)
    visible, hidden, grid = _sides(weights)
    guess = predictor([Guess(context[:, : visible.shape[1]], visible, hidden, grid, token)])[0]
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
