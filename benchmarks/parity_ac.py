"""Is our dynamics predictor with `condition: token` that of V-JEPA 2-AC? Same weights and inputs, both outputs.

    VJEPA2_REFERENCE=/path/to/vjepa2 python benchmarks/parity_ac.py [--record]

Our weights load into the published class by name. Compared are the output and the gradients of all parameters. Pictures
are square, as in its training. For other shapes the reference scales the columns by the number of rows, and our code
counts them. `--record` writes the published outputs to `tests/numerics/fixtures/`, with which a test compares without a
clone.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from reference import reference
from torch import Tensor, nn

from vjepa.nn.dynamics import DynamicsPredictor
from vjepa.nn.settings import EncoderSize, Model, Transformer
from vjepa_data.rng import generator

ALLOWED = 1e-4
RECORDING = Path(__file__).parent.parent / "tests" / "numerics" / "fixtures" / "ac_predictor.npz"
WIDTH, HEADS, DEPTH, EMBED, CONDITIONS, PATCH = 96, 4, 3, 48, 7, 16
CASES = ((64, 8), (64, 3), (112, 5))
"""Pixels and frames."""
RECORDED_EVERY = 2
"""Tokens per recorded token, to keep the recording below 100 KB."""


def main() -> int:
    torch.set_num_threads(1)
    worst, record = 0.0, {}
    with reference():
        from src.models.ac_predictor import vit_ac_predictor  # pyright: ignore[reportMissingImports]

        for px, frames in CASES:
            theirs = vit_ac_predictor(
                img_size=(px, px),
                patch_size=PATCH,
                num_frames=16,
                embed_dim=EMBED,
                predictor_embed_dim=WIDTH,
                depth=DEPTH,
                num_heads=HEADS,
                action_embed_dim=CONDITIONS,
            )
            ours, inputs = predictor(), inputs_of(px, frames)
            missing = theirs.load_state_dict(ours.state_dict(), strict=False)
            assert all(name.startswith("extrinsics_encoder") for name in missing.missing_keys), missing
            assert not missing.unexpected_keys, missing
            expected = theirs(inputs[0].flatten(1, 2), *inputs[1:])
            found = output_of(ours, px, frames)
            differences = {
                "output": difference(found, expected),
                "gradient": compare_gradients(ours, theirs, found, expected),
            }
            print(f"{px} px, {frames} frames: {differences}")
            worst = max(worst, *differences.values())
            record[f"{px}_{frames}"] = expected[:, ::RECORDED_EVERY].detach().numpy()
    print(f"largest relative difference: {worst:.1e}, allowed: {ALLOWED:g}")
    if "--record" in sys.argv:
        np.savez_compressed(RECORDING, **record)
    return int(worst > ALLOWED)


def predictor() -> DynamicsPredictor:
    """Return our predictor, with weights so large that all outputs matter."""
    settings = Model(
        encoder=EncoderSize(name="custom", width=EMBED, depth=1, heads=2),
        predictor=Transformer(width=WIDTH, depth=DEPTH, heads=HEADS),
        condition="token",
        init_std=0.1,
    )
    made = DynamicsPredictor(settings, latent=EMBED, actions=CONDITIONS, states=CONDITIONS)
    made.init_weights(0)
    return made


def inputs_of(px: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, actions and states of two clips."""
    shapes = (2, frames, (px // PATCH) ** 2, EMBED), (2, frames, CONDITIONS), (2, frames, CONDITIONS)
    draw = generator(0, "parity of ac", px, frames)
    features, actions, states = (torch.from_numpy(draw.standard_normal(shape, dtype="float32")) for shape in shapes)
    return features, actions, states


def output_of(ours: DynamicsPredictor, px: int, frames: int) -> Tensor:
    """Return our predictions, with the tokens of all frames in a row."""
    return ours.predict(*inputs_of(px, frames), grid=(px // PATCH, px // PATCH))[0].flatten(1, 2)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare_recorded(recorded: dict[str, np.ndarray]) -> float:
    """Return the largest relative difference between our outputs and the recorded outputs."""
    ours = predictor()
    with torch.no_grad():
        return max(
            difference(output_of(ours, px, frames)[:, ::RECORDED_EVERY], torch.from_numpy(recorded[f"{px}_{frames}"]))
            for px, frames in CASES
        )


def compare_gradients(ours: nn.Module, theirs: nn.Module, found: Tensor, expected: Tensor) -> float:
    """Return the largest relative difference of the gradients of a random sum of the outputs."""
    weights = torch.from_numpy(generator(1, "parity of ac").standard_normal(tuple(found.shape), dtype="float32"))
    named = dict(theirs.named_parameters())
    pairs = [(p, named[name]) for name, p in ours.named_parameters()]
    gradients = torch.autograd.grad((found * weights).sum(), [p for p, _ in pairs])
    others = torch.autograd.grad((expected * weights).sum(), [p for _, p in pairs])
    return max(difference(one, other) for one, other in zip(gradients, others, strict=True))


if __name__ == "__main__":
    sys.exit(main())
