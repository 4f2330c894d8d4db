"""The stages of `gpu.py` that measure: training steps, attention, the loader, dynamics, planning.

A stage is a function of the folder of the results and of whether sizes are toy sizes. It yields rows of numbers. A step
is everything that `vjepa train` does between two batches of uint8 frames on the device, and steps are timed in blocks
without waiting for the device between them, so that the host may be ahead as in training.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import step as against_reference
import torch
from gpu_correctness import losses_of, random_batch, train_command, wait_for_corpus
from reference import folder as reference_folder
from reference import reference
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vjepa import config
from vjepa.config import Run
from vjepa.distributed.sharding import forget_forwards
from vjepa.distributed.world import World, join
from vjepa.engine.loop import sum_metrics
from vjepa.engine.optimizer import build_optimizer, update_weights
from vjepa.engine.schedule import rates_at
from vjepa.engine.trainer import build_networks
from vjepa.estimate.estimate import accelerator_of
from vjepa.estimate.step_counts import count_step
from vjepa.methods.base import Method, Networks, create_method
from vjepa.monitoring.timers import StepTimer
from vjepa.nn.attention import measure as measure_attention
from vjepa.nn.attention import refusal
from vjepa.nn.frame_dynamics import FrameDynamics
from vjepa.nn.grid import Grid
from vjepa.planning.agents import make_box
from vjepa.planning.draws import Draws
from vjepa.planning.planners import Effort, cem
from vjepa.planning.scoring import LearnedScorer
from vjepa.weights.tensors import InMemory
from vjepa.weights.world_model import WorldModel
from vjepa_data.reader.batch import Batch

CLIPS, STEPS, BLOCKS, WARM_UP = 24, 4, 3, 3
USED = 0.92
"""Share of the memory that the largest batch may fill, by extrapolation."""

TOY_SIZES = [
    "model.encoder={name: custom, width: 32, depth: 2, heads: 2}",
    "model.predictor={width: 16, depth: 1, heads: 1}",
    "data.crop.px=32",
    "parallel.compile=false",
    "precision=fp32",
]


def shipped(name: str, toy: bool, *, clips: int, changes: tuple[str, ...] = ()) -> Run:
    """Return the settings of a file that ships, for one GPU with this number of clips."""
    sizes = [*changes, *(TOY_SIZES if toy else ())]
    return config.load(name, [*sizes, f"batch_size={clips}", "data.sources=[{shards: none}]"]).settings


@dataclass
class Trainer:
    """Steps of a run on one batch, over and over."""

    run: Run
    world: World
    networks: Networks
    method: Method
    optimizer: torch.optim.AdamW
    batch: Batch
    timer: StepTimer
    loss: Tensor | None = None

    @classmethod
    def of(cls, run: Run, world: World, earlier: "Trainer | None" = None) -> "Trainer":
        """Build the networks, or take them over from a trainer with another number of clips."""
        if earlier is None:
            method, networks = build_networks(run, world)
            optimizer = build_optimizer(networks.trained, run.optim)
        else:
            method, networks, optimizer = create_method(run), earlier.networks, earlier.optimizer
        batch = random_batch(run, run.batch_size, world.device)
        signals = method.example_signals(run.batch_size, run.data.clip.frames, world.device)
        batch = replace(batch, groups=tuple(replace(clips, signals=signals) for clips in batch.groups))
        return cls(run, world, networks, method, optimizer, batch, StepTimer(world.device))

    def step(self) -> None:
        """Make a step, as `vjepa.engine.loop.train_steps` does."""
        rates, timer = rates_at(0, self.run), self.timer
        with timer.part("prepare"):
            inputs = self.method.prepare(self.batch, self.world.device)
        with timer.part("forward"):
            loss = self.method.loss(self.networks, inputs, step=0)
        with timer.part("backward"):
            loss.value.backward()
        forget_forwards(self.networks)
        metrics = sum_metrics([loss], self.world)
        with timer.part("optimizer"):
            update = update_weights(self.optimizer, metrics["total"], rates, clip_norm=self.run.optim.clip_norm)
            self.method.after_update(self.networks, ema=rates.ema, applied=update.applied)
        self.loss = metrics["total"]


def measure(trainer: Trainer, *, blocks: int = BLOCKS, steps: int = STEPS) -> dict[str, Any]:
    """Return clips per second, milliseconds by part, MFU and peak memory of a trainer's steps."""
    device, run = trainer.world.device, trainer.run
    began_s = time.perf_counter()
    for _ in range(WARM_UP):
        trainer.step()
    trainer.timer.read()
    warm_s = time.perf_counter() - began_s
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = min(seconds_of(trainer.step, device, steps) for _ in range(blocks))
    parts = {name: 1e3 * value / (blocks * steps) for name, value in trainer.timer.read().items()}
    row: dict[str, Any] = {"clips_per_s": run.batch_size / seconds, "step_ms": 1e3 * seconds, "parts_ms": parts}
    if device.type == "cuda":
        kind = accelerator_of(torch.cuda.get_device_name(device))
        if kind is not None:
            row["mfu"] = count_step(run).flops_per_clip * row["clips_per_s"] / kind.flops
        row |= {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "kept_gib": torch.cuda.memory_allocated() / 2**30,
        }
    assert trainer.loss is not None
    return row | {"warm_up_s": warm_s, "ok": bool(torch.isfinite(trainer.loss))}


