"""The script for a machine with a GPU keeps what it has, and its stages run."""

import json
from pathlib import Path

import gpu
import gpu_correctness
import gpu_speed
import pytest
import torch

from vjepa.distributed.world import World
from vjepa.nn.attention import measure


def rows_of(script: str, folder: Path, *, limit_s: float) -> list[gpu.Row]:
    return list(gpu.run_stage(["sh", "-c", script], folder, gpu.Stage("some", limit_s, "1 s"), limit_s))


def test_a_stage_that_hangs_keeps_its_rows_and_ends(tmp_path: Path) -> None:
    rows = rows_of('echo \'{"what": "first", "ms": 2.0}\'; sleep 600', tmp_path, limit_s=3)
    assert rows == [
        {"stage": "some", "what": "first", "ms": 2.0},
        {"stage": "some", "what": "stopped after its 3 s", "estimate": "1 s"},
    ]


def test_a_stage_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    rows = rows_of("echo 'not json'; echo 'ValueError: bad' >&2; exit 3", tmp_path, limit_s=60)
    assert rows == [{"stage": "some", "what": "ended with code 3: ValueError: bad", "ok": False}]


def test_rows_are_on_the_disk_as_soon_as_they_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu.Results(tmp_path)
    results.add({"stage": "a", "what": "one", "ms": 1.23456, "parts": {"x": 1.0}, "ok": False})
    assert json.loads((tmp_path / "gpu.json").read_text()) == results.rows == results.failed
    assert "| a | one | ms 1.235, parts x 1 | **FAILED** |" in gpu.table(results.rows)


def test_every_stage_is_a_function() -> None:
    for name in [*(stage.name for stage in gpu.STAGES), gpu.PREPARATION]:
        function = name.split()[0]
        assert hasattr(gpu_correctness, function) or hasattr(gpu_speed, function), name


def test_a_measured_step_is_a_training_step(world: World) -> None:
    run = gpu_speed.shipped("vitl16_256px_16f", toy=True, clips=2, changes=("data.clip.frames=4",))
    trainer = gpu_speed.Trainer.of(run, world)
    before = trainer.networks["encoder"].blocks[0].attn.qkv.weight.clone()  # pyright: ignore
    row = gpu_speed.measure(trainer, blocks=1, steps=1)
    assert row["ok"]
    assert row["clips_per_s"] * row["step_ms"] == pytest.approx(2e3)
    assert set(row["parts_ms"]) == {"prepare", "forward", "backward", "optimizer"}
    assert not torch.equal(before, trainer.networks["encoder"].blocks[0].attn.qkv.weight)  # pyright: ignore


def test_attention_is_measured_on_given_shapes() -> None:
    cpu = torch.device("cpu")
    few, many = (
        measure("sdpa", [(1, n), (1, 8)], heads=1, head_width=8, device=cpu, dtype=torch.float32, repeats=3)
        for n in (8, 1024)
    )
    assert 0 < few < many
