"""A run of a single process on real shards leaves a complete record and resumes exactly."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import load_weights

from vjepa.checkpoints import checkpoint
from vjepa.config import Run
from vjepa.engine.signals import Stop
from vjepa.engine.trainer import train
from vjepa.methods.vjepa2.method import VJEPA2
from vjepa.monitoring.health import Unhealthy
from vjepa_data.settings import BadInput

MakeRun = Callable[..., Run]

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss/prediction"] for record in map(json.loads, lines)}


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = checkpoint.step_dir(folder / "checkpoints", step)
    return {
        f"{part}.{name}": tensor
        for part in ("encoder", "predictor", "target")
        for name, tensor in load_weights(path, part).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def straight(tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps without any trouble."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train(tiny_run(), folder) == 0
    return folder


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask to stop as a signal would, when so many steps are made."""
    calls = iter(range(1000))
    agreed = Stop.agreed

    def count(self: Stop) -> bool:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGUSR2)
        return agreed(self)

    monkeypatch.setattr(Stop, "agreed", count)


def test_a_run_leaves_its_settings_its_record_and_its_checkpoints(straight: Path, tiny_run: MakeRun) -> None:
    assert Run.model_validate(yaml.safe_load((straight / "config.yaml").read_text())) == tiny_run()
    assert sorted(losses(straight)) == [1, 2, 3, 4, 5, 6]
    assert (straight / "checkpoints" / "latest").read_text() == "step_00000006\n"
    attempt = json.loads((straight / "environment.json").read_text())["attempts"][0]
    assert attempt["step"] == 0
    assert attempt["versions"]["torch"] == torch.__version__
    assert "step 6" in (straight / "log.txt").read_text()
    last = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["masks/visible_share"] + last["masks/hidden_share"] == pytest.approx(1)
    parts = last["time/data_s"] + last["time/forward_s"] + last["time/backward_s"] + last["time/optimizer_s"]
    assert 0 < parts < last["time/step_s"]
    assert 1 < last["monitor/rankme"] <= 24
    assert 0 < last["monitor/drift"] < 1


def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    straight: Path, tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert train(tiny_run(), tmp_path) == 75
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [
        "step_00000003",
        "step_00000004",
    ]
    assert train(tiny_run(), tmp_path) == 0
    assert losses(tmp_path) == losses(straight)
    assert same(tensors(tmp_path, 6), tensors(straight, 6))
    attempts = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert [attempt["step"] for attempt in attempts] == [0, 4]


