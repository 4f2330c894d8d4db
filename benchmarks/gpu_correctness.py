"""The stages of `gpu.py` that check: numbers against a CPU, kill and resume, exhausted memory.

A stage is a function of the folder of the results and of whether sizes are toy sizes. It yields rows: `what`, numbers
by name, and `ok` where something must hold.
"""

import functools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vjepa
from vjepa.checkpoints import checkpoint
from vjepa.checkpoints.manager import CheckpointManager
from vjepa.compat import local
from vjepa.config import Checkpoint, Run
from vjepa.distributed.world import World, join
from vjepa.engine.loop import sum_metrics
from vjepa.engine.optimizer import build_optimizer, update_weights
from vjepa.engine.schedule import rates_at
from vjepa.engine.trainer import build_networks
from vjepa.methods.base import named_parameters
from vjepa.nn.attention import Backend, refusal
from vjepa_data.reader.batch import Batch, Clips

STEPS = 3

ALLOWED = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 0.1)}
"""Largest relative difference of losses, and of the gradient of the first step. The gradient of bf16 differs by 0.03
on a CPU at these sizes."""


def machine(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Describe the machine."""
    on_gpu = torch.cuda.is_available()
    yield {
        "what": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() or "none",
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "vjepa": vjepa.__version__,
    }
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        yield {"what": "memory", "free_gib": free / 2**30, "total_gib": total / 2**30}
    device = torch.device("cuda" if on_gpu else "cpu")
    others: tuple[Backend, ...] = ("varlen", "xformers")
    for name in others:
        reason = refusal(name, device, torch.bfloat16, head_widths=(64, 32))
        yield {"what": f"attention {name}: {reason or 'agrees with sdpa'}"}


def small_run(**changes: Any) -> Run:
    """Return a run of a small model, with heads as wide as ViT's and the predictor's."""
    settings: dict[str, Any] = {
        "name": "check",
        "steps": 10,
        "batch_size": 4,
        "precision": "fp32",
        "data": {"sources": [{"shards": "none"}], "clip": {"frames": 8}, "crop": {"px": 64}},
        "model": {
            "encoder": {"name": "custom", "width": 128, "depth": 3, "heads": 2},
            "predictor": {"width": 64, "depth": 2, "heads": 2},
        },
        "optim": {"lr": 1e-3, "decay": "constant", "ema": 0.99},
    }
    return Run.model_validate(settings | changes)


def random_batch(run: Run, clips: int, device: torch.device, number: int = 0) -> Batch:
    """Return a batch of noise, the same on every device."""
    px, frames, generator = run.data.crop.px, run.data.clip.frames, torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (clips, frames, px, px, 3), dtype=torch.uint8, generator=generator).to(device)
    empty = {"keys": ("",) * clips, "sources": (0,) * clips, "start_s": (0.0,) * clips}
    return Batch(number, (Clips(pixels, slots=tuple(range(clips)), **empty),))


@dataclass(frozen=True)
class Steps:
    """What a few steps computed."""

    losses: list[float]
    gradient: Tensor
    """Gradient of the first step, of all parameters, on the CPU."""
    tensors: dict[str, Tensor]
    """Everything that a checkpoint holds, on the device."""


def make_steps(run: Run, world: World) -> Steps:
    """Train for a few steps as `vjepa train` does."""
    torch._dynamo.reset()
    method, networks = build_networks(run, world)
    optimizer = build_optimizer(networks.trained, run.optim)
    losses, gradient = [], torch.empty(0)
    for number in range(STEPS):
        rates = rates_at(number, run)
        inputs = method.prepare(random_batch(run, run.batch_size, world.device, number), world.device)
        loss = method.loss(networks, inputs, step=number)
        loss.value.backward()
        if number == 0:
            found = [local(p.grad).float().cpu().flatten() for p in named_parameters(networks.trained).values()
                     if p.grad is not None]  # fmt: skip
            gradient = torch.cat(found)
        metrics = sum_metrics([loss], world)
        update = update_weights(optimizer, metrics["total"], rates, clip_norm=run.optim.clip_norm)
        method.after_update(networks, ema=rates.ema, applied=update.applied)
        losses.append(float(metrics["total"]))
    return Steps(losses, gradient, checkpoint.collect_tensors(networks, optimizer))


def numbers(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Compare three steps with those of a CPU in fp32, for every way of computing them; save and load them."""
    wanted = reference_steps(out)
    if toy:  # traces as always, and spares the minutes in which a CPU's code is compiled
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    with join(small_run().parallel) as world:
        for precision, attention, compiled in variants(toy):
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            what = f"three steps in {precision}, {attention}" + (", compiled" if compiled else "")
            reason = attention != "sdpa" and refusal(
                attention, world.device, dtype, head_widths=(64, 32), compiled=compiled
            )
            if reason:
                yield {"what": f"{what}: not possible, {reason}"}
                continue
            found = make_steps(
                small_run(precision=precision, parallel={"attention": attention, "compile": compiled}), world
            )
            yield {"what": what, **differences(found, *wanted, precision=precision)}
            if (precision, compiled) == ("bf16", False) and attention == "sdpa":
                yield check_checkpoint(found.tensors, out / "checkpoint", world)


def variants(toy: bool) -> list[tuple[str, Backend, bool]]:
    """Return the combinations of precision, attention and compilation."""
    found: list[tuple[str, Backend, bool]] = [
        ("fp32", "sdpa", False),
        ("bf16", "sdpa", True),
        ("fp32", "sdpa", True),
        ("bf16", "sdpa", False),
        ("bf16", "varlen", False),
        ("bf16", "xformers", False),
        ("bf16", "varlen", True),
    ]
    return found[: -1 if toy else None]


def reference_steps(out: Path) -> tuple[list[float], Tensor]:
    """Return losses and gradient of a CPU in fp32, computed in a process that sees no GPU."""
    code = (
        "import sys, torch, gpu_correctness as checks\n"
        "with checks.join(checks.small_run().parallel) as world:\n"
        "    steps = checks.make_steps(checks.small_run(parallel={'attention': 'sdpa'}), world)\n"
        "torch.save([steps.losses, steps.gradient], sys.argv[1])\n"
    )
    file = out / "reference.pt"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(file)], env=environment, check=True, stdout=sys.stderr)
    losses, gradient = torch.load(file)
    return losses, gradient


