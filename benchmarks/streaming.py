"""Speed, memory and exactness of a streamed encoder on one core: `python benchmarks/streaming.py --out FILE`.

    equality    features of a stream against one windowed pass, T = 64 tubelets, W 4 16 64, chunks of 1, 2, 5
    flatness    resident memory and time per tubelet over 10,000 tubelets
    speed       time per tubelet against encoding a sliding window of 16 tubelets

Weights are random: none of the numbers depends on them, apart from the rounding that equality shows.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from vjepa.config import Model
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.streaming import EncoderStream

SIZES = {
    "tiny": ({"name": "custom", "width": 48, "depth": 2, "heads": 2}, 8, 32),
    "demo": ({"name": "custom", "width": 96, "depth": 4, "heads": 3}, 8, 64),
    "ViT-S": ("vit_small", 16, 112),
}
"""Encoder, pixels of a patch and of a frame: 16, 64 and 49 tokens per tubelet."""

T = 64


def encoder_of(size: str, window: int | None = None) -> Encoder:
    """Return a causal encoder with random weights, 0.1 larger than at initialization so that attention is not flat."""
    shape, patch, _ = SIZES[size]
    form = {"encoder": shape, "patch_px": patch, "tubelet_frames": 1, "rope": "interleaved", "causal": True}
    encoder = Encoder(Model.model_validate({**form, "window": window}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder.requires_grad_(False)


def noise(size: str, tubelets: int) -> Tensor:
    """Return a fixed video of noise [1 3 T Y X]."""
    px = SIZES[size][2]
    return torch.randn(1, 3, tubelets, px, px, generator=torch.Generator().manual_seed(1))


def equality(size: str) -> dict[str, float]:
    """Return the largest difference of a stream from a windowed pass, and of W >= T from the causal pass."""
    clip, found = noise(size, T), {}
    for window in (4, 16, 64):
        (whole,) = encoder_of(size, window)([View(clip)])
        for chunk in (1, 2, 5):
            stream = EncoderStream(encoder_of(size), window=window)
            features = torch.cat([stream(part) for part in clip.split(chunk, dim=2)], 1).flatten(1, 2)
            found[f"W {window}, chunk {chunk}"] = (features - whole).abs().max().item()
    (causal,) = encoder_of(size)([View(clip)])
    found["W 64 against the causal pass"] = (causal - whole).abs().max().item()
    return found


def rss_mb() -> float:
    """Return the resident memory of this process, MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def flatness(size: str, tubelets: int = 10_000, window: int = 16) -> dict[str, float]:
    """Return memory and time per tubelet early and late in a long stream: medians of 100 tubelets."""
    stream, frame = EncoderStream(encoder_of(size), window=window), noise(size, 1)
    times, memory = [], {}
    for number in range(tubelets):
        start = time.perf_counter()
        stream(frame)
        times.append(time.perf_counter() - start)
        if number + 1 in (100, 1000, tubelets):
            memory[f"MB at {number + 1}"] = rss_mb()
    early, late = statistics.median(times[100:200]), statistics.median(times[-100:])
    return {"ms at 100": 1e3 * early, f"ms at {tubelets}": 1e3 * late, "ratio": late / early, **memory}


def speed(size: str, window: int = 16) -> dict[str, float]:
    """Return milliseconds per tubelet of a stream and of encoding a sliding window: medians, interleaved."""
    encoder = encoder_of(size)
    stream, frame, clip = EncoderStream(encoder, window=window), noise(size, 1), noise(size, window)
    for _ in range(window):
        stream(frame)
    streamed, encoded = [], []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(5):
            stream(frame)
        middle = time.perf_counter()
        encoder([View(clip)])
        streamed.append((middle - start) / 5)
        encoded.append(time.perf_counter() - middle)
    ours, theirs = statistics.median(streamed), statistics.median(encoded)
    return {"stream ms": 1e3 * ours, "sliding window ms": 1e3 * theirs, "ratio": theirs / ours}


def main() -> None:
    """Measure everything and write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tubelets", type=int, default=10_000)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["demo", "ViT-S"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    found["flatness, tiny"] = flatness("tiny", arguments.tubelets)
    for size in arguments.sizes:
        found[f"speed, {size}"] = speed(size)
        found[f"equality, {size}"] = equality(size)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
