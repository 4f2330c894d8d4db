"""Export an encoder as a program that needs none of our code: `torch.export.load("model.pt2").module()`."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vjepa.export.verify import fixed_clip
from vjepa.nn.encoder import MEAN, STD, View
from vjepa.weights.weights import Weights


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
    """Trace the encoder for any number of clips, load it back, and compare the features of 1 and of 3 clips."""
    eager, clip = _Program(weights), fixed_clip(weights)
    clips = torch.cat([clip, clip.flip(1)])
    program = torch.export.export(eager, (clips,), dynamic_shapes=({0: torch.export.Dim("clips")},), strict=True)
    torch.export.save(program, path)
    back = torch.export.load(path).module()
    differences = [(back(x) - eager(x)).abs().max().item() for x in (clip, torch.cat([clips, clip]))]
    if max(differences) > 1e-4:
        raise ValueError(f"the loaded program's features differ by {max(differences)}; nothing was written")
    return {"features_max_abs_difference": max(differences), "clips": [1, 3], "torch": torch.__version__}
