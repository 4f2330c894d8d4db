"""Surprise without a world model: pixels that are copied or extrapolated, and a tracker that knows all.

Letters: B windows, F frames of a film, T frames of a window, C contexts, H W pixels.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from vjepa.weights.world_model import WorldModel
from vjepa_data.evaluation.clips import whole_view
from vjepa_data.synthetic import violations

log = logging.getLogger(__name__)

Pixels = UInt8[Tensor, "B T H W 3"]


def _pixel_surprise(
    predict: Callable[[Float[Tensor, "B C H W 3"], int], Float[Tensor, "B N H W 3"]],
) -> Callable[[Pixels, Sequence[int]], Float[ndarray, "B C"]]:
    """Return the mean L1 error of a prediction of all later frames from the first frames."""

    def score(frames: Pixels, contexts: Sequence[int]) -> Float[ndarray, "B C"]:
        values = frames.float()
        errors = []
        for context in contexts:
            predicted = predict(values[:, :context], frames.shape[1] - context).clamp(0, 255)
            errors.append((predicted - values[:, context:]).abs().mean((1, 2, 3, 4)) / 255)
        return torch.stack(errors, 1).cpu().numpy()

    return score


def _copy_last(seen: Tensor, steps: int) -> Tensor:
    return seen[:, -1:].expand(-1, steps, -1, -1, -1)


def _extrapolate(seen: Tensor, steps: int) -> Tensor:
    change = seen[:, -1:] - seen[:, -2:-1] if seen.shape[1] > 1 else torch.zeros_like(seen[:, -1:])
    ahead = torch.arange(1, steps + 1, device=seen.device).view(1, -1, 1, 1, 1)
    return seen[:, -1:] + change * ahead


def _flow(seen: Tensor, steps: int) -> Tensor:
    """Move the last frame on along the optical flow of the last two (Farneback), as cv2 measures it."""
    import cv2

    films = []
    for film in seen.to(torch.uint8).cpu().numpy():
        last = film[-1]
        before = film[-2] if len(film) > 1 else last
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, last)]
        flow = cv2.calcOpticalFlowFarneback(grey[0], grey[1], None, 0.5, 3, 9, 3, 5, 1.1, 0)  # pyright: ignore
        y, x = np.mgrid[: last.shape[0], : last.shape[1]].astype(np.float32)
        moved = [
            cv2.remap(last, x - step * flow[..., 0], y - step * flow[..., 1], cv2.INTER_LINEAR, borderMode=1)
            for step in range(1, steps + 1)
        ]
        films.append(np.stack(moved))
    return torch.from_numpy(np.stack(films)).float().to(seen.device)


def mean_difference(frames: Pixels, contexts: Sequence[int]) -> Float[ndarray, "B C"]:
    """Return the mean difference between neighbouring frames after each context."""
    change = frames.float().diff(dim=1).abs().mean((2, 3, 4)) / 255
    return torch.stack([change[:, context - 1 :].mean(1) for context in contexts], 1).cpu().numpy()


def pixel_baselines() -> Mapping[str, Callable[[Pixels, Sequence[int]], Float[ndarray, "B C"]]]:
    """Return the kinds of surprise at pixels, by name. Where cv2 cannot be imported, `flow` is left out."""
    found = {"copy pixels": _pixel_surprise(_copy_last), "extrapolate pixels": _pixel_surprise(_extrapolate)}
    try:
        import cv2  # noqa: F401
    except ImportError as error:  # not installed, or without a library of the system that it needs
        log.warning("the baseline flow is left out (%s); install the extra physics", error)
    else:
        found["flow"] = _pixel_surprise(_flow)
    return {**found, "frame difference": mean_difference}


def copy_last_features(model: WorldModel, frames: Pixels, contexts: Sequence[int]) -> Float[ndarray, "B C"]:
    """Return the distance of later frames from the last seen frame in features of single frames, without any time."""
    clips, steps = frames.shape[:2]
    tubelet = model.model.tubelet_frames
    still = frames.flatten(0, 1)[:, None].expand(-1, tubelet, -1, -1, -1)
    features = model.encode(still).flatten(1, 3).float()
    features = F.layer_norm(features, features.shape[-1:]).unflatten(0, (clips, steps))
    errors = [
        (features[:, context:] - features[:, context - 1 : context]).abs().mean((1, 2, 3)) for context in contexts
    ]
    return torch.stack(errors, 1).cpu().numpy()


def oracle_surprise(path: Path, frames: UInt8[ndarray, "F H W 3"], frame_step: int | None) -> float | None:
    """Return how far a film of ours is from what a tracker expects that knows the first half exactly.

    The tracker follows the laws of the generator from the scene of the first half, and compares pixels after the
    change. It is the highest score that can be reached.

    Returns:
        Mean L1 distance, or None for films without the labels of `vjepa synthesize violations`.
    """
    file = path.with_suffix(".json")
    if path.is_dir() or not file.is_file():
        return None
    try:
        labels = json.loads(file.read_text())
        scene = violations.read_scene(labels)
    except (ValueError, KeyError, TypeError):
        return None
    expected = violations.draw_film(scene, scene.a)
    step = frame_step or max(1, round(len(expected) / len(frames)))
    expected = whole_view(expected[::step], frames.shape[1]).numpy()[: len(frames)]
    after = -(-scene.change // step)
    return float(np.abs(expected[after:].astype(float) - frames[after:]).mean() / 255)
