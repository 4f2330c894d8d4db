"""What was exported, loaded again by the program that it is meant for: does it give the same numbers?

In fp32 on the CPU the largest difference must be 0.0. Models are in memory one after another, never two at once.

Letters: T frames, H W pixels, N tokens of a clip, V visible, K hidden, D width, P channels of a prediction.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vjepa.nn.attentive_probe import Classifier
from vjepa.nn.encoder import Encoder, View, normalise
from vjepa.nn.grid import Grid
from vjepa.nn.predictor import Predictor, PredictorInput
from vjepa.weights.load import read_weights
from vjepa.weights.weights import Weights
from vjepa_data.evaluation.clips import centre_view
from vjepa_data.rng import generator

log = logging.getLogger(__name__)


def fixed_clip(weights: Weights) -> UInt8[Tensor, "1 T H W C"]:
    """A fixed clip of noise: as many frames as the model saw, but two at least."""
    frames = max(weights.frames, weights.model.tubelet_frames)
    draw = generator(0, "export check")
    return torch.from_numpy(draw.integers(0, 256, (1, frames, weights.px, weights.px, 3), dtype="uint8"))


def _sides(weights: Weights) -> tuple[Int[Tensor, "1 V"], Int[Tensor, "1 K"], Grid]:
    """The first half of the tokens is visible, the second hidden: indices, and the grid."""
    clip = fixed_clip(weights)
    grid = Grid.of(clip.shape[1], weights.px, weights.px, weights.model)
    index = torch.arange(grid.tokens)[None]
    half = max(1, grid.tokens // 2)
    return index[:, :half], index[:, half:] if grid.tokens > 1 else index, grid


@torch.no_grad()
def _ours(weights: Weights, token: int) -> tuple[Float[Tensor, "1 N D"], Float[Tensor, "1 K P"]]:
    """Features of the fixed clip, and predictions of its second half from its first; features again, if it has none."""
    with torch.device("meta"):
        encoder, predictor = Encoder(weights.model), Predictor(weights.model, max(1, weights.mask_tokens))
    encoder.load_state_dict(weights.tensors.part("encoder"), assign=True)
    _settle(encoder)
    view = View(normalise(fixed_clip(weights)))
    (features,) = encoder([view])
    if not weights.mask_tokens:
        return features, features
    (context,) = encoder([view], levels=True) if weights.model.levels else (features,)
    del encoder
    predictor.load_state_dict(weights.tensors.part("predictor"), assign=True)
    _settle(predictor)
    visible, hidden, grid = _sides(weights)
    guess = predictor([PredictorInput(context[:, : visible.shape[1]], visible, hidden, grid, token)])[0]
    return features, guess


@torch.no_grad()
def check_hf(folder: Path, weights: Weights, order: list[int]) -> dict[str, Any]:
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
def check_classifier(folder: Path, weights: Weights, classifier: Classifier) -> dict[str, Any]:
    model, _ = _load_with_transformers("AutoModelForVideoClassification", folder)
    features, _ = _ours(weights, 0)
    _settle(classifier.probe)
    difference = (classifier.probe(features) - model(_hf_clip(weights)).logits).abs().max().item()
    if difference != 0:
        raise ValueError(f"loaded back with transformers, the classifier's logits differ by {difference}")
    return {"logits_max_abs_difference": difference}


def _hf_clip(weights: Weights) -> Float[Tensor, "1 T C H W"]:
    return normalise(fixed_clip(weights)).transpose(1, 2)


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
def check_native(folder: Path, weights: Weights) -> dict[str, Any]:
    features, guess = _ours(weights, 0)
    got, got_guess = _ours(read_weights(folder), 0)
    return _compare("vjepa", features, got, guess, got_guess)


def _compare(
    loader: str,
    features: Float[Tensor, "1 N D"],
    got: Float[Tensor, "1 N D"],
    guess: Float[Tensor, "1 K P"],
    got_guess: Float[Tensor, "1 K P"],
) -> dict[str, Any]:
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
