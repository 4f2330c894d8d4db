"""The record: a file that is the truth, W&B when it can be had, never an obstacle."""

import contextlib
import gc
import json
import logging
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from PIL import Image
from wandb.sdk.lib.module import unset_globals

from vjepa.checkpoints.storage import to_path
from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.monitoring.logger import RunLogger
from vjepa.wandb_client import _choose_mode

MakeRun = Callable[..., Run]


def measures(step: int) -> dict[str, Any]:
    return {"loss/prediction": torch.tensor(1.0 / step), "optim/lr": 0.5}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def offline_records(folder: Path) -> Iterator[Any]:
    """Read back the records that W&B would send: LevelDB's log, blocks of 32 KiB, records of (crc, length, kind)."""
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
                record.ParseFromString(whole)
                whole = b""
                yield record


def offline_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of numbers that W&B would send."""
    rows = [record.history.item for record in offline_records(folder) if record.WhichOneof("record_type") == "history"]
    return [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items} for items in rows]


def test_a_resumed_run_has_a_single_line_for_each_step(tiny_run: MakeRun, world: World, tmp_path: Path) -> None:
    run = tiny_run(steps=10, track={"every_steps": 2})
    track = RunLogger(run, tmp_path, world, step=0, wandb_id=None)
    for step in range(1, 6):
        track.add(step, measures(step))
        if track.is_due(step):
            track.write({"speed/clips_per_s": 7.0})
    track.close(1)  # killed after step 5: the line of step 5 was never written
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert [line.get("speed/clips_per_s") for line in lines(tmp_path)] == [None, 7.0, None, 7.0]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/pred')  # torn
    again = RunLogger(run, tmp_path, world, step=3, wandb_id=None)
    for step in (4, 5, 6):
        again.add(step, {"loss/prediction": torch.tensor(float("nan"))})
    again.write({})
    again.close(0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[3]["loss/prediction"] is None
    assert lines(tmp_path)[2]["loss/prediction"] == pytest.approx(1 / 3)


class OnGPU(torch.Tensor):
    """A number that pretends to be on a GPU, so that it cannot be stacked with a number on the CPU."""

    device = torch.device("cuda", 0)  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.stack and len({one.device for one in args[0]}) > 1:
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs)


def test_numbers_of_two_devices_are_one_record(tiny_run: MakeRun, world: World, tmp_path: Path) -> None:
    track = RunLogger(tiny_run(), tmp_path, world, step=0, wandb_id=None)
    track.add(1, {"loss/prediction": torch.tensor(0.5).as_subclass(OnGPU), "optim/grad_norm": torch.tensor(2.0)})
    track.write({})
    track.close(0)
    (line,) = lines(tmp_path)
    assert (line["loss/prediction"], line["optim/grad_norm"]) == (0.5, 2.0)


def test_wandb_keeps_a_single_run_over_offline_attempts(
    tiny_run: MakeRun, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    run = tiny_run(steps=10, track={"wandb": "auto", "every_steps": 1})
    ids = []
    for first in (0, 2):
        track = RunLogger(run, tmp_path, world, step=first, wandb_id=None)
        for step in range(first + 1, first + 4):
            track.add(step, measures(step))
            track.write({})
        ids.append(track.wandb_id)
        track.close(75)
    assert ids[0] == ids[1] == (tmp_path / "wandb" / "id").read_text().strip()
    folders = list(tmp_path.glob("wandb/offline-run-*"))
    assert {folder.name.split("-")[3] for folder in folders} == {ids[0]}  # in one second: ...-ID and ...-ID-1
    deadline = time.monotonic() + 20  # W&B's service writes the last records after it said that it had
    while len(offline_history(tmp_path)) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["trainer/step"] for row in offline_history(tmp_path)] == [1, 2, 3, 3, 4, 5]


def test_wandb_gets_pictures_commit_and_checkpoint_paths(tiny_run: MakeRun, world: World, tmp_path: Path) -> None:
    run = tiny_run(steps=10, track={"wandb": "offline", "every_steps": 1})
    track = RunLogger(run, tmp_path, world, step=0, wandb_id=None)
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg")
    track.show(tmp_path / "picture.jpg", 1)
    first = tmp_path / "checkpoints" / "step_00000001"
    track.refer_to(first)
    track.refer_to(to_path("memory://bucket/step_00000002"))
    track.close(0)
    found: list[Any] = []
    deadline = time.monotonic() + 20
    while len([one for one in found if one.WhichOneof("record_type") == "artifact"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        found = list(offline_records(tmp_path))
    artifacts = [one.artifact for one in found if one.WhichOneof("record_type") == "artifact"]
    assert [set(one.aliases) for one in artifacts] == [{"latest", f"step_0000000{n}"} for n in (1, 2)]
    assert [json.loads(one.metadata)["where"] for one in artifacts] == [str(first), "memory://bucket/step_00000002"]
    (row,) = offline_history(tmp_path)
    assert row["trainer/step"] == 1
    assert any(name.startswith("pictures") for name in row)
    configs = [item for one in found if one.WhichOneof("record_type") == "run" for item in one.run.config.update]
    (code,) = (json.loads(item.value_json) for item in configs if item.key == "code")
    assert code["root"]


def test_a_dead_server_and_a_killed_service_do_not_stop_a_run(
    tiny_run: MakeRun, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    caplog.set_level(logging.WARNING)
    run = tiny_run(steps=10, track={"wandb": "auto", "every_steps": 1, "wandb_timeout_s": 2})
    track = RunLogger(run, tmp_path, world, step=0, wandb_id=None)
    assert "W&B cannot be used online" in caplog.text
    track.add(1, measures(1))
    track.write({})
    kill_services()
    for step in (2, 3):
        track.add(step, measures(step))
        track.write({})
    done = threading.Thread(target=track.close, args=(0,))
    done.start()
    done.join(timeout=60)
    assert not done.is_alive()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    with contextlib.suppress(ConnectionError):
        wandb.teardown()  # so that its leftovers do not complain at exit


WITH_A_DEAD_SERVICE = """
import logging, sys
from pathlib import Path
from wandb.sdk.lib.service import service_process
from vjepa.config import load
from vjepa.wandb_client import WandbRun