def test_a_damaged_checkpoint_is_skipped_and_its_steps_repeat_exactly(
    straight: Path, tiny_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tiny_run(), tmp_path) == 0
    shard = next(checkpoint.step_dir(tmp_path / "checkpoints", 6).glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert train(tiny_run(), tmp_path) == 0
    assert "has changed since it was written" in caplog.text
    assert "step 3 of 6" in caplog.text
    assert losses(tmp_path) == losses(straight)
    assert same(tensors(tmp_path, 6), tensors(straight, 6))


def test_micro_batches_and_recomputation_do_not_move_the_numbers(
    straight: Path, tiny_run: MakeRun, tmp_path: Path
) -> None:
    for name, parallel in (
        ("accumulate", {"accumulate": 4}),
        ("selective", {"recompute": "selective"}),
        ("full", {"recompute": "full"}),
    ):
        assert train(tiny_run(parallel=parallel), tmp_path / name) == 0
        assert losses(tmp_path / name) == pytest.approx(losses(straight), abs=2e-6), name


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("recompute", "precision", "apart"), [("off", "fp32", 1e-5), ("selective", "fp32", 1e-5), ("full", "bf16", 2e-2)]
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, several; as errors they end it
def test_compiling_does_not_move_the_numbers(
    straight: Path, tiny_run: MakeRun, tmp_path: Path, recompute: str, precision: str, apart: float
) -> None:
    run = tiny_run(parallel={"compile": True, "recompute": recompute}, precision=precision)  # bf16 is sliced by FSDP2
    settings = tmp_path / "compiled.yaml"
    settings.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    # In a process of its own, since the checks of signatures in tests cannot be traced.
    words = [sys.executable, "-m", "vjepa", "train", str(settings), "--out", str(tmp_path / "run")]
    subprocess.run(words, check=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), abs=apart)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_blocks_of_which_no_more_programs_are_kept_run_as_they_are(tiny_run: MakeRun, tmp_path: Path) -> None:
    shards = tiny_run().data.sources[0].shards
    mixture = [{"shards": shards, "weight": 0.5, "frames": frames} for frames in (2, 4, 8)]
    run = tiny_run(data={"sources": mixture, "lanes": 7}, batch_size=7, steps=12)
    assert train(run, tmp_path / "plain") == 0
    settings = tmp_path / "compiled.yaml"
    settings.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    words = ["train", str(settings), "--out", str(tmp_path / "compiled"), "parallel.compile=true"]
    fewer = "from vjepa import cli, parallel; parallel.COMPILED_FORMS = 2"
    subprocess.run([sys.executable, "-c", f"{fewer}; raise SystemExit(cli.main({words}))"], check=True)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_workers_do_not_move_the_numbers(straight: Path, tiny_run: MakeRun, tmp_path: Path) -> None:
    assert train(tiny_run(loader={"workers": 2}), tmp_path) == 0
    assert losses(tmp_path) == losses(straight)
    assert not (tmp_path / "stalls.txt").exists()  # nothing stalled


def test_half_precision_is_close_and_keeps_weights_in_fp32(straight: Path, tiny_run: MakeRun, tmp_path: Path) -> None:
    assert train(tiny_run(precision="bf16"), tmp_path) == 0
    assert losses(tmp_path) == pytest.approx(losses(straight), abs=2e-2)
    assert {tensor.dtype for tensor in tensors(tmp_path, 6).values()} == {torch.float32}