def differences(found: Steps, losses: list[float], gradient: Tensor, *, precision: str) -> dict[str, Any]:
    """Return the relative differences from the reference, and whether they are small enough."""
    of_loss = max(abs(own / other - 1) for own, other in zip(found.losses, losses, strict=True))
    of_gradient = float((found.gradient - gradient).norm() / gradient.norm())
    allowed = ALLOWED[precision]
    return {"loss": of_loss, "gradient": of_gradient, "ok": of_loss <= allowed[0] and of_gradient <= allowed[1]}


def check_checkpoint(tensors: dict[str, Tensor], folder: Path, world: World) -> dict[str, Any]:
    """Save tensors, load them into others, and compare every bit."""
    began_s, manager = time.perf_counter(), CheckpointManager(folder, Checkpoint(), world)
    saved = {name: local(tensor).clone() for name, tensor in tensors.items()}
    manager.save(tensors, checkpoint.CheckpointMetadata(STEPS, world.size, {}, "", [], None, {}))
    manager.wait()
    for tensor in tensors.values():
        local(tensor).fill_(-1)
    newest = checkpoint.find_newest(checkpoint.checkpoint_dir(folder, Checkpoint()), world)
    assert newest is not None
    checkpoint.load_into(tensors, newest, world)
    same = [torch.equal(saved[name], local(tensor)) for name, tensor in tensors.items()]
    what = f"{len(same)} tensors of a checkpoint, saved and loaded"
    return {"what": what, "s": time.perf_counter() - began_s, "ok": all(same)}


