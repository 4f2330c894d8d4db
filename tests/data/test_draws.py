"""Random streams are functions of seed, purpose and numbers."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vjepa_data.rng import generator


def test_equal_arguments_give_equal_streams_in_another_process():
    code = "from vjepa_data.rng import generator as g; print(g(3, 'crop', 7, 11).integers(0, 2**62, 4).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(generator(3, "crop", 7, 11).integers(0, 2**62, 4).tolist())


def test_the_stream_equals_the_recording():
    draws = generator(0, "plan", 1, 2)
    assert draws.permutation(8).tolist() == PERMUTATION
    assert draws.integers(0, 1000, 4).tolist() == INTEGERS
    assert [round(x, 12) for x in draws.random(2).tolist()] == RANDOM


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
def test_different_numbers_give_different_streams(a: list[int], b: list[int]):
    same = generator(0, "x", *a).integers(0, 2**62) == generator(0, "x", *b).integers(0, 2**62)
    assert same == (a == b)


def test_purpose_and_numbers_are_hashed_separately():
    first = {int(generator(1, p, *n).integers(0, 2**62)) for p, n in [("a", (1,)), ("a", ()), ("a1", ()), ("", (1, 1))]}
    assert len(first) == 4


def test_neighbouring_streams_are_uncorrelated():
    table = np.stack([generator(0, "crop", step, slot).random(64) for step in range(30) for slot in range(30)])
    off_diagonal = np.corrcoef(table) - np.eye(len(table))
    # 900 streams of 64 numbers: the largest of 404,550 correlations of independent streams is about 0.57
    assert np.abs(off_diagonal).max() < 0.75
    assert abs(table.mean() - 0.5) < 0.01


PERMUTATION = [6, 2, 0, 4, 7, 3, 5, 1]
INTEGERS = [492, 573, 195, 959]
RANDOM = [0.965170261438, 0.833633898252]
