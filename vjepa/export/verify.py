"""Load an export again by the program that it is meant for, and compare its numbers with ours.

In fp32 on the CPU the largest difference must be 0.0. Models are in memory in turn, never two at once.

Letters: T frames, H W pixels, C channels, N tokens of a clip, V visible, K hidden, D width, LD width times levels.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vjepa.nn.attentive_probe import Classifier
from vjepa.nn.encoder import normalise
from vjepa.weights.load import read_weights
from vjepa.weights.tensors import aligned
from vjepa.weights.weights import Weights
from vjepa_data.evaluation.clips import centre_view
from vjepa_data.rng import generator

log = logging.getLogger(__name__)


def fixed_clip(weights: Weights) -> UInt8[Tensor, "1 T H W C"]:
    """Return a fixed clip of noise in the size that the model was trained on, of at least a tubelet."""
    frames = max(weights.frames, weights.model.tubelet_frames)
    draw = generator(0, "export check")
    return torch.from_numpy(draw.integers(0, 256, (1, frames, weights.px, weights.px, 3), dtype="uint8"))


def _halves(tokens: int) -> tuple[Int[Tensor, "1 V"], Int[Tensor, "1 K"]]:
    """Return the visible and the hidden tokens of the comparison: the first half of a clip and the second."""
    ids, half = torch.arange(tokens)[None], max(1, tokens // 2)
    return ids[:, :half], ids[:, half:] if tokens > 1 else ids


@torch.no_grad()
def _ours(weights: Weights, mask_kind: int) -> tuple[Float[Tensor, "1 N D"], Float[Tensor, "1 K LD"]]:
    """Return features of the fixed clip and predictions of its second half, or features twice without a predictor.

    The first half is encoded with the full clip in sight, as Hugging Face does.
    """
    model, clip = weights.world_model(), fixed_clip(weights)
    context = model.encoder.features(clip, levels=True)
    features = context[..., -model.width :]
    if model.predictor is None:
        return features, features
    visible, hidden = _halves(context.shape[1])
    context = context[:, : visible.shape[1]]
    return features, model.predict(context, visible, hidden, mask_kind=mask_kind, grid=model.encoder.grid(clip))


@torch.no_grad()
def check_hf(folder: Path, weights: Weights, order: list[int]) -> dict[str, Any]:
    """Compare an `hf` export as loaded by transformers with the weights that it was made of.

    Raises:
        ValueError: features or predictions differ.
    """
    features, predictions = _ours(weights, order[1 % len(order)])
    model, version = load_with_transformers("AutoModel", folder)
    visible, hidden = _halves(features.shape[1])
    got = model(_hf_clip(weights), context_mask=[visible], target_mask=[hidden])
    return {
        **_compare(
            "transformers", features, got.last_hidden_state, predictions, got.predictor_output.last_hidden_state
        ),
        "transformers": version,
        "processor": _check_processor(folder, weights),
    }


@torch.no_grad()
def check_classifier(folder: Path, weights: Weights, classifier: Classifier) -> dict[str, Any]:
    """Compare an exported classifier as loaded by transformers with its encoder and probe.

    Raises:
        ValueError: the logits differ.
    """
    model, _ = load_with_transformers("AutoModelForVideoClassification", folder)
    features, _ = _ours(weights, 0)
    align(classifier.probe)
    difference = (classifier.probe(features) - model(_hf_clip(weights)).logits).abs().max().item()
    if difference != 0:
        raise ValueError(f"the logits of the classifier loaded with transformers differ by {difference}")
    return {"logits_max_abs_difference": difference}


def _hf_clip(weights: Weights) -> Float[Tensor, "1 T C H W"]:
    return normalise(fixed_clip(weights)).transpose(1, 2)


def load_with_transformers(kind: str, folder: Path, **options: Any) -> tuple[Any, str]:
    """Load a model as users of transformers do, with every tensor matched, and return it with transformers' version."""
    import transformers

    had_progress_bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    model, report = getattr(transformers, kind).from_pretrained(
        folder, attn_implementation="sdpa", output_loading_info=True, local_files_only=True, **options
    )
    if had_progress_bar:
        transformers.utils.logging.enable_progress_bar()
    lists = ("missing_keys", "mismatched_keys") + (() if kind == "AutoModel" else ("unexpected_keys",))
    unmatched = [name for key in lists for name in report[key]]
    assert not unmatched, f"tensors that transformers lacks or does not know: {unmatched}"
    return align(model.float().eval()), transformers.__version__  # `dtype=` has another name before 4.56


def align(model: nn.Module) -> Any:
    """Align the parameters of a model like the parameters of our models (`aligned`)."""
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)
    return model


@torch.no_grad()
def check_native(folder: Path, weights: Weights) -> dict[str, Any]:
    """Compare a native export with the weights that it was made of.

    Raises:
        ValueError: features or predictions differ.
    """
    features, predictions = _ours(weights, 0)
    got, got_predictions = _ours(read_weights(folder), 0)
    return _compare("vjepa", features, got, predictions, got_predictions)


def _compare(
    loader: str,
    features: Float[Tensor, "1 N D"],
    got: Float[Tensor, "1 N D"],
    predictions: Float[Tensor, "1 K LD"],
    got_predictions: Float[Tensor, "1 K LD"],
) -> dict[str, Any]:
    result = {
        "features_max_abs_difference": (features - got).abs().max().item(),
        "predictions_max_abs_difference": (predictions - got_predictions).abs().max().item(),
    }
    if any(value != 0 for value in result.values()):
        raise ValueError(
            f"the export does not give the same numbers when loaded with {loader}: {result}; nothing was written. "
            "This is a bug or an untested version: please report it"
        )
    return result


def _check_processor(folder: Path, weights: Weights) -> float | str:
    """Return the largest difference between Hugging Face's processing of clips and ours, or why it was not checked."""
    if importlib.util.find_spec("torchvision") is None:
        reason = "not checked: AutoVideoProcessor needs torchvision, which is not installed"
        log.warning("video_preprocessor_config.json is %s", reason)
        return reason
    from transformers import AutoVideoProcessor

    processor = AutoVideoProcessor.from_pretrained(folder, local_files_only=True)
    draw, px = generator(0, "export check of the processor"), weights.px
    differences = []
    for height, width in ((px + 7, 2 * px), (2 * px + 5, px)):  # wide and tall, with an odd rest to cut off
        clip = torch.from_numpy(draw.integers(0, 256, (2, height, width, 3), dtype="uint8"))
        theirs = processor(clip.permute(0, 3, 1, 2), return_tensors="pt")["pixel_values_videos"]
        ours = normalise(centre_view(clip, px)[None]).transpose(1, 2)
        differences.append((theirs - ours).abs().max().item())
    if max(differences) > 0.02:  # one level of uint8 is 0.017 after normalisation
        raise ValueError(f"the exported processor and ours disagree by {max(differences):.3f}; nothing was written")
    return max(differences)