def corpus(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Make videos of two rooms and shard them; `shards/manifest.json` is complete when they are."""
    sizes = ["--videos", "8" if toy else "64", "--px", "64" if toy else "256", "--frames", "24" if toy else "80"]
    videos = out / "videos"
    command = [sys.executable, "-m", "vjepa"]
    if not (out / "shards").exists():
        subprocess.run([*command, "synthesize", "two_room", "--out", str(videos), *sizes], check=True)
        build = ["shard", str(videos), "--spec", str(videos / "spec.yaml"), "--out", str(out / "building")]
        subprocess.run([*command, *build], check=True)
        (out / "building").rename(out / "shards")
    yield {"what": "corpus"}


def wait_for_corpus(out: Path) -> Path:
    """Return the folder of the shards, when the preparation has made it."""
    while not (out / "shards").exists():
        time.sleep(0.5)
    return out / "shards"


def train_command(run: Run, folder: Path) -> list[str]:
    """Write the settings of a run and return the command that trains it."""
    file = folder.with_suffix(".json")  # which is YAML as well
    file.write_text(json.dumps(run.model_dump(mode="json", exclude_unset=True)))
    return [sys.executable, "-m", "vjepa", "train", str(file), "--out", str(folder)]


def losses_of(folder: Path) -> dict[int, float]:
    """Return the recorded loss of each step."""
    file, found = folder / "metrics.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):  # a line that is being written
            row = json.loads(line)
            if "loss/total" in row or "loss/prediction" in row:
                found[row["step"]] = row.get("loss/total", row.get("loss/prediction"))
    return found


def recorded_run(out: Path, steps: int, **changes: Any) -> Run:
    """Return a small run on the corpus that records every step."""
    base = small_run().model_dump(mode="json", exclude_unset=True)
    data = base["data"] | {"sources": [{"shards": str(wait_for_corpus(out))}], "clip": {"frames": 8, "fps": 8}}
    base |= {
        "steps": steps,
        "data": data,
        "precision": "bf16" if torch.cuda.is_available() else "fp32",
        "checkpoint": {"every_steps": 4},
        "track": {"every_steps": 1, "wandb": "off", "pictures_every_steps": None},
        "loader": {"workers": 2},
    }
    return Run.model_validate(base | changes)


def resume(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Kill a run and resume it; every loss must equal that of a run that was left alone."""
    steps = 12 if toy else 60
    run = recorded_run(out, steps, parallel={"deterministic": True})
    alone, killed = out / "alone", out / "killed"
    peace = subprocess.Popen(train_command(run, alone), stdout=sys.stderr)
    first = subprocess.Popen(train_command(run, killed), stdout=sys.stderr)
    while first.poll() is None and len(losses_of(killed)) < 5:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    reached = max(losses_of(killed), default=0)
    again = subprocess.run(train_command(run, killed), stdout=sys.stderr)
    peace.wait()
    theirs, ours = losses_of(alone), losses_of(killed)
    yield {
        "what": "kill -9 and resume: losses bit by bit",
        "killed_at": reached,
        "steps": len(ours),
        "largest_difference": max((abs(ours[s] - theirs.get(s, float("inf"))) for s in ours), default=float("inf")),
        "ok": again.returncode == 0 and ours == theirs and len(ours) == steps,
    }


def out_of_memory(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Exhaust the memory of the device; the run must end at once, with the reason and the advice."""
    run = recorded_run(out, 5, batch_size=8)
    command = train_command(run, out / "memory")[3:]
    # A CPU has no such error, so that it is raised there in the place of the loss.
    cause = (
        "torch.cuda.set_per_process_memory_fraction(1e-4)"
        if torch.cuda.is_available()
        else "from vjepa.methods.vjepa2.method import VJEPA2\n"
        "def loss(*_, **__): raise torch.OutOfMemoryError('raised by the benchmark')\n"
        "VJEPA2.loss = loss"
    )
    code = f"import sys, torch\n{cause}\nfrom vjepa.__main__ import main\nsys.exit(main())"
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, env=os.environ, errors="replace"
    )
    is_told = "out of memory" in done.stderr and "parallel.accumulate=2" in done.stderr
    print(done.stderr, file=sys.stderr)
    yield {
        "what": "the device is out of memory: exit code, reason, advice",
        "s": time.monotonic() - began_s,
        "code": done.returncode,
        "ok": done.returncode not in (0, 75) and is_told,
    }
