"""Ranks compare settings, code and data before the first step. tests/distributed has ranks that differ."""

from collections.abc import Callable

import pytest

from vjepa.config import Run
from vjepa.engine.rank_consistency import first_batch
from vjepa_data.reader.batch import Batch
from vjepa_data.reader.loader import ClipLoader, open_plan

MakeRun = Callable[..., Run]


def test_pixels_are_compared_where_the_device_scales_them_too(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(loader={"crop_on": "device"})
    plan = open_plan(run.data, seed=run.seed, batch_size=run.batch_size)
    usual, honest = first_batch(run, plan, number=0), ClipLoader.__next__

    def other(self: ClipLoader) -> Batch:
        batch = honest(self)
        batch.uncropped[0].pixels.bitwise_not_()
        return batch

    monkeypatch.setattr(ClipLoader, "__next__", other)
    assert first_batch(run, plan, number=0) != usual
