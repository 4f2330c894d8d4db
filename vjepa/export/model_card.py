"""The model card, README.md of an export: description, use, results, limitations."""

from collections.abc import Sequence
from typing import Any

import torch

from vjepa.evals.base import Result
from vjepa.nn.grid import clip_grid
from vjepa.weights.weights import Weights
from vjepa.weights.world_model import part_kinds


def has_dynamics(weights: Weights) -> bool:
    """Return whether a model rolls out."""
    return any(kind.capability == "rollout" for kind in part_kinds(weights.tensors.names))


def model_card(weights: Weights, provenance: dict[str, Any], licence: str) -> str:
    """Return the README.md of an export."""
    table = "\n".join(f"| {name} | {value} |" for name, value in card_rows(weights, provenance))
    library = "transformers" if provenance["layout"] == "hf" else "vjepa"
    is_rollout = "rollout_max_abs_difference" in provenance["check"] or provenance["layout"] == "native"
    usages = _WORLD_USAGES if has_dynamics(weights) and is_rollout else _USAGES
    usage = usages[provenance["layout"]]
    cache = str(provenance["check"].get("cache")).replace("'B'", "1")
    if "cache" in provenance["check"]:
        usage = {"pt2": _STREAM_USAGE, "onnx": _ONNX_STREAM_USAGE}[provenance["layout"]]
    return _CARD.format(
        licence=licence,
        library=library,
        table=table,
        usage=usage.format(frames=weights.frames, px=weights.px, tubelet=weights.model.tubelet_frames, cache=cache),
        objective="predicting the features of hidden tokens" if weights.mask_tokens else "self-supervision",
        measured=_measured([Result.from_json(content) for content in provenance.get("results", ())]),
        limitations=_limitations(weights, provenance),
    )


def parameters_m(weights: Weights) -> float:
    """Return the number of parameters in millions, predictor included."""
    return sum(torch.Size(weights.tensors.shape(name)).numel() for name in weights.tensors) / 1e6


