"""All tests check signatures: a tensor of a wrong shape or type is an error where it is passed."""

import pytest
import torch
from jaxtyping import TypeCheckError

from vjepa.config import BLOCKS, Transformer
from vjepa.methods.masking import Mask, sample_masks
from vjepa.methods.regularizers import vicreg
from vjepa.monitoring.collapse import monitor
from vjepa.nn.attention import Segments, attention
from vjepa.nn.blocks import Attention
from vjepa.nn.encoder import normalise
from vjepa.nn.grid import Grid


def test_a_missing_axis_is_an_error() -> None:
    with pytest.raises(TypeCheckError, match=r"'frames'"):
        normalise(torch.zeros(4, 8, 8, 3, dtype=torch.uint8))  # no clips
    rotation, segments = torch.zeros(10, 2, 3), Segments.of([(2, 5)], device=torch.device("cpu"))
    with pytest.raises(TypeCheckError, match=r"'x'"):
        Attention(Transformer(width=12, depth=1, heads=2))(torch.zeros(2, 5, 12), rotation, segments)  # not packed
    with pytest.raises(TypeCheckError, match=r"'features'"):
        monitor(torch.zeros(2, 5, 12), lambda x: x)


def test_axes_of_one_name_have_equal_length() -> None:
    q, k = torch.zeros(6, 2, 8), torch.zeros(5, 2, 8)
    with pytest.raises(TypeCheckError, match=r"'k'"):
        attention(q, k, k, Segments.of([(2, 3)], device=torch.device("cpu")))
    with pytest.raises(TypeCheckError, match=r"'hidden'"):
        Mask(0, (0, 1), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))


def test_a_wrong_dtype_is_an_error() -> None:
    with pytest.raises(TypeCheckError, match=r"'frames'"):
        normalise(torch.zeros(1, 4, 8, 8, 3))  # pixels that were normalised already
    with pytest.raises(TypeCheckError, match=r"'z'"):
        vicreg(torch.zeros(4, 3, dtype=torch.int64), count=4)
    with pytest.raises(TypeCheckError, match=r"'slots'"):
        sample_masks(BLOCKS, Grid(2, 4, 4), seed=0, step=0, slots=5)  # pyright: ignore[reportArgumentType]