logging.basicConfig(level="WARNING")
service_process.get_core_path = lambda: sys.argv[2]
client = WandbRun(load(sys.argv[1]).settings, Path(sys.argv[1]).parent, "abcd1234")
client.log({"step": 1, "loss/prediction": 0.5})
client.close(0)
print("ended")
"""


@pytest.mark.parametrize("service", ["exit 1", "exec sleep 30 >/dev/null 2>&1"])
def test_a_service_that_does_not_start_does_not_hold_a_run(tiny_run: MakeRun, tmp_path: Path, service: str) -> None:
    run = tiny_run(steps=10, track={"wandb": "offline", "wandb_timeout_s": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    core = tmp_path / "wandb-core"
    core.write_text(f"#!/bin/sh\n{service}\n")
    core.chmod(0o755)
    child = [sys.executable, "-c", WITH_A_DEAD_SERVICE, str(tmp_path / "run.yaml"), str(core)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "ended\n"
    assert "W&B cannot be used offline (it did not answer in 2 s); metrics.jsonl has it all" in done.stderr


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own, without any setting of W&B's in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    forget_wandb()
    yield tmp_path
    forget_wandb()


def forget_wandb() -> None:
    """Let W&B read its settings again. Its service ends a little later than it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        wandb.teardown()
        unset_globals()  # a run whose service was killed
        gc.collect()


HOST, KEY = "https://wandb.example.org", "0" * 40


@pytest.mark.parametrize(
    ("environment", "files", "mode", "reason"),
    [
        ({}, {}, "offline", "no credentials for https://"),
        ({"WANDB_API_KEY": KEY}, {}, "online", ""),
        ({"WANDB_API_KEY": "short"}, {}, "offline", "no credentials for https://"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, {}, "offline", "WANDB_MODE is offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, {}, "offline", "WANDB_MODE is"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, {}, "disabled", "WANDB_MODE is disabled"),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, {}, "disabled", "WANDB_DISABLED is set"),
        ({"WANDB_BASE_URL": HOST}, {".netrc": f"machine wandb.example.org login user password {KEY}"}, "online", ""),
        ({}, {".netrc": f"machine wandb.example.org login user password {KEY}"}, "offline", "no credentials"),
        (
            {},
            {
                ".config/wandb/settings": f"[default]\nbase_url = {HOST}\n",
                ".netrc": f"machine wandb.example.org\n  login user\n  password {KEY}\n",
            },
            "online",
            "",
        ),
        ({"WANDB_API_KEY": KEY}, {"wandb/settings": "[default]\nmode = offline\n"}, "offline", "settings of wandb are"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {"token": "a.b.c"}, "online", ""),
    ],
)
def test_wandb_itself_is_asked_whether_to_go_online(
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    files: dict[str, str],
    mode: str,
    reason: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (alone / name).parent.mkdir(parents=True, exist_ok=True)
        (alone / name).write_text(text)
        (alone / name).chmod(0o600)
    found, why = _choose_mode("auto", 120)
    assert found == mode, why
    assert reason in why
    assert _choose_mode("online", 120) == (found, why)
    assert _choose_mode("offline", 240) == ("offline", "track.wandb is offline")


def test_a_disabled_record_leaves_no_files(
    tiny_run: MakeRun, world: World, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track = RunLogger(tiny_run(steps=10, track={"wandb": "auto"}), alone, world, step=0, wandb_id=None)
    track.add(1, measures(1))
    track.write({})
    track.refer_to(alone / "step_00000001")
    track.close(0)
    assert [path.name for path in (alone / "wandb").iterdir()] == ["id"]


def test_a_place_that_cannot_be_staged_costs_no_metrics(
    tiny_run: MakeRun, world: World, alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", "/proc/nowhere")
    track = RunLogger(
        tiny_run(steps=10, track={"wandb": "offline", "every_steps": 1}), alone, world, step=0, wandb_id=None
    )
    for step in (1, 2):
        track.refer_to(alone / f"step_0000000{step}")
        track.add(step, measures(step))
        track.write({})
    track.close(0)
    assert caplog.text.count("W&B loses the places of checkpoints for the rest of this attempt") == 1
    deadline = time.monotonic() + 20
    while len(offline_history(alone)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["trainer/step"] for row in offline_history(alone)] == [1, 2]


def test_nothing_is_written_at_home(
    tiny_run: MakeRun, world: World, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    (alone / "run").mkdir()
    track = RunLogger(tiny_run(steps=10, track={"wandb": "offline"}), alone / "run", world, step=0, wandb_id=None)
    track.refer_to(alone / "step_00000001")
    track.close(0)
    assert list((alone / "run" / "wandb" / "data" / "artifacts" / "staging").iterdir())
    assert "WANDB_DATA_DIR" not in os.environ
    found: set[str] = set()
    deadline = time.monotonic() + 20
    while not found and time.monotonic() < deadline:
        records = list(offline_records(alone / "run"))
        found = {record.run.project for record in records if record.WhichOneof("record_type") == "run"}
    assert found == {"mine"}


def kill_services() -> None:
    """End the processes that W&B started below this process."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            name = (process / "cmdline").read_text()
        except OSError:
            continue
        if parent == os.getpid() and "wandb" in name:
            os.kill(int(process.name), 9)
