"""What a run will need, before it is queued: arithmetic on its settings.

Letters: N tokens of a clip, V visible and K hidden ones, d width, L depth, r = MLP ratio.

    F(n; d, L, r) = L * ((8 + 4 r) n d^2 + 4 n^2 d)        forward of one sequence of n tokens, 2 per multiply-add
    target        = F(N) + patches(N)                       forward only
    encoder       = 3 sum_masks F(V) + 2 sum_masks patches(V)        no gradient reaches the pixels
    predictor     = 3 sum_masks (F(V + K) + in(V) + out(K))

V-JEPA 2.1's predictor has wider ends (a few levels joined) and an output for visible tokens too. LeVJEPA has no target
to run, its sequences are views rather than masks, and its predictor is a projector of one vector for each view.

These are model FLOPs, what MFU is measured by; what is computed again to save memory comes on top.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vjepa.config import Model, Run, Transformer
from vjepa.methods.levjepa.settings import LeVJEPASettings
from vjepa.nn.grid import Grid
from vjepa_data.settings import BadInput

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A kind of GPU: dense bf16 FLOP/s and memory, from its maker's data sheet."""

    name: str
    flops: float
    memory_gib: float


# What MFU is relative to; `name` is searched for in the device's own name. NVIDIA's data sheets, dense, SXM versions.
ACCELERATORS = {
    "a100": Accelerator("A100", 312e12, 80),
    "h100": Accelerator("H100", 989e12, 80),
    "h200": Accelerator("H200", 989e12, 141),
    "b200": Accelerator("B200", 2250e12, 180),
    "l40s": Accelerator("L40S", 362e12, 48),
}

# One core reads, decodes, crops and scales about 22 clips of 16 frames a second from the canonical form at 256 px
# (one busy x86 vCPU, decord, one thread); 1.3 times the need keeps the loader ahead.
FRAMES_PER_CORE_S = 350.0
HEADROOM = 1.3

# Of a GPU's memory, what is left after the driver, NCCL's buffers and fragmentation. A guess, to be measured.
USABLE = 0.92

CHECKED_SLOTS = 64
"""Slots whose masks are drawn to count tokens."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one clip through one kind of mask, on average."""

    whole: float
    visible: float
    hidden: float
    views: int = 1
    """Views of this shape: one through each kind of mask; for LeVJEPA the whole picture, or all small crops."""


