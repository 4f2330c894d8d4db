"""Export an encoder as a program that needs none of our code, as torch.export's pt2 or as ONNX.

whole clips     frames uint8 [B T H W C]                   --> features [B t h w D]
a stream        frames of one tubelet, keys, values, time  --> features [B n D], keys, values, time
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vjepa.export.verify import fixed_clip
from vjepa.nn.encoder import MEAN, STD, View
from vjepa.nn.streaming import StreamStep
from vjepa.weights.weights import Weights
from vjepa_data.errors import BadInput

TOLERANCE = 1e-4
"""Largest accepted difference of features of order 1, which the program computes in another order."""

STREAM_INPUTS = ("frames", "keys", "values", "time")
STREAM_OUTPUTS = ("features", "next_keys", "next_values", "next_time")

Run = Callable[..., Sequence[Tensor]]


class _Program(nn.Module):
    """The exported computation, from uint8 frames to features."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.encoder = weights.encoder().encoder
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None])

    def forward(self, frames: UInt8[Tensor, "B T H W C"]) -> Float[Tensor, "B t h w D"]:
        tubelet, patch = self.encoder.settings.tubelet_frames, self.encoder.settings.patch_px
        (tokens,) = self.encoder([View((frames.movedim(-1, 1).float() / 255 - self.mean) / self.std)])
        _, steps, height, width, _ = frames.shape
        return tokens.unflatten(1, (steps // tubelet, height // patch, width // patch))


@torch.no_grad()
def write_program(path: Path, weights: Weights) -> dict[str, Any]:
    """Trace the encoder for any number of clips, load it back, and compare the features of 1 and of 3 clips.

    Args:
        path: file to write. `.pt2` or `.onnx` tells the format.
        weights: the model.

    Raises:
        ValueError: the loaded program's features differ.
    """
    eager, clip = _Program(weights), fixed_clip(weights)
    clips = torch.cat([clip, clip.flip(1)])
    dynamic = ({0: torch.export.Dim("clips")},)
    run, facts = _write(path, eager, (clips,), dynamic, inputs=("frames",), outputs=("features",))
    difference = max((run(x)[0] - eager(x)).abs().max().item() for x in (clip, torch.cat([clips, clip])))
    return {"features_max_abs_difference": _checked(difference), "clips": [1, 3], **facts}


@torch.no_grad()
def write_stream_step(path: Path, weights: Weights, window: int | None = None) -> dict[str, Any]:
    """Trace a step of a stream for any number of videos, load it back, and compare features beyond the window.

    Args:
        path: file to write. `.pt2` or `.onnx` tells the format.
        weights: a causal model with true rotary positions.
        window: tubelets that a token attends to, its own included, by default as in `model.stream()`.

    Raises:
        BadInput: the model cannot stream.
        ValueError: the loaded program's features differ.
    """
    encoder = weights.encoder()
    reach = encoder.stream(window).window
    step = StreamStep(encoder.encoder, window=reach, px=weights.px).eval()
    clip = fixed_clip(weights)[:, : weights.model.tubelet_frames]
    streams = torch.export.Dim("streams")
    dynamic = ({0: streams}, {1: streams}, {1: streams}, None)
    example = (torch.cat([clip, clip.flip(2)]), *step.empty(2))
    run, facts = _write(path, step, example, dynamic, inputs=STREAM_INPUTS, outputs=STREAM_OUTPUTS)
    difference, ours, theirs = 0.0, step.empty(3), step.empty(3)
    for number in range(reach + 2):
        frames = torch.cat([clip, clip.flip(2), clip.flip(3)]).roll(number, 2)
        expected, *ours = step(frames, *ours)
        found, *theirs = run(frames, *theirs)
        difference = max(difference, (found - expected).abs().max().item())
    cache = ["B" if axis == 1 else size for axis, size in enumerate(step.empty(1)[0].shape)]
    facts = {**facts, "window": reach, "cache": cache}
    return {"features_max_abs_difference": _checked(difference), "steps": reach + 2, "streams": 3, **facts}


def _checked(difference: float) -> float:
    if difference > TOLERANCE:
        raise ValueError(f"the loaded program's features differ by {difference}; nothing was written")
    return difference


def _write(
    path: Path, eager: nn.Module, example: tuple[Tensor, ...], dynamic: Any, *, inputs: Sequence[str],
    outputs: Sequence[str],
) -> tuple[Run, dict[str, str]]:  # fmt: skip
    """Trace a module and write it. Return the program as loaded from the file, and versions."""
    program = torch.export.export(eager, example, dynamic_shapes=dynamic, strict=True)
    versions = {"torch": str(torch.__version__)}
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        back = torch.export.load(path).module()
        return (lambda *x: (found,) if isinstance(found := back(*x), Tensor) else found), versions
    onnx = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    assert onnx is not None
    onnx.save(path, external_data=False)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*values: Tensor) -> list[Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in zip(inputs, values, strict=True)})
        return [torch.from_numpy(np.asarray(value)) for value in found]

    return run, {**versions, "onnxruntime": onnxruntime.__version__}


def require_onnx() -> None:
    """Check that the packages for ONNX are installed.

    Raises:
        BadInput: a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"an onnx export is made and verified with {', '.join(missing)}, which is not installed. "
            "Run pip install 'vjepa-pretrain[onnx]', or use --format pt2."
        )
