"""Memory, communication and hours of a run, by arithmetic on the counts of a step.

step    = FLOPs of a clip * clips per GPU / (peak FLOP/s * MFU)
memory  = shards of weights, averages, gradients and moments + gathered units + activations + transient tensors
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vjepa.config import Run
from vjepa.estimate.step_counts import StepCounts, clip_lengths, count_step
from vjepa_data.errors import BadInput

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A kind of GPU: dense bf16 FLOP/s and memory, from its maker's data sheet."""

    name: str
    flops: float
    memory_gib: float


# Peak rates for MFU. The first `name` in the device's own name counts. NVIDIA's data sheets, dense, SXM versions unless
# the name says another.
ACCELERATORS = {
    "a100": Accelerator("A100", 312e12, 80),
    "h100-pcie": Accelerator("H100 PCIe", 756e12, 80),
    "h100-nvl": Accelerator("H100 NVL", 835e12, 94),
    "h100": Accelerator("H100", 989e12, 80),
    "h200": Accelerator("H200", 989e12, 141),
    "b200": Accelerator("B200", 2250e12, 180),
    "l40s": Accelerator("L40S", 362e12, 48),
}

# One core reads, decodes, crops and scales about 22 clips of 16 frames a second from the canonical form at 256 px
# (one busy x86 vCPU, decord, one thread); 1.3 times the need keeps the loader ahead.
FRAMES_PER_CORE_S = 350.0
HEADROOM = 1.3

# Share of a GPU's memory that fragmentation leaves usable. A guess, to be measured.
USABLE = 0.95

# CUDA context, cuBLAS workspaces and NCCL's buffers of a process. A guess, to be measured.
CONTEXT_BYTES = 1.5 * GIB


