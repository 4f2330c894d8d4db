"""Choices by measurement: made once, from decoders that agree and backends that work, and recorded in the run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.engine import choices
from vjepa.engine.choices import attention_of, decoder_of, step_shapes
from vjepa.engine.trainer import train
from vjepa_data.reader import decoder_choice
from vjepa_data.reader.decoder_choice import choose_decoder
from vjepa_data.reader.pipeline import open_plan
from vjepa_data.settings import Loader

MakeRun = Callable[..., Run]


def plan_of(run: Run):
    return open_plan(run.data, seed=run.seed, batch_size=run.batch_size)


def test_the_decoder_is_one_whose_pixels_are_those_of_the_others(tiny_run: MakeRun) -> None:
    run = tiny_run()
    found = choose_decoder(plan_of(run), run.data, Loader(decoder="auto"))
    assert {"decord", "pyav"} <= found.cpu_ms.keys()
    assert found.decoder in found.cpu_ms
    assert found.cpu_ms.keys() | found.refused.keys() == set(decoder_choice.DECODERS)


def test_a_decoder_that_fails_is_not_chosen(tiny_av1_run: MakeRun) -> None:
    run = tiny_av1_run()
    found = choose_decoder(plan_of(run), run.data, Loader(decoder="auto"))
    assert found.decoder != "decord"
    assert "decord" in found.refused


def test_a_decoder_with_other_pixels_is_not_chosen(tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, decode = tiny_run(), decoder_choice._decode

    def altered(name: decoder_choice.Decoder, *rest: object) -> object:
        pixels, _ = decode(name, *rest)  # pyright: ignore[reportArgumentType]
        if name != "pyav":
            return pixels, 50.0
        pixels[0][0, 0, 0, 0] ^= 1
        return pixels, 1.0

    monkeypatch.setattr(decoder_choice, "_decode", altered)
    found = choose_decoder(plan_of(run), run.data, Loader(decoder="auto"))
    assert found.decoder == "decord"
    assert found.refused["pyav"] == "its pixels differ from those of decord"


def test_the_losses_with_the_chosen_decoder_are_those_of_any(tiny_run: MakeRun, tmp_path: Path) -> None:
    losses = []
    for decoder in ("auto", "pyav"):
        folder = tmp_path / decoder
        assert train(tiny_run(loader={"decoder": decoder}, steps=2, track={"every_steps": 1}), folder) == 0
        losses.append(
            [json.loads(line)["loss/prediction"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        )
    assert losses[0] == losses[1]


def test_a_run_records_its_decoder_and_keeps_it(tiny_run: MakeRun, tmp_path: Path, world: World) -> None:
    run = tiny_run(loader={"decoder": "auto"})
    first = decoder_of(run, plan_of(run), tmp_path, world)
    record = json.loads((tmp_path / "choices.json").read_text())
    assert record["decoder"]["choice"] == first.decoder in record["decoder"]["measured"]["cpu_ms"]
    (tmp_path / "choices.json").write_text(json.dumps({"decoder": {"choice": "torchcodec", "measured": {}}}))
    assert decoder_of(run, plan_of(run), tmp_path, world).decoder == "torchcodec"
    assert decoder_of(tiny_run(), plan_of(run), tmp_path, world) == tiny_run().loader


def test_shapes_are_those_of_the_masks(tiny_run: MakeRun) -> None:
    (seen, heads, width), (asked, *_) = step_shapes(tiny_run(), clips=4)
    assert (heads, width) == (2, 12)
    assert [count for count, _ in seen] == [count for count, _ in asked] == [4, 4]
    assert all(len_asked == 2 * 16 for _, len_asked in asked)  # balanced: visible and hidden are all tokens
    assert all(length < 32 for _, length in seen)


def test_the_fastest_backend_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other backend runs without a GPU, so that times are given."""
    times = {"sdpa": 3.0, "varlen": 2.0}
    monkeypatch.setattr(choices, "measure", lambda name, *_, **__: times[name])
    shapes, cpu = [([(2, 3), (2, 5)], 1, 8)] * 2, torch.device("cpu")
    ask = lambda names: choices._backend(tmp_path, names, shapes, cpu, torch.float32)  # noqa: E731
    assert ask(["sdpa", "varlen"]) == "varlen"
    assert json.loads((tmp_path / "choices.json").read_text())["attention"]["measured"] == {
        "ms": {"sdpa": 6.0, "varlen": 4.0}
    }
    times["sdpa"] = 1.0
    assert ask(["sdpa", "varlen"]) == "varlen"  # a later attempt
    assert ask(["sdpa"]) == "sdpa"  # where varlen is gone


def test_a_cpu_is_not_measured(tiny_run: MakeRun, tmp_path: Path, world: World) -> None:
    assert attention_of(tiny_run(), tmp_path, world) is None
    assert not (tmp_path / "choices.json").exists()
