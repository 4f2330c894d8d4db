"""README.md of an export: what it is, how to use it, what to mind."""

from collections.abc import Sequence
from typing import Any

import torch

from vjepa.evals.results import Result, tasks_of, uncertainty
from vjepa.weights.weights import Weights


def model_card(weights: Weights, provenance: dict[str, Any], licence: str) -> str:
    """README.md of an export."""
    where = provenance
    table = "\n".join(f"| {name} | {value} |" for name, value in card_rows(weights, provenance))
    library = "transformers" if where["layout"] == "hf" else "vjepa"
    usage = {"hf": _HF_USAGE, "native": _NATIVE_USAGE, "pt2": _PROGRAM_USAGE}[where["layout"]]
    return _CARD.format(
        licence=licence,
        library=library,
        table=table,
        usage=usage.format(frames=weights.frames, px=weights.px),
        measured=_measured(where.get("results", ())),
        notes=_notes(weights, where),
    )


def parameters_m(weights: Weights) -> float:
    """Millions of parameters, those of the predictor included."""
    return sum(torch.Size(weights.tensors.shape(name)).numel() for name in weights.tensors) / 1e6


def card_rows(weights: Weights, provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """What the model is and where it came from: name and value, in Markdown."""
    encoder, where = weights.model.encoder, provenance
    tokens = (weights.frames // weights.model.tubelet_frames) * (weights.px // weights.model.patch_px) ** 2
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
    if "check" in where:
        rows.append(("loaded back", f"features differ by {where['check']['features_max_abs_difference']}"))
    return rows


def _measured(results: Sequence[Result]) -> str:
    """Tables of what evaluations found, in Markdown."""
    parts = []
    for result in results:
        columns, tasks = tasks_of(result["rows"])
        lines = [f"| {result['kind']} | | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
        for (task, metric), cells in tasks.items():
            texts = [
                f"{cells[name]['value']:.3f} {uncertainty(cells[name])}" if name in cells else "" for name in columns
            ]
            lines.append(f"| {task} | {metric} | {' | '.join(texts)} |")
        said = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in result["protocol"].items())
        parts.append("\n".join(lines) + f"\n\n{said}.")
    return "\n\n".join(parts) or "Nothing yet."


def _notes(weights: Weights, where: dict[str, Any]) -> str:
    if where["layout"] == "pt2":
        return f"- Any number of clips, each of {weights.frames} frames of {weights.px} x {weights.px} pixels."
    notes = [
        f"Frames must be {weights.px} x {weights.px}: `VJEPA2Model` takes the positions of tokens from `crop_size` and "
        "gives wrong features for another size without an error."
        if where["layout"] == "hf"
        else "Frames may have any size that is a multiple of the patch.",
        "Sample frames by time, not by number, at the rate above.",
    ]
    if where["layout"] == "hf":
        kind = where["mask_token_order"][1 % weights.mask_tokens]
        if where.get("predictor") == "not trained":
            notes.append("The predictor is not trained: this model was learned without one.")
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

## Measured

{measured}

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
import vjepa

encoder = vjepa.load_encoder("THIS FOLDER")
frames = torch.randint(0, 256, (1, {frames}, {px}, {px}, 3), dtype=torch.uint8)  # B T H W C
features = encoder(frames)  # [B t h w D]"""

_PROGRAM_USAGE = """import torch

encoder = torch.export.load("THIS FOLDER/model.pt2").module()
frames = torch.randint(0, 256, (2, {frames}, {px}, {px}, 3), dtype=torch.uint8)  # B T H W C, RGB
features = encoder(frames)  # [B t h w D]"""