@dataclass(frozen=True)
class Estimate:
    """The needs of a run. Bytes are per GPU."""

    run: Run
    gpus: int
    accelerator: Accelerator
    mfu: float
    counts: StepCounts
    memory: dict[str, float]
    communication: dict[str, float]
    """Bytes that a GPU receives per step, by kind."""
    per_node: int = 8
    """GPUs of a node."""
    network_gb_s: float | None = None
    """Measured GB/s of a GPU to other nodes."""

    @property
    def network_bytes(self) -> float:
        """Bytes that a GPU exchanges with other nodes per step. Shards of a copy inside a node stay there."""
        between = self.communication["sum between copies"]
        is_inside = self.gpus // self.run.parallel.copies(self.gpus, self.per_node) <= self.per_node
        return between if is_inside else sum(self.communication.values())

    @property
    def clips_per_gpu(self) -> float:
        """Clips per step on each GPU."""
        return self.run.batch_size / self.gpus

    @property
    def flops_per_clip(self) -> float:
        """Model FLOPs of a clip."""
        return self.counts.flops_per_clip

    @property
    def step_s(self) -> float:
        """Seconds per step, if the stated MFU is reached."""
        return self.flops_per_clip * self.clips_per_gpu / (self.accelerator.flops * self.mfu)

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.step_s * self.run.steps / 3600

    @property
    def memory_gib(self) -> float:
        """Memory per GPU."""
        return sum(self.memory.values()) / GIB

    @property
    def fits(self) -> bool:
        """True if the run fits into a GPU's memory."""
        return self.memory_gib <= USABLE * self.accelerator.memory_gib

    @property
    def cores_per_gpu(self) -> float:
        """CPU cores for the loader of each GPU."""
        return HEADROOM * self.clips_per_gpu / self.step_s * mean_frames(self.run) / FRAMES_PER_CORE_S

    def advice(self) -> list[str]:
        """Changes of settings that make it fit, cheapest first, or that save time if it fits already."""
        found: dict[str, str] = {}
        for name, value, why in self._savings() if self.fits else self._remedies():
            other = self._with(name, value)
            if other.fits:
                found.setdefault(name, f"parallel.{name}={value} {why}: {other.memory_gib:.0f} GiB")
        if found or self.fits:
            return list(found.values())
        return ["no single setting makes it fit; use more GPUs, a smaller batch_size or a smaller model"]

    def _with(self, name: str, value: int | str) -> "Estimate":
        """Return the estimate with another value of a setting in `parallel`."""
        run = self.run.model_copy(update={"parallel": self.run.parallel.model_copy(update={name: value})})
        return estimate(
            run, gpus=self.gpus, accelerator=self.accelerator, mfu=self.mfu, counts=self.counts, per_node=self.per_node
        )

    def _savings(self) -> Iterator[tuple[str, int | str, str]]:
        """Yield settings that fit and cost less time than the settings of the run. The largest savings come first."""
        settings, nodes = self.run.parallel, self.gpus // self.per_node
        if nodes > 1 and settings.copies(self.gpus, self.per_node) == 1:
            yield "replicate", "auto", "fits too, and keeps the weights inside nodes"
        for accumulate in range(1, settings.accumulate):
            if (self.run.batch_size // self.gpus) % accumulate == 0:
                yield "accumulate", accumulate, "fits too, and gathers the weights less often"
        for mode in {"full": ("off", "selective"), "selective": ("off",)}.get(settings.recompute, ()):
            yield "recompute", mode, "fits too, and computes less twice"

    def _remedies(self) -> Iterator[tuple[str, int | str, str]]:
        settings, fits = self.run.parallel, "makes it fit"
        if settings.copies(self.gpus, self.per_node) > 1:
            yield "replicate", 1, fits
        per_gpu = self.run.batch_size // self.gpus
        for accumulate in range(settings.accumulate + 1, per_gpu + 1):
            if per_gpu % accumulate == 0 and self._may_accumulate(accumulate):
                yield "accumulate", accumulate, fits
        if settings.recompute == "off":
            yield "recompute", "selective", fits
        if settings.recompute != "full":
            yield "recompute", "full", fits
        if not settings.offload:
            yield "offload", True, fits

    def _may_accumulate(self, accumulate: int) -> bool:
        """Return whether the method allows micro-batches."""
        parallel = self.run.parallel.model_copy(update={"accumulate": accumulate})
        try:
            self.run.objective.check(self.run.model_copy(update={"parallel": parallel}))
        except ValueError:
            return False
        return True

    def text(self) -> str:
        """Format the estimate for a terminal."""
        counts = self.counts
        whole = sum(counts.parameters.values())
        total_flops = self.flops_per_clip
        lines = [
            f"{self.run.name}: {self.run.steps:,} steps of {self.run.batch_size:,} clips "
            f"on {self.gpus:,} {self.accelerator.name} ({self.clips_per_gpu:g} clips each)",
            "",
            f"parameters       {whole / 1e6:10,.1f} M    "
            + ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in counts.parameters.items()),
            f"tokens of a clip {counts.tokens:10,.0f}      over all views: {counts.visible:,.0f} visible, "
            f"{counts.hidden:,.0f} predicted",
            f"model FLOPs/clip {total_flops / 1e12:10,.3f} T    "
            + ", ".join(f"{part} {flops / total_flops:.0%}" for part, flops in counts.flops.items()),
            f"memory per GPU   {self.memory_gib:10,.1f} GiB  "
            + ", ".join(f"{part} {size / GIB:,.1f}" for part, size in self.memory.items() if size >= GIB / 20),
            f"messages per GPU {sum(self.communication.values()) / GIB:10,.2f} GiB  "
            + ", ".join(f"{kind} {size / GIB:,.2f}" for kind, size in self.communication.items() if size),
            f"between nodes    {self.network_bytes / GIB:10,.2f} GiB  of these"
            + (f", {self.network_bytes / self.network_gb_s / 1e9:.3f} s a step" if self.network_gb_s else ""),
            f"step             {self.step_s:10,.3f} s    at {self.mfu:.0%} MFU",
            f"loader           {self.run.batch_size / self.step_s:10,.0f} clips/s, "
            f"{self.cores_per_gpu:.1f} cores per GPU with a third to spare",
            f"whole run        {self.hours:10,.1f} h    {self.hours * self.gpus:,.0f} GPU hours, "
            f"{total_flops * self.run.batch_size * self.run.steps:.2e} FLOPs",
        ]
        if not self.fits:
            lines += ["", f"Does not fit into {USABLE:.0%} of {self.accelerator.memory_gib:g} GiB."]
        elif self.advice():
            lines += ["", "It would also run with other settings:"]
        lines += [f"  {advice}" for advice in self.advice()]
        return "\n".join(lines)


def accelerator_of(device_name: str) -> Accelerator | None:
    """Return the kind of GPU of a device name, if its peak is known."""
    return next((kind for kind in ACCELERATORS.values() if kind.name in device_name), None)


