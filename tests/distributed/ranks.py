"""Several ranks on a machine, for tests: a process imports torch, and every rank of every scenario is forked from it.

    python ranks.py JOBS.json       [{"scenario": "trained", "world": 2, "out": ..., "settings": {...}, ...}, ...]

Each rank writes `out/rank_N.json`: {"result": ...} or {"error": ..., "kind": ...}.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from vjepa import cli
from vjepa.checkpoints import checkpoint
from vjepa.checkpoints import manager as saving
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.config import Run
from vjepa.distributed.sharding import synchronise_gradients
from vjepa.distributed.world import join
from vjepa.engine import rank_consistency
from vjepa.engine import trainer as training
from vjepa.engine.optimizer import build_optimizer, update_weights
from vjepa.engine.schedule import rates_at
from vjepa.engine.signals import Stop
from vjepa.methods.base import named_parameters
from vjepa.methods.vjepa2.method import VJEPA2
from vjepa.monitoring.health import Unhealthy
from vjepa.nn.encoder import Encoder, View
from vjepa_data.config_files import dump_settings
from vjepa_data.reader.loader import Batch, ClipLoader, open_plan
from vjepa_data.settings import BadInput


def trained(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """Train, to the end or to a stop."""
    return training.train(run, out / job.get("folder", "run"))


def stopped_by_one(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """Only the last rank is asked to stop, after three steps."""
    agreed, calls = Stop.agreed, Counter[str]()

    def count(self: Stop) -> bool:
        calls["agreed"] += 1
        if calls["agreed"] == 4 and os.environ["RANK"] == "1":
            self.request()
        return agreed(self)

    Stop.agreed = count
    return training.train(run, out / "run")


def poisoned_on_one(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """The last rank's loss is not a number in its third step."""
    honest, calls = VJEPA2.loss, Counter[str]()

    def poison(*args: Any, **named: Any) -> Any:
        loss = honest(*args, **named)
        calls["loss"] += 1
        if calls["loss"] == 3 and os.environ["RANK"] == "1":
            object.__setattr__(loss, "value", loss.value * float("nan"))
        return loss

    VJEPA2.loss = poison
    return training.train(run, out / "run")