def card_rows(weights: Weights, provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return description and origin of the model as rows of name and value, in Markdown."""
    encoder, where = weights.model.encoder, provenance
    tokens = clip_grid(weights.frames, weights.px, weights.model).tokens
    rows = [
        ("encoder", f"{encoder.name}: width {encoder.width}, depth {encoder.depth}, heads {encoder.heads}"),
        ("parameters", f"{parameters_m(weights):.1f} M" + (", predictor included" if weights.mask_tokens else "")),
        ("input", f"{weights.frames} frames at {weights.fps:g} per second, {weights.px} x {weights.px} pixels"),
        ("output", f"{tokens} tokens of {encoder.width} channels, one for each {weights.model.tubelet_frames} frames x "
                   f"{weights.model.patch_px} x {weights.model.patch_px} pixels"),
        ("weights", {"target": "moving average of the encoder (target)", "encoder": "encoder as trained (online)"}.get(
            where.get("part", ""), "not recorded")),
        ("trained", f"{where['step']:,} steps in run `{where['run']}`" if "step" in where else "not recorded"),
        ("settings", f"`{where.get('settings_hash', 'not recorded')}`, in full in `provenance.json`"),
        ("data", ", ".join(f"`{one}`" for one in where.get("manifests", [])) or "not recorded"),
        ("masks", ", ".join(mask.mode for mask in weights.masks) or "not recorded"),
        ("positions", f"in time, height and width ({weights.model.rope})"),
    ]  # fmt: skip
    for name, signal in where.get("signals", {}).items():
        named = zip(signal["columns"], signal["units"], strict=True)
        rows.append((f"signal `{name}`", ", ".join(f"{column} ({unit})" for column, unit in named)))
    if "check" in where:
        differences = [value for name, value in where["check"].items() if name.endswith("max_abs_difference")]
        rows.append(("verified", f"loaded again, numbers differ by {max(differences)}"))
    return rows


def _measured(results: Sequence[Result]) -> str:
    """Return the results of evaluations as Markdown tables."""
    parts = []
    for result in results:
        columns = result.columns
        lines = [f"| {result.kind} | | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
        for (task, metric), cells in result.tasks.items():
            texts = [f"{cells[name].value:.3f} {cells[name].uncertainty}" if name in cells else "" for name in columns]
            lines.append(f"| {task} | {metric} | {' | '.join(texts)} |")
        protocol = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in result.protocol.items())
        parts.append("\n".join(lines) + f"\n\n{protocol}.")
    return "\n\n".join(parts) or "No evaluation yet."


def _limitations(weights: Weights, where: dict[str, Any]) -> str:
    if "cache" in where["check"]:
        return (
            f"- The program encodes one tubelet ({weights.model.tubelet_frames} frames of {weights.px} x {weights.px} "
            f"pixels) and sees {where['check']['window']} tubelets. The number of videos side by side is free."
        )
    if has_dynamics(weights) and where["layout"] != "onnx":
        return _WORLD_LIMITATIONS.format(px=weights.px, fps=weights.fps)
    if where["layout"] in ("pt2", "onnx"):
        return f"- Clips must have {weights.frames} frames of {weights.px} x {weights.px} pixels; their number is free."
    notes = [
        f"Frames must be {weights.px} x {weights.px}: `VJEPA2Model` computes positions from `crop_size` and gives "
        "wrong features for another size without an error."
        if where["layout"] == "hf"
        else "Frames may have any height and width that are multiples of the patch.",
        "Sample frames by time at the rate above, not by frame number.",
    ]
    if where["layout"] == "hf":
        kind = where["mask_token_order"][1 % weights.mask_tokens]
        if where.get("predictor") == "not trained":
            notes.append("The predictor is not trained: the method of this model has none.")
        notes.append(
            f"`VJEPA2Model` uses one mask token, that of kind {kind}. It encodes all tokens before it selects the "
            "visible tokens, so hidden tokens influence its predictions. In our training they do not."
        )
    return "\n".join(f"- {note}" for note in notes)


_CARD = """---
license: {licence}
library_name: {library}
pipeline_tag: video-classification
tags: [video, self-supervised, world-model, vjepa2, feature-extraction]
---

# A video encoder, pretrained by {objective}

| | |
|---|---|
{table}

## Use

```python
{usage}
```

## Results

{measured}

## Limitations

{limitations}
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
import vjepa

model = vjepa.load("THIS FOLDER")
frames = torch.randint(0, 256, (1, {frames}, {px}, {px}, 3), dtype=torch.uint8)  # B T H W C
features = model.encode(frames)  # [B t h w D]"""

_PROGRAM_USAGE = """import torch

encoder = torch.export.load("THIS FOLDER/model.pt2").module()
frames = torch.randint(0, 256, (2, {frames}, {px}, {px}, 3), dtype=torch.uint8)  # B T H W C, RGB
features = encoder(frames)  # [B t h w D]"""

_ONNX_USAGE = """import numpy
import onnxruntime

encoder = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")
frames = numpy.zeros((2, {frames}, {px}, {px}, 3), numpy.uint8)  # B T H W C, RGB
(features,) = encoder.run(None, {{"frames": frames}})  # [B t h w D]"""

_STREAM_USAGE = """import torch

step = torch.export.load("THIS FOLDER/model.pt2").module()
keys, values, time = torch.zeros({cache}), torch.zeros({cache}), torch.zeros(1, dtype=torch.int64)
for frames in torch.zeros(9, 1, {tubelet}, {px}, {px}, 3, dtype=torch.uint8):  # one tubelet after another
    features, keys, values, time = step(frames, keys, values, time)  # [B tokens D]"""

_ONNX_STREAM_USAGE = """import numpy
import onnxruntime

step = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")
keys, values, time = numpy.zeros({cache}, "f4"), numpy.zeros({cache}, "f4"), numpy.zeros(1, "i8")
for frames in numpy.zeros((9, 1, {tubelet}, {px}, {px}, 3), "u1"):  # one tubelet after another
    inputs = {{"frames": frames, "keys": keys, "values": values, "time": time}}
    features, keys, values, time = step.run(None, inputs)  # [B tokens D]"""

_USAGES = {"hf": _HF_USAGE, "native": _NATIVE_USAGE, "pt2": _PROGRAM_USAGE, "onnx": _ONNX_USAGE}

_ROLLOUT = """
frames = torch.zeros(1, 1, {px}, {px}, 3, dtype=torch.uint8)  # the frames that are known, B T H W C, RGB
actions = torch.zeros(1, 8, CHANNELS)  # in their own units: between the frames, then for each step
with torch.no_grad():
    predicted = model.rollout(frames, actions)  # [B steps h w D], to compare with model.latents(later frames)"""

_WORLD_USAGES = {
    "hf": """import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("THIS FOLDER", trust_remote_code=True).eval()  # or vjepa.load("THIS FOLDER")"""
    + _ROLLOUT,
    "native": """import torch
import vjepa

model = vjepa.load("THIS FOLDER")"""
    + _ROLLOUT,
    "pt2": """import torch

encode = torch.export.load("THIS FOLDER/encode.pt2").module()
step = torch.export.load("THIS FOLDER/step.pt2").module()
latent = encode(torch.zeros(1, {px}, {px}, 3, dtype=torch.uint8))  # [B h w D]
keys = values = torch.zeros(BLOCKS, 1, 0, HEADS, HEAD_WIDTH)  # of the frames before; see provenance.json
for number in range(8):
    latent, keys, values = step(latent, torch.zeros(1, CHANNELS), keys, values, torch.tensor(number))
    # With a window, keep the last (window - 1) * tokens: keys = keys[:, :, -kept:]""",
}

_WORLD_LIMITATIONS = """- Frames are {px} x {px}, at {fps:g} per second. An action acts from its frame to the next.
- Actions are in the units of the corpus. Their scale is a part of the model.
- The state of a model with states is given in a rollout, not predicted."""
