"""A file of the first V-JEPA, written by its authors' own classes, imported and held against them number by number.

    VJEPA2_REFERENCE=/somewhere python benchmarks/import_live.py            compare
    VJEPA2_REFERENCE=/somewhere python benchmarks/import_live.py --record   write tests/downstream/vjepa1.npz

Parameters are a function of their names, so that the recording holds features only. `tests/downstream/test_adopt.py`
compares with it without a clone.
"""

import argparse
import functools
import hashlib
import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from reference import reference
from torch import Tensor, nn

from vjepa.nn.encoder import View, normalise
from vjepa.nn.grid import Grid
from vjepa.nn.predictor import Predictor, PredictorInput
from vjepa.weights.fair_checkpoints import Sizes
from vjepa.weights.import_checkpoint import import_checkpoint
from vjepa.weights.load import read_weights

RECORDED = Path(__file__).parent.parent / "tests" / "downstream" / "vjepa1.npz"
GRID, PX, FRAMES, TOLERANCE = Grid(2, 4, 4), 32, 4, 2e-5


def value_of(part: str, name: str, shape: Sequence[int]) -> Tensor:
    """Return the value of a parameter: noise that follows from its name, around 1 for the weights of norms."""
    seed = int.from_bytes(hashlib.blake2b(f"{part}.{name}".encode(), digest_size=4).digest())
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def fill(module: nn.Module, part: str) -> None:
    """Give every parameter its value. Tables of positions keep theirs."""
    for name, parameter in module.named_parameters():
        if "pos_embed" not in name:
            parameter.data = value_of(part, name, parameter.shape)


def puzzle() -> tuple[Tensor, Tensor, Tensor]:
    """Two clips, uint8 [2 T H W 3], and which tokens are visible [2 10] and hidden [2 15]."""
    frames = torch.arange(2 * FRAMES * PX * PX * 3).remainder(251).to(torch.uint8).view(2, FRAMES, PX, PX, 3)
    order = torch.stack([(torch.arange(GRID.tokens) * step) % GRID.tokens for step in (5, 11)])
    return frames, order[:, :10].sort().values, order[:, 10:25].sort().values


def theirs(file: Path) -> dict[str, np.ndarray]:
    """Write a file as training wrote it, and compute with the classes that it came from."""
    size = {
        "img_size": (PX, PX), "patch_size": 8, "num_frames": FRAMES, "tubelet_size": 2, "num_heads": 3,
        "uniform_power": True, "use_sdpa": True, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
    }  # fmt: skip
    transformer = importlib.import_module("src.models.vision_transformer").VisionTransformer
    encoder = transformer(embed_dim=48, depth=2, **size).eval()
    narrow = {"predictor_embed_dim": 36, "depth": 1, "use_mask_tokens": True, "num_mask_tokens": 2}
    module = importlib.import_module("src.models.predictor").VisionTransformerPredictor
    predictor = module(embed_dim=48, **narrow, **size).eval()
    fill(encoder, "encoder")
    fill(predictor, "predictor")
    parts = {"encoder": encoder, "target_encoder": encoder, "predictor": predictor}
    wrapped = {
        part: {f"module.backbone.{name}": tensor for name, tensor in one.state_dict().items()}
        for part, one in parts.items()
    }
    torch.save({**wrapped, "epoch": 1}, file)
    frames, visible, hidden = puzzle()
    with torch.no_grad():
        found = {"features": encoder(normalise(frames)), "context": encoder(normalise(frames), masks=[visible])}
        for kind in range(2):
            found[f"prediction_{kind}"] = predictor(found["context"], [visible], [hidden], mask_index=kind)
    return {name: tensor.numpy() for name, tensor in found.items()}


@torch.no_grad()
def ours(folder: Path) -> dict[str, np.ndarray]:
    """Return the same numbers from the imported file."""
    weights = read_weights(folder)
    encoder, predictor = weights.encoder().encoder, Predictor(weights.model, weights.mask_tokens)
    predictor.load_state_dict(weights.tensors.part("predictor"))
    frames, visible, hidden = puzzle()
    (features,), (context,) = encoder([View(normalise(frames))]), encoder([View(normalise(frames), visible)])
    predictions = {
        f"prediction_{kind}": predictor([PredictorInput(context, visible, hidden, GRID, kind)])[0] for kind in range(2)
    }
    return {name: tensor.numpy() for name, tensor in {"features": features, "context": context, **predictions}.items()}


def main() -> None:
    """Print the largest difference of each number, and fail if any is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with reference(), tempfile.TemporaryDirectory() as place:
        wanted = theirs(Path(place) / "vit.pth.tar")
        import_checkpoint(Path(place) / "vit.pth.tar", Path(place) / "run", Sizes(heads=3))
        found = ours(Path(place) / "run")
    differences = {name: float(np.abs(found[name] - wanted[name]).max()) for name in wanted}
    print("\n".join(f"{name:10} {value:.2g}" for name, value in differences.items()))
    if args.record:
        np.savez_compressed(RECORDED, allow_pickle=False, **wanted)
    assert max(differences.values()) < TOLERANCE, "ours is not the network that the file came from"


if __name__ == "__main__":
    main()