def test_non_finite_steps_are_skipped_and_three_end_the_run(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of, bad_calls, calls = VJEPA2.loss, {4}, 0

    def poisoned(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = loss_of(*given, **named)
        return dataclasses.replace(loss, value=loss.value * float("nan")) if calls in bad_calls else loss

    monkeypatch.setattr(VJEPA2, "loss", poisoned)
    run = tiny_run(steps=4, checkpoint={"every_steps": 1, "keep_last": 4})
    assert train(run, tmp_path / "once") == 0
    records = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert [record["optim/applied"] for record in records] == [1, 1, 1, 0]
    assert records[3]["optim/grad_norm"] is None
    assert same(tensors(tmp_path / "once", 3), tensors(tmp_path / "once", 4))

    calls, bad_calls = 0, set(range(3, 100))
    with pytest.raises(Unhealthy, match="step 3 is the last of 3 bad ones in a row"):
        train(tiny_run(steps=8, track={"every_steps": 1}), tmp_path / "often")
    log = (tmp_path / "often" / "log.txt").read_text()
    assert "going back to step 0: the same batches once more" in log


def test_bad_batches_are_passed_over_alike_by_every_later_attempt(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of, used, made = VJEPA2.loss, list[int](), list[int]()

    def of_bad_data(method: Any, networks: Any, inputs: Any, *, step: int) -> Any:
        used.append(inputs[0].step)
        made.append(step)
        loss = loss_of(method, networks, inputs, step=step)
        return dataclasses.replace(loss, value=loss.value * float("nan")) if inputs[0].step in (4, 5) else loss

    monkeypatch.setattr(VJEPA2, "loss", of_bad_data)
    health = {"max_skipped_in_a_row": 2, "after_roll_back": "pass_over"}
    run = tiny_run(steps=7, health=health, track={"every_steps": 1}, checkpoint={"every_steps": 1, "keep_last": 9})
    assert train(run, tmp_path / "straight") == 0
    # Steps 5 and 6 are bad; the last healthy checkpoint is that of step 4, whose next two batches are never used again.
    assert used == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert made == [0, 1, 2, 3, 4, 5, 4, 5, 6]  # rates and ramps count updates, not batches
    assert json.loads((tmp_path / "straight" / "passed_over.json").read_text()) == [[4, 2]]
    home = tmp_path / "straight" / "checkpoints"
    assert [path.name for path in home.glob("unhealthy_*")] == ["unhealthy_step_00000005"]
    assert checkpoint.read_metadata(checkpoint.resolve(tmp_path / "straight")).passed_over == ((4, 2),)

    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for step in (4, 5, 6, 7):
        shutil.rmtree(checkpoint.step_dir(tmp_path / "again" / "checkpoints", step))
    used.clear()
    assert train(run, tmp_path / "again") == 0
    assert used == [3, 6, 7, 8]
    assert losses(tmp_path / "again") == losses(tmp_path / "straight")
    assert same(tensors(tmp_path / "again", 7), tensors(tmp_path / "straight", 7))


def test_running_out_of_memory_names_settings_to_change(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VJEPA2, "loss", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(tiny_run(), tmp_path)
    assert "parallel.accumulate=2" in caught.value.__notes__[0]


def test_offloading_and_determinism_change_nothing_on_a_cpu(straight: Path, tiny_run: MakeRun, tmp_path: Path) -> None:
    for name in ("offload", "deterministic"):
        assert train(tiny_run(parallel={name: True}), tmp_path / name) == 0
        assert losses(tmp_path / name) == losses(straight), name
        assert same(tensors(tmp_path / name, 6), tensors(straight, 6)), name
    torch.use_deterministic_algorithms(False)


def test_bad_input_to_training_is_a_clear_single_line(straight: Path, tiny_run: MakeRun, tmp_path: Path) -> None:
    missing = tiny_run(data={"sources": [{"shards": str(tmp_path / "nowhere")}]})
    with pytest.raises(BadInput, match="nowhere"):
        train(missing, tmp_path / "a")
    with pytest.raises(BadInput, match=r"batch_size was 4 when step 6 was saved and is 2 now"):
        train(tiny_run(batch_size=2), straight)
    folder = tmp_path / "b"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder / ".lock"], stdout=subprocess.PIPE) as owner:
        assert owner.stdout
        owner.stdout.readline()
        with pytest.raises(BadInput, match="in use by another process"):
            train(tiny_run(), folder)
        owner.kill()
    assert train(tiny_run(steps=1), folder) == 0


def test_a_resumed_run_may_be_longer_but_not_change_its_rates(
    straight: Path, tiny_run: MakeRun, tmp_path: Path
) -> None:
    assert train(tiny_run(steps=3), tmp_path) == 0
    assert train(tiny_run(), tmp_path) == 0
    attempts = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert attempts[1]["changes"] == {"steps": [3, 6]}
    assert losses(tmp_path) == losses(straight)
    with pytest.raises(
        BadInput, match=r"optim\.lr was 0.01 when step 6 was saved and is 0.02 now: past steps would have used"
    ):
        train(tiny_run(optim={"lr": 2e-2}), tmp_path)


def test_a_run_may_begin_with_the_weights_of_another(straight: Path, tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(steps=1, start=str(straight), optim={"lr": 1e-9, "warmup_steps": 0, "ema": 1.0})
    assert train(run, tmp_path) == 0
    begun, trained = tensors(tmp_path, 1), tensors(straight, 6)
    assert all(torch.allclose(begun[name], trained[name], atol=1e-6) for name in trained)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_clips_that_a_second_decoder_had_to_decode_are_counted(tiny_av1_run: MakeRun, tmp_path: Path):
    run = tiny_av1_run(loader={"decoder": "decord"}, steps=2)
    assert train(run, tmp_path / "run") == 0
    numbers = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert numbers["data/rejected"] == 0
    assert numbers["data/fell_back_error"] == 2 * run.batch_size
