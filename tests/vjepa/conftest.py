"""Fixtures of the trunk's tests."""

from collections.abc import Callable, Iterator

import pytest

from vjepa.config import Run
from vjepa.distributed.world import World, join


@pytest.fixture(scope="module")
def world(tiny_run: Callable[..., Run]) -> Iterator[World]:
    """This process alone, as a world of one rank."""
    with join(tiny_run().parallel) as world:
        yield world