def estimate(
    run: Run,
    *,
    gpus: int,
    accelerator: Accelerator = ACCELERATORS["h100"],
    mfu: float = 0.4,
    counts: StepCounts | None = None,
    per_node: int = 8,
    network_gb_s: float | None = None,
) -> Estimate:
    """Estimate the needs of a run.

    Args:
        run: the run.
        gpus: number of GPUs over all nodes.
        accelerator: their kind.
        mfu: assumed model FLOPs utilization, in (0, 1].
        counts: counts of a step, if they are known. By default a step is counted on the meta device.
        per_node: GPUs of a node.
        network_gb_s: measured GB/s of a GPU to other nodes.

    Raises:
        BadInput: the GPUs do not divide the batch, or `parallel.replicate` does not divide the GPUs.
    """
    if run.batch_size % gpus:
        raise BadInput(f"batch_size ({run.batch_size}) must be divisible by the number of GPUs ({gpus})")
    copies = run.parallel.copies(gpus, per_node)
    if gpus % copies:
        raise BadInput(f"parallel.replicate ({copies}) must divide the number of GPUs ({gpus})")
    if not 0 < mfu <= 1:
        raise BadInput(f"MFU must be above 0 and at most 1, got {mfu}; 0.4 is a good run of a large model")
    counts = counts or count_step(run)
    return Estimate(
        run=run,
        gpus=gpus,
        accelerator=accelerator,
        mfu=mfu,
        counts=counts,
        memory=count_memory(run, counts, gpus, copies),
        communication=count_communication(run, counts, gpus, copies),
        per_node=per_node,
        network_gb_s=network_gb_s,
    )


def mean_frames(run: Run) -> float:
    """Return the frames of a clip, averaged over the stream."""
    return sum(frames * share for frames, share in clip_lengths(run))


def count_memory(run: Run, counts: StepCounts, gpus: int, copies: int = 1) -> dict[str, float]:
    """Return the bytes on a GPU, by purpose.

    Shards are exact except for padding. Activations are counted in eager mode, so that compiled blocks take less.
    Recomputation keeps the inputs of blocks (`selective`: and the results of products), and restores the blocks in
    turn. Gathered units and transient tensors are upper bounds.
    """
    parallel = run.parallel
    shards, width = gpus // copies, 2 if run.precision == "bf16" else 4
    clips = run.batch_size / gpus / parallel.accumulate
    trained = sum(counts.parameters[name] for name in counts.trained)
    averages = sum(counts.parameters[name] for name in counts.averages)
    frozen = sum(counts.parameters.values()) - trained - averages
    kept = counts.activations[parallel.recompute]
    if parallel.recompute != "off":
        kept += counts.largest_activations
    here = (0 if parallel.offload else 1) / shards
    # Without a reduction after every micro-batch, FSDP2 accumulates gradients that are not sharded, in fp32.
    is_accumulating = parallel.accumulate > 1 and shards > 1
    # Two units gathered (one computing, one prefetched), the roots, small networks, and their gradients.
    gathered = 2 * counts.largest_unit + counts.roots + sum(counts.parameters[name] for name in counts.kept_gathered)
    return {
        "weights": 4 * trained * here,
        "averages": 4 * averages * here,
        "frozen": 4 * frozen * here,
        "gradients": 4 * trained * here,
        "moments": 8 * trained * here,
        "whole gradients": 4.0 * trained * is_accumulating,
        "gathered": float(gathered * (width + 4)),
        "activations": clips * kept,
        "transient": clips * counts.transient,
        "context": CONTEXT_BYTES,
    }


def count_communication(run: Run, counts: StepCounts, gpus: int, copies: int = 1) -> dict[str, float]:
    """Return the bytes that a GPU receives in a step, by kind.

    Inside a copy of the model, weights are gathered in the working type: twice for trained networks (forward and
    backward), once for small networks, which stay gathered, and for other networks of the forward pass. Gradients are
    scattered in fp32. Between copies, shards of gradients are summed.
    """
    shards = gpus // copies
    width = 2 if run.precision == "bf16" else 4
    trained = sum(counts.parameters[name] for name in counts.trained)
    forward_only = sum(counts.parameters[name] for name in counts.evaluated - counts.trained)
    once = sum(counts.parameters[name] for name in counts.kept_gathered)
    share = (shards - 1) / shards
    return {
        "gather": share * width * run.parallel.accumulate * (2 * trained - once + forward_only),
        "scatter": share * 4 * trained,
        "sum between copies": 2 * (copies - 1) / copies * 4 * trained / shards,
    }