@dataclass(frozen=True)
class Estimate:
    """Everything that a run will need; bytes are per GPU."""

    run: Run
    gpus: int
    accelerator: Accelerator
    mfu: float
    parameters: dict[str, int]
    tokens: list[Tokens]
    flops: dict[str, float]
    """Per clip, by part."""

    memory: dict[str, float]
    messages: dict[str, float]
    """Bytes that a GPU receives per step, by kind."""

    @property
    def clips_per_gpu(self) -> float:
        """Clips per step on each GPU."""
        return self.run.batch_size / self.gpus

    @property
    def flops_per_clip(self) -> float:
        """Model FLOPs of one clip, all parts."""
        return sum(self.flops.values())

    @property
    def step_s(self) -> float:
        """Seconds per step, if the stated MFU is reached."""
        return self.flops_per_clip * self.clips_per_gpu / (self.accelerator.flops * self.mfu)

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.step_s * self.run.steps / 3600

    @property
    def memory_gib(self) -> float:
        """Per GPU, all parts."""
        return sum(self.memory.values()) / GIB

    @property
    def fits(self) -> bool:
        """Whether it will fit into a GPU's memory."""
        return self.memory_gib <= USABLE * self.accelerator.memory_gib

    @property
    def cores_per_gpu(self) -> float:
        """CPU cores for the loader of each GPU."""
        return HEADROOM * self.clips_per_gpu / self.step_s * mean_frames(self.run) / FRAMES_PER_CORE_S

    def advice(self) -> list[str]:
        """Changes of settings that make it fit, when it does not; the cheapest first."""
        if self.fits:
            return []
        found: dict[str, str] = {}
        for name, value in self._remedies():
            change = {name: value}
            run = self.run.model_copy(update={"parallel": self.run.parallel.model_copy(update=change)})
            other = estimate(run, gpus=self.gpus, accelerator=self.accelerator, mfu=self.mfu, tokens=self.tokens)
            if other.fits:
                found.setdefault(name, f"parallel.{name}={value} makes it fit: {other.memory_gib:.0f} GiB")
        return list(found.values()) or [
            "no single setting makes it fit; use more GPUs, a smaller batch_size or a smaller model"
        ]

    def _remedies(self) -> Iterator[tuple[str, int | str]]:
        settings = self.run.parallel
        if settings.replicate > 1:
            yield "replicate", 1
        # LeVJEPA compares all clips of a step, so its step is not cut.
        per_gpu = 1 if isinstance(self.run.objective, LeVJEPASettings) else self.run.batch_size // self.gpus
        for accumulate in range(settings.accumulate + 1, per_gpu + 1):
            if per_gpu % accumulate == 0:
                yield "accumulate", accumulate
        if settings.recompute == "off":
            yield "recompute", "selective"
        if settings.recompute != "full":
            yield "recompute", "full"
        if not settings.offload:
            yield "offload", True

    def text(self) -> str:
        """All of it, for a terminal."""
        whole = sum(self.parameters.values())
        total_flops = self.flops_per_clip
        lines = [
            f"{self.run.name}: {self.run.steps:,} steps of {self.run.batch_size:,} clips "
            f"on {self.gpus:,} {self.accelerator.name} ({self.clips_per_gpu:g} clips each)",
            "",
            f"parameters       {whole / 1e6:10,.1f} M    "
            + ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in self.parameters.items()),
            f"tokens of a clip {self.tokens[0].whole:10,.0f}      "
            + ", ".join(
                f"{f'mask {i}' if t.views == 1 else f'{t.views} crops'}: {t.visible:,.0f} seen, {t.hidden:,.0f} hidden"
                for i, t in enumerate(self.tokens)
            ),
            f"model FLOPs/clip {total_flops / 1e12:10,.3f} T    "
            + ", ".join(f"{part} {flops / total_flops:.0%}" for part, flops in self.flops.items()),
            f"memory per GPU   {self.memory_gib:10,.1f} GiB  "
            + ", ".join(f"{part} {size / GIB:,.1f}" for part, size in self.memory.items()),
            f"messages per GPU {sum(self.messages.values()) / GIB:10,.2f} GiB  "
            + ", ".join(f"{kind} {size / GIB:,.2f}" for kind, size in self.messages.items() if size),
            f"step             {self.step_s:10,.3f} s    at {self.mfu:.0%} MFU",
            f"loader           {self.run.batch_size / self.step_s:10,.0f} clips/s, "
            f"{self.cores_per_gpu:.1f} cores per GPU with a third to spare",
            f"whole run        {self.hours:10,.1f} h    {self.hours * self.gpus:,.0f} GPU hours, "
            f"{total_flops * self.run.batch_size * self.run.steps:.2e} FLOPs",
        ]
        if not self.fits:
            lines += ["", f"Does not fit into {USABLE:.0%} of {self.accelerator.memory_gib:g} GiB."]
            lines += [f"  {advice}" for advice in self.advice()]
        return "\n".join(lines)


def accelerator_of(device_name: str) -> Accelerator | None:
    """The kind of GPU that a device's own name tells, if we know its peak."""
    return next((one for one in ACCELERATORS.values() if one.name in device_name), None)


def estimate(
    run: Run,
    *,
    gpus: int,
    accelerator: Accelerator = ACCELERATORS["h100"],
    mfu: float = 0.4,
    tokens: list[Tokens] | None = None,
) -> Estimate:
    """Work out what a run needs.

    Args:
        run: the run.
        gpus: all of them, over all nodes.
        accelerator: their kind.
        mfu: share of the accelerator's FLOP/s that the model's FLOPs will reach, in (0, 1].
        tokens: if they are known already; by default masks are drawn and counted.

    Raises:
        BadInput: the GPUs do not fit the batch or `parallel.replicate`.
    """
    if run.batch_size % gpus:
        raise BadInput(f"batch_size ({run.batch_size}) must be divisible by the number of GPUs ({gpus})")
    if gpus % run.parallel.replicate:
        raise BadInput(f"parallel.replicate ({run.parallel.replicate}) must divide the number of GPUs ({gpus})")
    if not 0 < mfu <= 1:
        raise BadInput(f"MFU must be above 0 and at most 1, got {mfu}; 0.4 is a good run of a large model")
    tokens = tokens or count_tokens(run)
    parameters = count_parameters(run)
    return Estimate(
        run=run,
        gpus=gpus,
        accelerator=accelerator,
        mfu=mfu,
        parameters=parameters,
        tokens=tokens,
        flops=count_flops(run, tokens),
        memory=count_memory(run, tokens, parameters, gpus),
        messages=count_messages(run, parameters, gpus),
    )