def seconds_of(action: Callable[[], object], device: torch.device, count: int) -> float:
    """Return the seconds of one of several calls, waiting for the device before and after all of them."""
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        action()
    wait(device)
    return (time.perf_counter() - start) / count


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(run: Run) -> str:
    """Return the size of a run for a table."""
    clip = run.data.clip
    return f"{run.model.encoder.name}, {run.batch_size} clips of {clip.frames} x {run.data.crop.px} px"


def speed(out: Path, toy: bool, encoder: str) -> Iterator[dict[str, Any]]:
    """Measure steps of V-JEPA 2 at the usual number of clips, then without compilation, then at the largest number."""
    clips = 2 if toy else CLIPS
    changes = (f"model.encoder={encoder}", "parallel.recompute=" + ("selective" if encoder == "vit_giant" else "off"))
    run = shipped("vitl16_256px_16f", toy, clips=clips, changes=changes)
    with join(run.parallel) as world:
        trainer = Trainer.of(run, world)
        row = {"what": name_of(run), "attention": attention_of(trainer.networks), **measure(trainer)}
        yield row
        if encoder == "vit_large" or toy:
            yield from beside_reference(run, world, trainer, row["clips_per_s"])
        if "peak_gib" in row:
            yield from largest(run, world, trainer, row)


def attention_of(networks: Networks) -> str:
    """Return the backend that a run chose."""
    return str(getattr(networks["encoder"], "attention", "sdpa"))