def dies_at(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """Train, and die without a word when a function that saves is called for the nth time."""
    place, name, left = saving, job["function"], job["call"]
    if "." in name:
        place, name = getattr(saving, name.split(".")[0]), name.split(".")[1]
    honest = getattr(place, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*args, **kwargs)

    setattr(place, name, die)
    return training.train(run, out / job.get("folder", "run"))


def odd_settings(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """The last rank was started with another seed."""
    if os.environ["RANK"] == "1":
        run = run.model_copy(update={"seed": 7})
    return training.train(run, out / "run")


def odd_code(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """The last rank runs other code."""
    if os.environ["RANK"] == "1":
        rank_consistency.code_digest = lambda: "other"
    return training.train(run, out / "run")


def odd_pixels(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """The last rank's decoder is off by one level in a single pixel."""
    if os.environ["RANK"] == "1":
        honest = ClipLoader.__next__

        def off_by_one(self: ClipLoader) -> Batch:
            batch = honest(self)
            batch.groups[0].frames[0, 0, 0, 0, 0] ^= 1
            return batch

        ClipLoader.__next__ = off_by_one
    return training.train(run, out / "run")


def sleeps_on_one(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """The last rank falls asleep in its third step."""
    honest, calls = VJEPA2.loss, Counter[str]()

    def doze(*args: Any, **named: Any) -> Any:
        calls["loss"] += 1
        if calls["loss"] == 3 and os.environ["RANK"] == "1":
            time.sleep(LIMIT_S)
        return honest(*args, **named)

    VJEPA2.loss = doze
    return training.train(run, out / "run")


def fails_on_one(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """The last rank raises in its fifth step, while a checkpoint is being written and rank 0 does not answer."""
    rank, honest, calls = os.environ["RANK"], VJEPA2.loss, Counter[str]()

    def fail(*args: Any, **named: Any) -> Any:
        calls["loss"] += 1
        if calls["loss"] == 5 and rank == "1":
            raise ValueError("the fifth step failed")
        return honest(*args, **named)

    VJEPA2.loss = fail
    if rank == "0":
        setattr(CheckpointManager, "_commit", lambda *args: time.sleep(LIMIT_S))  # noqa: B010  the type checker's
    dist.destroy_process_group = lambda: (out / f"destroyed_{rank}").touch()
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(out / f"error_{rank}.json")
    config = out / f"config_{rank}.yaml"
    config.write_text(dump_settings(run))
    cli.main(["train", str(config), "--out", str(out / "run")])


def counted(function: Any, kind: str, counts: Counter[str]) -> Any:
    """Return a function whose calls are counted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        counts[kind] += 1
        return function(*args, **kwargs)

    return call


def count_messages() -> Counter[str]:
    """Count messages between ranks from now on."""
    counts: Counter[str] = Counter()
    kinds = {
        "gather": ("all_gather_single", "all_gather_into_tensor"),  # torch 2.13, and before
        "scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
        "sum": ("all_reduce",),
    }
    for kind, names in kinds.items():
        name = next(name for name in names if hasattr(dist, name))
        setattr(dist, name, counted(getattr(dist, name), kind, counts))
    return counts


def inspected(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """Take a few steps by hand. Count messages, follow the average, and compare with an unsharded target."""
    counts = count_messages()
    with join(run.parallel) as world:
        method, networks = training.build_networks(run, world)
        optimizer = build_optimizer(networks.trained, run.optim)
        average = {name: p.full_tensor() for name, p in networks["target"].named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]
        worst_average, per_step, view = 0.0, [], View(torch.empty(0))
        plan = open_plan(run.data, seed=run.seed, batch_size=run.batch_size)
        with training.open_clips(run, plan, out, world, 0) as clips:
            for step in range(3):
                batch, rates = next(clips), rates_at(step, run)
                counts.clear()
                inputs = method.prepare(batch, world.device)
                loss = method.loss(networks, inputs, step=step)
                synchronise_gradients(networks, now=True)
                (loss.value * world.size).backward()
                total = world.sum(loss.value.detach())
                update = update_weights(optimizer, total, rates, clip_norm=run.optim.clip_norm)
                method.after_update(networks, ema=rates.ema, applied=update.applied)
                per_step.append(dict(counts))
                for name, p in networks["encoder"].named_parameters():
                    average[name] = average[name].lerp(p.full_tensor(), 1 - rates.ema)  # pyright: ignore[reportAttributeAccessIssue]
                for name, p in networks["target"].named_parameters():
                    whole = p.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
                    worst_average = max(worst_average, float((whole - average[name]).abs().max()))
                view = View(inputs[0].frames)
        alone = Encoder(run.model)
        alone.load_state_dict({name: p.full_tensor() for name, p in networks["target"].state_dict().items()})
        with torch.no_grad():
            difference = float((networks["target"]([view])[0] - alone([view])[0]).abs().max())
        gathered = [name for name, p in named_parameters(networks.saved).items() if not hasattr(p, "full_tensor")]
        return {"average": worst_average, "forward": difference, "messages": per_step, "gathered": gathered}


def sums(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the sum of this rank's part of each tensor."""
    return {name: float((t.to_local() if isinstance(t, DTensor) else t).sum()) for name, t in tensors.items()}


def background_save(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """Save in the background and change every weight at once, which must not change the saved tensors."""
    with join(run.parallel) as world:
        _, networks = training.build_networks(run, world)
        optimizer = build_optimizer(networks.trained, run.optim)
        tensors = checkpoint.collect_tensors(networks, optimizer)
        before = sums(tensors)
        saver = CheckpointManager(out / "run", run.checkpoint.model_copy(update={"background": True}), world)
        facts = checkpoint.CheckpointMetadata(1, world.size, {}, "", [], None, {})
        saver.save(tensors, facts)
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.fill_(-1)
        for _ in range(20):  # messages of training, meanwhile, on other groups
            world.sum(torch.ones(1000))
        saver.wait()
        path = checkpoint.find_newest(out / "run" / "checkpoints", world)
        assert path is not None
        checkpoint.load_into(tensors, path, world)
        return sums(tensors) == before


def full_disk_on_the_first(run: Run, out: Path, job: dict[str, Any]) -> Any:
    """Let rank 0 fail in a function that it calls for all ranks."""

    def write() -> None:
        raise OSError(28, "No space left on device")

    with join(run.parallel) as world:
        world.first(write)


LIMIT_S = 60.0

SCENARIOS = {
    one.__name__: one
    for one in (
        trained,
        stopped_by_one,
        poisoned_on_one,
        dies_at,
        odd_settings,
        odd_code,
        odd_pixels,
        sleeps_on_one,
        fails_on_one,
        inspected,
        background_save,
        full_disk_on_the_first,
    )
}


def be_rank(rank: int, job: dict[str, Any], port: int) -> None:
    """Run a scenario in a forked rank."""
    world, out = job["world"], Path(job["out"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **job.get("environment", {})}
    try:
        answer = {"result": SCENARIOS[job["scenario"]](Run.model_validate(job["settings"]), out, job)}
    except (BadInput, Unhealthy, RuntimeError, OSError) as error:
        answer = {"error": str(error), "kind": type(error).__name__, "trace": traceback.format_exc()}
    (out / f"rank_{rank}.json").write_text(json.dumps(answer))


def fork_ranks(job: dict[str, Any]) -> list[int]:
    """Start the ranks of a job, or only the ranks that it names."""
    Path(job["out"]).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in job.get("ranks", range(job["world"])):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, job, port)
            sys.stdout.flush()
            os._exit(0)
        pids.append(pid)
    return pids


def wait(pid: int, *, until_s: float) -> int:
    """Wait a limited time for a rank, and return its exit code."""
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.perf_counter() > until_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def main() -> None:
    """Run all jobs in turn."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        start_s = time.perf_counter()
        record = Path(job["out"]) / "run" / "environment.json"
        before = record.stat().st_mtime_ns if record.exists() else 0
        pids = fork_ranks(job)
        if "kill_after_s" in job:
            # Counted from when it goes to work, so that few kills are spent on its start.
            while time.perf_counter() < start_s + LIMIT_S and not (
                record.exists() and record.stat().st_mtime_ns > before
            ):
                time.sleep(0.01)
            time.sleep(job["kill_after_s"])
            os.kill(pids[-1], signal.SIGKILL)  # the other ranks must notice by themselves
        codes = [wait(pid, until_s=start_s + job.get("limit_s", LIMIT_S)) for pid in pids]
        (Path(job["out"]) / "exit_codes.json").write_text(json.dumps(codes))
        print(f"{job['scenario']} x{job['world']}: {time.perf_counter() - start_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