def lengths(run: Run) -> list[tuple[int, float]]:
    """Frames of a clip and share of the stream, for each source."""
    whole = sum(source.weight for source in run.data.sources)
    return [(source.frames or run.data.clip.frames, source.weight / whole) for source in run.data.sources]


def mean_frames(run: Run) -> float:
    """Frames of a clip, on average over the stream."""
    return sum(frames * share for frames, share in lengths(run))


def count_tokens(run: Run) -> list[Tokens]:
    """Draw masks for some slots and count, for each kind, or for LeVJEPA each size of view; an average over sources."""
    if isinstance(run.objective, LeVJEPASettings):
        (whole,), (small,) = (_count_masked(run, px) for px in (run.data.crop.px, run.objective.local_px))
        return [whole, replace(small, views=run.objective.local_views)]
    return _count_masked(run, run.data.crop.px)


def _count_masked(run: Run, px: int) -> list[Tokens]:
    from vjepa.methods.masking import sample_masks

    tokens = [Tokens(0, 0, 0) for _ in run.objective.mask_kinds]
    for frames, share in lengths(run):
        if not run.model.still_tokens:
            frames = max(frames, run.model.tubelet_frames)  # a still picture is repeated
        grid = Grid.of(frames, px, px, run.model)
        drawn = sample_masks(run.objective.mask_kinds, grid, seed=run.seed, step=0, slots=range(CHECKED_SLOTS))
        for mask in drawn:
            part = share * len(mask.rows) / CHECKED_SLOTS
            old = tokens[mask.kind]
            tokens[mask.kind] = Tokens(
                old.whole + part * grid.tokens,
                old.visible + part * mask.visible.shape[1],
                old.hidden + part * mask.hidden.shape[1],
            )
    return tokens


def count_parameters(run: Run) -> dict[str, int]:
    """Parameters of each network."""
    model, masks = run.model, len(run.objective.mask_kinds)
    d, p, levels = model.encoder.width, model.predictor.width, max(1, len(model.levels))
    patch = 3 * model.tubelet_frames * model.patch_px**2
    encoder = patch * d + d + stack_parameters(model.encoder) + levels * 2 * d
    if model.class_token:
        encoder += d
    if model.still_tokens:
        encoder += 3 * model.patch_px**2 * d + d + 2 * d
    if isinstance(run.objective, LeVJEPASettings):
        hidden, embedding = run.objective.projector
        predictor = d * hidden + 3 * hidden + hidden * embedding + embedding
    else:
        outputs = (1 + model.predict_context) * (p * levels * d + levels * d)
        predictor = masks * p + stack_parameters(model.predictor) + 2 * p + outputs
        predictor += levels * d * d + d + d * p + p if levels > 1 else d * p + p
        predictor += 2 * p if model.still_tokens else 0
    return {"encoder": encoder, "predictor": predictor, "target": encoder}


def stack_parameters(size: Transformer) -> int:
    """Parameters of a stack of blocks."""
    return size.depth * block_parameters(size)


def block_parameters(size: Transformer) -> int:
    """Parameters of one block: attention, MLP, two norms."""
    d, hidden = size.width, int(size.width * size.mlp_ratio)
    return (3 * d * d + 3 * d) + (d * d + d) + (d * hidden + hidden + hidden * d + d) + 4 * d


def count_flops(run: Run, tokens: Sequence[Tokens]) -> dict[str, float]:
    """Model FLOPs of one clip, by network; the formula at the top of this file."""
    model, d = run.model, run.model.encoder.width
    patch = 2 * 3 * model.tubelet_frames * model.patch_px**2 * d
    own = int(model.class_token)
    encoder = sum(t.views * (3 * stack_flops(t.visible + own, model.encoder) + 2 * t.visible * patch) for t in tokens)
    if isinstance(run.objective, LeVJEPASettings):
        hidden, embedding = run.objective.projector
        return {"encoder": encoder, "predictor": 6.0 * sum(t.views for t in tokens) * hidden * (d + embedding)}
    whole = tokens[0].whole
    return {
        "target": stack_flops(whole, model.encoder) + whole * patch,
        "encoder": encoder,
        "predictor": sum(
            3 * (stack_flops(t.visible + t.hidden, model.predictor) + end_flops(model, t)) for t in tokens
        ),
    }


def end_flops(model: Model, tokens: Tokens) -> float:
    """FLOPs of the forward pass of the predictor's linear maps from the encoder's width and back to it."""
    d, p, levels = model.encoder.width, model.predictor.width, max(1, len(model.levels))
    into = levels * d * d + d * p if levels > 1 else d * p
    asked = tokens.hidden + tokens.visible * model.predict_context
    return 2 * (tokens.visible * into + asked * p * levels * d)