def largest(run: Run, world: World, trainer: Trainer, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure the largest number of clips that fits by extrapolation, less a fifth for each time that it does not."""
    total_gib = torch.cuda.mem_get_info()[1] / 2**30
    of_clip = (row["peak_gib"] - row["kept_gib"]) / run.batch_size
    clips = int((USED * total_gib - row["kept_gib"]) / of_clip)
    while clips > run.batch_size:
        more = run.model_copy(update={"batch_size": clips})
        try:
            yield {"what": f"largest batch: {name_of(more)}", **measure(Trainer.of(more, world, trainer), blocks=1)}
            return
        except torch.OutOfMemoryError:
            yield {"what": f"out of memory with {clips} clips"}
        trainer.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        clips = int(0.8 * clips)


def beside_reference(run: Run, world: World, trainer: Trainer, ours: float) -> Iterator[dict[str, Any]]:
    """Measure V-JEPA 2's own step, without activation checkpointing, on as many clips, after a step of ours."""
    if reference_folder() is None:
        yield {"what": "V-JEPA 2's own step: VJEPA2_REFERENCE is not set"}
        return
    clip, px = run.data.clip, run.data.crop.px
    frames = torch.randn(run.batch_size, 3, clip.frames, px, px, device=world.device)
    masks = against_reference.draw_masks(run, Grid.of(clip.frames, px, px, run.model), world.device)
    with reference():
        theirs = against_reference.their_step(run, world.device, frames, masks)
        for _ in range(WARM_UP):
            theirs()
        both = []
        for _ in range(BLOCKS):  # in turn, so that a busy machine is equally busy for both
            both.append((seconds_of(theirs, world.device, STEPS), seconds_of(trainer.step, world.device, STEPS)))
    seconds = min(pair[0] for pair in both)
    ratio = seconds / min(pair[1] for pair in both)
    trainer.timer.read()
    yield {"what": "V-JEPA 2's own step", "clips_per_s": run.batch_size / seconds, "ours_over_theirs": ratio,
           "aim": 2.0}  # fmt: skip


def attention(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Measure attention of ViT-L's step alone, forward and backward, with each backend, and each kernel of sdpa."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, clips, scale = (torch.float32, 2, 16) if toy else (torch.bfloat16, CLIPS, 1)
    shapes = {
        "target": ([(clips, 2048 // scale)], 16, 64),
        "encoder": ([(clips, 760 // scale), (clips, 448 // scale)], 16, 64),
        "predictor": ([(clips, 2048 // scale), (clips, 1984 // scale)], 12, 32),
        "causal": ([(clips, 1568 // scale)], 16, 64),
    }
    for name, (runs, heads, width) in shapes.items():
        for label, backend, context in ways(device):
            reason = refusal(backend, device, dtype, head_widths=(width,)) if backend != "sdpa" else None
            what = f"{name} {runs}: {label}"
            if reason:
                yield {"what": f"{what}: {reason}"}
                continue
            try:
                with context:
                    ms = measure_attention(backend, runs, heads=heads, head_width=width, device=device, dtype=dtype)
                yield {"what": what, "ms": ms}
            except RuntimeError as error:
                yield {"what": f"{what}: {str(error).splitlines()[0]}"}


def ways(device: torch.device) -> Iterator[tuple[str, Any, Any]]:
    """Yield every way to compute attention: a label, the backend, and a context."""
    yield "sdpa", "sdpa", nullcontext()
    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for kernel in kernels if device.type == "cuda" else ():
        yield f"sdpa, {kernel.name}", "sdpa", sdpa_kernel(kernel)
    yield "varlen", "varlen", nullcontext()
    yield "xformers", "xformers", nullcontext()


def loader(out: Path, toy: bool, encoder: str) -> Iterator[dict[str, Any]]:
    """Train on decoded videos, and report the share of the time for which the loop waited for them."""
    steps, clips = (6, 2) if toy else (40, CLIPS)
    clip = {"frames": 8, "fps": 8} if toy else {"frames": 16, "fps": 4}
    run = shipped("vitl16_256px_16f", toy, clips=clips, changes=(f"model.encoder={encoder}",))
    settings = run.model_dump(mode="json", exclude_unset=True)
    settings["data"] |= {"sources": [{"shards": str(wait_for_corpus(out))}], "clip": clip}
    settings |= {
        "steps": steps,
        "optim": {"lr": 1e-4, "decay": "constant"},
        "loader": {"workers": 1 if toy else 12},
        "checkpoint": {"every_steps": 10**6},
        "track": {"every_steps": 2 if toy else 10, "wandb": "off", "pictures_every_steps": None},
    }
    folder = out / "with_loader"
    done = subprocess.run(train_command(Run.model_validate(settings), folder), stdout=sys.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [row for row in rows if "speed/clips_per_s" in row]
    last = {name: timed[-1][name] for name in sorted(timed[-1]) if name.startswith(("speed/", "time/"))}
    yield {"what": f"trained from videos: {name_of(run)}", **last,
           "ok": done.returncode == 0 and len(losses_of(folder)) > 0}  # fmt: skip


def long_clips(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Measure steps on 64 frames."""
    run = shipped("vitl16_256px_64f", toy, clips=1 if toy else 6, changes=("parallel.accumulate=1",))
    with join(run.parallel) as world:
        yield {"what": name_of(run), **measure(Trainer.of(run, world))}


def levjepa(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Measure steps of LeVJEPA."""
    changes = ("objective.local_px=16",) if toy else ()
    run = shipped("levjepa_vitl16_224px_16f", toy, clips=2 if toy else 96, changes=changes)
    with join(run.parallel) as world:
        yield {"what": name_of(run), **measure(Trainer.of(run, world))}


def dynamics(out: Path, toy: bool) -> Iterator[dict[str, Any]]:
    """Measure training, a rollout and a plan at the size of V-JEPA 2-AC, with new weights."""
    encoder, run = out / "encoder", shipped(
        "vjepa2_ac_vitg16_256px_8f", toy, clips=2 if toy else 8, changes=(f"objective.encoder={out / 'encoder'}",)
    )  # fmt: skip
    write_encoder(run, encoder)
    with join(run.parallel) as world:
        trainer = Trainer.of(run, world)
        yield {"what": f"training: {name_of(run)}", **measure(trainer)}
        del trainer
        gc.collect()
        model = world_model(run, encoder).to(world.device)
        yield from rollouts(model, world.device, toy)


def write_encoder(run: Run, folder: Path) -> None:
    """Write a native export of an encoder with random weights, which take long to draw on a CPU."""
    from vjepa.nn.encoder import Encoder

    folder.mkdir(exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        shapes = Encoder(run.model).state_dict()
    save_file({f"encoder.{name}": noise(tensor, device) for name, tensor in shapes.items()},
              folder / "model.safetensors")  # fmt: skip


def noise(like: Tensor, device: torch.device) -> Tensor:
    """Return small random numbers."""
    return 0.02 * torch.randn(like.shape, device=device)


def world_model(run: Run, encoder: Path) -> WorldModel:
    """Return a model with a dynamics predictor of the run's size, without states, which planners do not know."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        predictor: nn.Module = FrameDynamics(run.model, actions=7)
    tensors = load_file(encoder / "model.safetensors")
    tensors |= {f"dynamics.{name}": noise(each, torch.device("cpu")) for name, each in predictor.state_dict().items()}
    tensors |= {"dynamics.scales.mean": torch.zeros(7), "dynamics.scales.std": torch.ones(7)}
    clip = run.data.clip
    return WorldModel(
        run.model, InMemory(tensors), px=run.data.crop.px, frames=clip.frames, fps=4.0, provenance={}
    )  # fmt: skip


def rollouts(model: WorldModel, device: torch.device, toy: bool) -> Iterator[dict[str, Any]]:
    """Measure a rollout of 16 steps, and a plan of 800 samples, 10 iterations and 2 steps, in fp32 and bf16."""
    samples, iterations, steps = (16, 2, 4) if toy else (800, 10, 16)
    frames = torch.zeros(1, 2, model.px, model.px, 3, dtype=torch.uint8, device=device)
    box = make_box(np.full(7, -0.05), np.full(7, 0.05), device)
    effort = Effort(samples=samples, elites=10, iterations=iterations)
    for what, context in (("fp32", nullcontext), ("bf16", lambda: torch.autocast(device.type, torch.bfloat16))):
        with context(), torch.no_grad():
            actions = torch.zeros(1, 1 + steps, 7, device=device)
            seconds = fastest(lambda actions=actions: model.rollout(frames, actions), device)
            yield {"what": f"rollout of {steps} steps, {what}", "ms": 1e3 * seconds}

            def plan() -> Tensor:
                now, goal = model.latents(frames[:, :1])[:, 0], model.latents(frames[:, 1:])[:, 0]
                cost = LearnedScorer(model, "last").cost_of_latents(now, goal)
                start = torch.zeros(1, 2, 7, device=device)
                return cem(cost, start, box, Draws(0, [0], 0, device), effort)

            yield {"what": f"plan of {samples} x {iterations} x 2, {what}", "s": fastest(plan, device)}


def fastest(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of two calls, after a call that is not counted."""
    action()
    return min(seconds_of(action, device, 1) for _ in range(2))
