"""Export a trained model in a format that other programs load.

    vjepa export RUN --out DIR --format hf        loads with `transformers.AutoModel.from_pretrained(DIR)`
    vjepa export RUN --out DIR --format native    loads with `vjepa.load(DIR)`
    vjepa export RUN --out DIR --format pt2       loads with `torch.export.load("DIR/model.pt2")`, without our code
    vjepa export RUN --out DIR --format onnx      loads with `onnxruntime.InferenceSession("DIR/model.onnx")`

Every export is loaded again by the program that it is meant for. It must give the same features and predictions, bit
for bit, in fp32 on the CPU. Otherwise the export fails. Tensors are read, written and freed in turn.
"""

import importlib.metadata
import importlib.util
import json
import logging
import platform
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vjepa.atomic import check_free, new_folder
from vjepa.evals.base import Result
from vjepa.evals.results import find_results, read_result
from vjepa.export.hf_world_model import check_world_model, world_model_config, write_code
from vjepa.export.model_card import has_dynamics, model_card
from vjepa.export.torch_export import require_onnx, write_program, write_stream_step
from vjepa.export.verify import check_classifier, check_hf, check_native
from vjepa.export.world_model_programs import write_world_model_programs
from vjepa.nn.attentive_probe import Classifier, hf_probe_tensors, load_classifier
from vjepa.nn.predictor import Predictor
from vjepa.version import __version__
from vjepa.weights.huggingface import hf_config, hf_names, hf_processor, mask_token_order
from vjepa.weights.load import read_weights
from vjepa.weights.native import FORMAT
from vjepa.weights.tensors import InMemory, write_safetensors
from vjepa.weights.weights import Part, Weights
from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)

PROGRAMS = ("pt2", "onnx")
"""Formats that hold a traced program of the encoder."""

Format = Literal["hf", "native", "pt2", "onnx"]