def stack_flops(tokens: float, size: Transformer) -> float:
    """FLOPs of the forward pass of one sequence."""
    d, hidden = size.width, int(size.width * size.mlp_ratio)
    return size.depth * (8 * tokens * d * d + 4 * tokens * d * hidden + 4 * tokens**2 * d)


def count_memory(run: Run, tokens: Sequence[Tokens], parameters: dict[str, int], gpus: int) -> dict[str, float]:
    """Bytes on one GPU, by what for.

    Slices are exact but for padding. Activations count what eager autograd keeps for the backward pass, so compiling
    takes less. Passing tensors (gathered blocks, the target's activations) are rough.
    """
    slices = gpus // run.parallel.replicate
    clips = run.batch_size / gpus / run.parallel.accumulate
    width = 2 if run.precision == "bf16" else 4
    model = run.model
    has_predictor = not isinstance(run.objective, LeVJEPASettings)
    learning = parameters["encoder"] + parameters["predictor"]
    kept = (
        clips
        * width
        * sum(
            kept_values(run, model.encoder) * t.visible * t.views
            + (kept_values(run, model.predictor) * (t.visible + t.hidden) if has_predictor else 0)
            for t in tokens
        )
    )
    whole, d = tokens[0].whole, model.encoder.width
    # Two blocks gathered (one at work, one on its way), their whole gradients, and the roots.
    blocks = 2 * max(block_parameters(model.encoder), has_predictor * block_parameters(model.predictor))
    stacks = 2 * stack_parameters(model.encoder) + has_predictor * stack_parameters(model.predictor)
    roots = sum(parameters.values()) - stacks
    # One block of the target at work: its input, the residual, keys and values, the hidden layer twice.
    target = has_predictor * clips * whole * d * (6 + 2 * model.encoder.mlp_ratio) * width
    targets = has_predictor * clips * whole * d * 4 * 2  # in fp32, before and after the layer norm
    pixels = clips * mean_frames(run) * 3 * run.data.crop.px**2 * (1 + 4)  # bytes, and normalised in fp32
    if isinstance(run.objective, LeVJEPASettings):
        pixels += clips * mean_frames(run) * 3 * run.objective.local_px**2 * 4 * run.objective.local_views
        if run.objective.regularizer == "sigreg":  # in fp32: slices, angles of every clip, what was observed of all
            views, knots = sum(t.views for t in tokens), run.objective.knots
            kept += 4 * run.objective.slices * (run.objective.projector[1] + views * knots * (clips + 2))
    here = (0 if run.parallel.offload else 1) / slices
    return {
        "weights": 4 * learning * here,
        "target": 4 * parameters["target"] * here,
        "gradients": 4 * learning * here,
        "moments": 8 * learning * here,
        "gathered": (blocks + roots) * (width + 4),
        "activations": kept,
        "passing": target + targets + pixels,
    }


def kept_values(run: Run, size: Transformer) -> float:
    """Values per token that a stack keeps for its backward pass.

    A block keeps its input, the output of the first norm, q and k after rotation, qkv before it, attention's output and
    its copy, the residual, the output of the second norm, and the MLP's hidden layer before and after GELU:
    (11 + 2 r) d. Selective recomputation keeps the input and the products: qkv, attention, proj, fc1, fc2.
    """
    d, ratio = size.width, size.mlp_ratio
    whole = (11 + 2 * ratio) * d
    match run.parallel.recompute:
        case "off":
            return size.depth * whole
        case "selective":
            return size.depth * (7 + ratio) * d + whole
        case "full":
            return size.depth * d + whole


def count_messages(run: Run, parameters: dict[str, int], gpus: int) -> dict[str, float]:
    """Bytes that one GPU receives in a step.

    Inside a copy of the model: weights are gathered for the forward and again for the backward pass of what learns, and
    once for the target, in the working type; gradients are scattered in fp32. Between copies slices are summed.
    """
    copies = run.parallel.replicate
    slices = gpus // copies
    width = 2 if run.precision == "bf16" else 4
    learning = parameters["encoder"] + parameters["predictor"]
    passes = run.parallel.accumulate
    share = (slices - 1) / slices
    asked = 0 if isinstance(run.objective, LeVJEPASettings) else parameters["target"]
    return {
        "gather": share * width * passes * (2 * learning + asked),
        "scatter": share * 4 * learning,
        "sum between copies": 2 * (copies - 1) / copies * 4 * learning / slices,
    }