def export(
    source: Path,
    out: Path,
    *,
    format: Format = "hf",
    part: Part = "target",
    mask_kind: int | None = None,
    probe: Path | None = None,
    results: Sequence[Path] = (),
    licence: str = "other",
    stream: bool = False,
    window: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a model to a new folder, load it back, and compare features and predictions.

    Args:
        source: a run, a checkpoint, or an earlier export.
        out: the new folder.
        format: `hf` for stock transformers, `native` for any model, `pt2` and `onnx` for a program of the encoder
            alone: uint8 frames [B T H W C] to features [B t h w D], for any B but only this T, H and W.
            Of a model with dynamics, `hf` has its own code (`trust_remote_code`), and `pt2` is two programs, `encode`
            and `step`.
        part: encoder to export: `target` (the moving average, as V-JEPA 2 evaluates) or `encoder`.
        mask_kind: kind of mask that the predictor of an `hf` export uses. `VJEPA2Model` uses only the mask token at
            index 1, so the token of this kind is stored there. By default kind 1 (the large blocks of the usual
            masks), or 0 if it is the only kind.
        probe: a probe that `vjepa eval attentive` trained on this model. An `hf` export is then a classifier,
            `VJEPA2ForVideoClassification`, from which `AutoModel` still loads the encoder.
        results: files that `vjepa eval` wrote about this model, for the card, in addition to files in the folder of a
            run.
        licence: licence of the weights for the model card, which the owner chooses.
        stream: export a step of a stream, with the cache as inputs and outputs, instead of a pass over clips.
        window: tubelets that a token of the stream attends to, by default as in `model.stream()`.
        overwrite: replace an earlier export.

    Returns:
        The provenance as written, with the result of the comparison under `check`.

    Raises:
        BadInput: there is no such model, the format cannot express it, transformers is missing, or `out` exists.
        ValueError: the loaded export does not give the same features. Nothing is written.
    """
    check_free(out, overwrite=overwrite)
    _check_stream(format, stream=stream, window=window)
    if format == "onnx":
        require_onnx()
    weights = read_weights(source, part)
    is_world_model = has_dynamics(weights)
    if probe is not None and is_world_model:
        raise BadInput("a probe cannot be exported with a world model; remove --probe, or export its encoder")
    classifier = None if probe is None else _read_probe(probe, weights, format)
    if format == "hf":
        _require_transformers()
    if format == "hf" and not is_world_model:
        _require_expressible(weights)
        weights = _with_predictor(weights)
    order = mask_token_order(weights.mask_tokens, _mask_kind(weights, mask_kind)) if weights.mask_tokens else []
    measured = [one.to_json() for one in (*_own_results(source, weights), *map(read_result, results))]
    provenance = {
        **weights.provenance,
        "results": [*weights.provenance.get("results", ()), *measured],
        "format": 1,
        "layout": format,
        "rope": weights.model.rope,
        "masks": [mask.model_dump(mode="json") for mask in weights.masks],
        "mask_token_order": order if format == "hf" else list(range(weights.mask_tokens)),
        "fps": weights.fps,
        "exported_by": {"vjepa": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    with new_folder(out, overwrite=overwrite, ours="provenance.json") as folder:
        provenance["check"] = _write_form(folder, weights, format, order, classifier, stream=stream, window=window)
        if classifier is not None:
            provenance["classes"] = list(classifier.classes)
        _write_json(folder / "provenance.json", provenance)
        (folder / "README.md").write_text(model_card(weights, provenance, licence))
    log.info("exported %s to %s (%s) and verified it", source, out, format)
    return provenance


def _check_stream(format: Format, *, stream: bool, window: int | None) -> None:
    if format not in PROGRAMS and (stream or window is not None):
        raise BadInput(f"a stream is exported as a program, not as {format}; use --format pt2 or onnx")
    if window is not None and not stream:
        raise BadInput("--window belongs to streams; add --stream, or leave it out")


def _write_form(
    folder: Path,
    weights: Weights,
    format: Format,
    order: list[int],
    classifier: Classifier | None,
    *,
    stream: bool,
    window: int | None,
) -> dict[str, Any]:
    """Write the files of a format, load them back, and return the comparison with the model."""
    is_world_model = has_dynamics(weights)
    if format == "native":
        _write_native(folder, weights)
        return check_native(folder, weights)
    if format in PROGRAMS:
        program = folder / f"model.{format}"
        if stream:
            return write_stream_step(program, weights, window)
        if format == "pt2" and is_world_model:
            return write_world_model_programs(folder, weights)
        return write_program(program, weights)
    if is_world_model:
        _write_native(folder, weights)
        _write_json(folder / "config.json", world_model_config(weights))
        write_code(folder)
        return check_world_model(folder, weights)
    write_safetensors(folder / "model.safetensors", _with_probe(_hf_tensors(weights, order), classifier))
    _write_json(folder / "config.json", {**hf_config(weights), **_probe_config(classifier)})
    _write_json(folder / "video_preprocessor_config.json", hf_processor(weights.px))
    check = check_hf(folder, weights, order)
    return check if classifier is None else check | check_classifier(folder, weights, classifier)


def _own_results(source: Path, weights: Weights) -> list[Result]:
    """Return the results of evaluations of these weights in the folder of their run."""
    same = {key: weights.provenance.get(key) for key in ("run", "step", "part")}
    return [result for result in find_results(source) if same.items() <= result.model.items()]


# ---- limits of Hugging Face's model


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise BadInput(
            "an hf export is verified with transformers, which is not installed. "
            "Run pip install 'vjepa-pretrain[hf]', or use --format native."
        )
    try:
        from transformers import VJEPA2Model  # noqa: F401  transformers imports its own dependencies late
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        remedy = "mend or remove the package at fault"
        if "torchvision" in f"{reason}{''.join(traceback.format_tb(cause.__traceback__))}":
            found = importlib.metadata.version("torchvision")
            remedy = f"torchvision {found} does not fit torch {torch.__version__}: install one that fits, or remove it"
        raise BadInput(f"transformers cannot be loaded ({reason}); {remedy}, or use --format native") from None


# Settings of a model that `config.json` can express. Other settings must have their default, which is V-JEPA 2's value.
EXPRESSIBLE = ("encoder", "predictor", "patch_px", "tubelet_frames", "init_std")


def _require_expressible(weights: Weights) -> None:
    """Reject models that `VJEPA2Model` would load without an error and compute differently."""
    model = weights.model
    reasons = [
        f"model.{name} is {getattr(model, name)!r}, and VJEPA2Model has {field.default!r}"
        for name, field in type(model).model_fields.items()
        if name not in EXPRESSIBLE and getattr(model, name) != field.default
    ]
    parts = {name.partition(".")[0] for name in weights.tensors} - {"encoder", "predictor"}
    reasons += [f"it has the part {part}, and VJEPA2Model has no such part" for part in sorted(parts)]
    if reasons:
        raise BadInput(f"format hf cannot express this model: {'; '.join(reasons)}. Use --format native")


def _with_predictor(weights: Weights) -> Weights:
    """Add an untrained predictor to a model that has none, since `VJEPA2Model` requires it. The card says so."""
    if weights.mask_tokens:
        return weights
    log.warning("the model has no predictor; the export gets an untrained one, so use its features only")
    fresh = {f"predictor.{name}": tensor for name, tensor in Predictor(weights.model, 1).state_dict().items()}
    encoder = {f"encoder.{name}": tensor for name, tensor in weights.tensors.part("encoder").items()}
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
        raise BadInput(f"mask_kind is {kind}, and the model has mask tokens 0 to {count - 1}")
    return kind


def _hf_tensors(weights: Weights, order: list[int]) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in hf_names(weights.model).items():
        tensor = weights.tensors[ours]
        if ours == "predictor.mask_tokens":
            tensor = tensor[order].reshape(len(order), 1, 1, -1)
        yield from zip(theirs, tensor.chunk(len(theirs)), strict=True)


def _read_probe(path: Path, weights: Weights, format: Format) -> Classifier:
    if format != "hf":
        raise BadInput(f"a probe can only be exported with format hf, not {format}; remove --probe")
    classifier, encoder = load_classifier(path), weights.model.encoder
    if (width := classifier.probe.linear.in_features) != encoder.width:
        raise BadInput(f"{path} was trained on features of width {width}, this model has {encoder.width}")
    if classifier.heads != encoder.heads:
        raise BadInput(
            f"{path} has {classifier.heads} heads, and VJEPA2ForVideoClassification gives a probe as many as the "
            f"encoder. Train it with {encoder.heads} heads."
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


def _write_native(folder: Path, weights: Weights) -> None:
    write_safetensors(folder / "model.safetensors", weights.tensors.items())
    _write_json(folder / "model.json", _model_json(weights))


def _model_json(weights: Weights) -> dict[str, Any]:
    """Return the contents of `model.json`."""
    return {
        "format": FORMAT,
        "model": weights.model.model_dump(mode="json"),
        "px": weights.px,
        "frames": weights.frames,
        "fps": weights.fps,
        "masks": [mask.model_dump(mode="json") for mask in weights.masks],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
