"""Run: every setting of a run, gathered from the rooms. Never imports torch.

Grouped by consequence. What changes the result: `seed steps batch_size data model masks objective optim
precision`. What only changes the speed, the company or the record: `parallel loader checkpoint track health`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vjepa_data.config_files import Loaded, find_file, load_settings
from vjepa_data.settings import Data, Loader, Settings, Share

# name: (width, depth, heads, mlp_ratio). V-JEPA 2 (arXiv:2506.09985), table of model sizes; its released ViT-g is
# the one with heads of 64 channels, and so are ours.
ENCODERS: dict[str, tuple[int, int, int, float]] = {
    "vit_tiny": (192, 12, 3, 4.0),
    "vit_small": (384, 12, 6, 4.0),
    "vit_base": (768, 12, 12, 4.0),
    "vit_large": (1024, 24, 16, 4.0),
    "vit_huge": (1280, 32, 16, 4.0),
    "vit_giant": (1408, 40, 22, 48 / 11),
    "vit_gigantic": (1664, 48, 26, 64 / 13),
}


class Transformer(Settings):
    """Size of one stack of blocks."""

    width: int = Field(ge=8)
    """Channels of a token."""

    depth: int = Field(ge=1)
    """Blocks."""

    heads: int = Field(ge=1)
    """Attention heads; must divide the width."""

    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden channels of the MLP over the width."""

    @model_validator(mode="after")
    def _divisible(self) -> "Transformer":
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be divisible by heads ({self.heads})")
        if self.width // self.heads % 2 or self.width // self.heads < 6:
            raise ValueError(
                f"width / heads ({self.width} / {self.heads}) must be even and at least 6, so that its channels can "
                "turn in pairs with time, height and width"
            )
        return self


class Encoder(Transformer):
    """Size of the encoder: a name from the registry, or any of its numbers by hand."""

    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant", "vit_gigantic", "custom"]
    """Registry name, or `custom` with all numbers given."""

    @model_validator(mode="before")
    @classmethod
    def _from_registry(cls, given: object) -> object:
        if isinstance(given, str):
            given = {"name": given}
        if isinstance(given, dict) and given.get("name", "custom") not in (*ENCODERS, "custom"):
            raise ValueError(f"expected {', '.join(ENCODERS)} or custom, got {given['name']!r}")
        if isinstance(given, dict) and given.get("name") in ENCODERS:
            sizes = dict(zip(("width", "depth", "heads", "mlp_ratio"), ENCODERS[given["name"]], strict=True))
            given = {**sizes, **given}
        return given


class Model(Settings):
    """Encoder and predictor."""

    encoder: Encoder
    """A registry name (`vit_large`), or `{name: custom, width: 96, depth: 4, heads: 3}`."""

    predictor: Transformer = Transformer(width=384, depth=12, heads=12)
    """The narrow transformer that guesses hidden tokens."""

    patch_px: int = Field(default=16, ge=1)
    """Height and width of a token, in pixels."""

    tubelet_frames: int = Field(default=2, ge=1)
    """Frames in a token."""

    init_std: float = Field(default=0.02, gt=0)
    """Deviation of the first weights. 0.02 is V-JEPA 2's, for widths around 1,024; a tiny model learns faster from
    about 1 / sqrt(width)."""

    rope: Literal["tiled", "interleaved", "sincos"] = "tiled"
    """3-D positions. Rotary: `tiled` is V-JEPA 2's form and the one Hugging Face can express; `interleaved` is a true
    rotation (V-JEPA 2.1). Not rotary: `sincos` adds the first V-JEPA's sines and cosines to the tokens."""

    rope_cells: int | None = Field(default=None, ge=2)
    """Stretch the rows and columns of any picture to a grid of so many, so that positions keep their meaning when the
    resolution changes (V-JEPA 2.1: 16); by default positions are counted."""

    levels: tuple[int, ...] = ()
    """Blocks, counted from 0, whose features are learned and guessed side by side, the last block among them; by
    default those of the last block alone. V-JEPA 2.1 takes the ends of quarters: [5, 11, 17, 23] of 24."""

    guess_visible: bool = False
    """Guess the features of visible tokens too, through an output layer of their own (V-JEPA 2.1)."""

    still_tokens: bool = False
    """Still pictures have a tokenizer of one frame, and pictures and clips each a mark that is learned (V-JEPA 2.1);
    by default a still picture is repeated to fill a tubelet."""

    causal: bool = False
    """In the encoder a token sees its own tubelet and earlier ones only (LeVJEPA's block-causal attention); by default
    all of the clip. Attention is then sdpa's."""

    class_token: bool = False
    """One more token in the encoder, which stands for the clip (LeVJEPA). With `causal` it sees all others and none
    sees it."""

    @model_validator(mode="after")
    def _ends_at_the_last(self) -> "Model":
        depth = self.encoder.depth
        if self.levels and (list(self.levels) != sorted(set(self.levels)) or self.levels[-1] != depth - 1):
            raise ValueError(
                f"levels {list(self.levels)} must ascend and end at the last block ({depth - 1}); "
                f"try {[(i + 1) * depth // 4 - 1 for i in range(4)] if depth >= 4 else [depth - 1]}"
            )
        return self


class BalancedMask(Settings):
    """Block masks with exact counts: whole spatial tubes are added or removed, nothing is truncated."""

    mode: Literal["balanced"] = "balanced"
    blocks: int = Field(ge=1)
    """Rectangles whose union is hidden, through all of time."""

    block_share: Share
    """Area of one rectangle as a share of the frame."""

    aspect: tuple[float, float] = (0.75, 1.5)
    """Smallest and largest height / width of a rectangle."""

    visible_share: Share | None = None
    """Share of tokens that stay visible; by default what the rectangles leave free on average."""


class ReferenceMask(Settings):
    """V-JEPA 2's own sampler, its truncation to the batch minimum included, for parity and reproduction."""

    mode: Literal["reference"] = "reference"
    blocks: int = Field(ge=1)
    spatial_scale: tuple[Share, Share]
    temporal_scale: tuple[Share, Share] = (1.0, 1.0)
    aspect: tuple[float, float] = (0.75, 1.5)
    batch: int = Field(default=24, ge=1)
    """Slots that are truncated together. In V-JEPA 2 this is the batch of one GPU, and decides the masking ratio."""


class RandomMask(Settings):
    """Every token hidden with equal chance, exact count (LeVJEPA's token drop)."""

    mode: Literal["random"] = "random"
    visible_share: Share


class TubeMask(Settings):
    """Whole spatial tubes hidden at random, exact count (VideoMAE)."""

    mode: Literal["tube"] = "tube"
    visible_share: Share


class CausalMask(Settings):
    """The future hidden: predict it from the first tubelets."""

    mode: Literal["causal"] = "causal"
    visible_tubelets: int = Field(ge=1)


Mask = Annotated[BalancedMask | ReferenceMask | RandomMask | TubeMask | CausalMask, Field(discriminator="mode")]

# V-JEPA and V-JEPA 2: eight small rectangles ("short range") and two large ones ("long range").
BLOCKS = (BalancedMask(blocks=8, block_share=0.15), BalancedMask(blocks=2, block_share=0.7))


class VJEPA2(Settings):
    """Predict the target encoder's layer-normed features of hidden tokens (V-JEPA 2, arXiv:2506.09985)."""

    name: Literal["vjepa2"] = "vjepa2"
    loss_exponent: float = Field(default=1.0, gt=0)
    """p of mean(|error|^p) / p."""


class VJEPA21(Settings):
    """Predict hidden and visible tokens, at several depths (V-JEPA 2.1, arXiv:2603.14482). Needs `model.guess_visible`,
    and is meant for four `model.levels`."""

    name: Literal["vjepa2_1"] = "vjepa2_1"
    loss_exponent: float = Field(default=1.0, gt=0)
    """p of mean(|error|^p) / p."""

    context_weight: float = Field(default=0.5, ge=0)
    """Weight of the error on visible tokens, at the end of its ramp."""

    context_ramp: tuple[int, int] = (15_000, 30_000)
    """Steps between which that weight grows from 0, linearly."""

    by_distance: bool = True
    """Let visible tokens far from any hidden one count less, as 1 / sqrt(distance). V-JEPA 2.1 stops it in cooldown."""

    @model_validator(mode="after")
    def _ramp_ascends(self) -> "VJEPA21":
        start, end = self.context_ramp
        if not 0 <= start <= end:
            raise ValueError(f"context_ramp must be [start, end] with 0 <= start <= end, got [{start}, {end}]")
        return self


class LeVJEPA(Settings):
    """Bring views of a clip together and keep embeddings spread (LeVJEPA, arXiv:2608.27395). No predictor, no target:
    the moving average is for evaluation. Wants one kind of mask, `random` in the paper, with 5 % visible."""

    name: Literal["levjepa"] = "levjepa"
    local_views: int = Field(default=10, ge=1)
    """Small crops of each clip, beside the whole one."""

    local_px: int = Field(default=96, ge=1)
    """Height and width of a small crop, in pixels; a multiple of `model.patch_px`."""

    local_scale: tuple[Share, Share] = (0.02, 0.4)
    """Smallest and largest area of a small crop, as a share of the whole one."""

    jitter: Share = 0.8
    """Probability that a small crop changes brightness, contrast and saturation."""

    gray: Share = 0.2
    """Probability that a small crop loses its colour."""

    projector: tuple[int, int] = (2048, 256)
    """Hidden channels of the projector, and channels of an embedding."""

    variety: Literal["sigreg", "vicreg", "barlow"] = "sigreg"
    """What keeps embeddings from collapsing."""

    weight: float = Field(default=0.02, ge=0)
    """Weight of that term. LeVJEPA: 0.02 with sigreg; VICReg's own proportions are 1 with vicreg."""

    slices: int = Field(default=1024, ge=1)
    """Directions along which sigreg looks."""

    knots: int = Field(default=17, ge=2)
    """Points at which it compares characteristic functions."""


Objective = Annotated[VJEPA2 | VJEPA21 | LeVJEPA, Field(discriminator="name")]


class Optim(Settings):
    """AdamW, its rates, and the rate of the moving average, as functions of the step."""

    lr: float = Field(gt=0)
    """Peak learning rate, reached after warm-up."""

    start_lr: float = Field(default=0.0, ge=0)
    """Learning rate of the first step of warm-up."""

    final_lr: float = Field(default=0.0, ge=0)
    """Learning rate of the last step."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up. V-JEPA 2: 12,000."""

    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes from its peak to `final_lr`; `constant` stays at the peak."""

    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the first step; biases, norms and other vectors have none."""

    final_weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay at the last step (cosine in between); by default constant."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)

    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global gradient norm; by default gradients are not clipped (V-JEPA 2)."""

    ema: Share = 0.99925
    """Rate of the target encoder's moving average at the first step: target = ema * target + (1 - ema) * encoder."""

    final_ema: Share | None = None
    """The same at the last step (linear in between); by default constant."""


class Parallel(Settings):
    """How the work is spread. None of it changes the result beyond rounding."""

    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per step on each rank."""

    replicate: int = Field(default=1, ge=1)
    """Copies of the sharded model (HSDP): 1 shards over all ranks, the number of nodes shards inside each node."""

    recompute: Literal["off", "selective", "full"] = "off"
    """Activation checkpointing: keep all activations, recompute cheap ones, or recompute every block."""

    compile: bool = False
    """Compile each block with torch.compile."""

    attention: Literal["auto", "sdpa", "varlen", "xformers"] = "auto"
    """Attention backend; `auto` takes the first of varlen, xformers, sdpa that passes a small test on this
    machine; the order is fixed, so that all ranks and all attempts of a run agree."""

    offload: bool = False
    """Keep the slices of weights, gradients and moments in the memory of the host, and update them there (FSDP2's
    CPUOffloadPolicy): for models that do not fit otherwise, at the price of the way to the device and back."""

    deterministic: bool = False
    """Let torch take only kernels that give the same bits every time, and refuse operations that have none. On a CPU
    runs are exact without it."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a collective that does not return ends the process."""

    collect_every_steps: int = Field(default=100, ge=1)
    """Steps between collections of Python's garbage, at the same step on all ranks: one that collects alone makes all
    others wait."""


class Checkpoint(Settings):
    """When to save and what to keep."""

    every_steps: int = Field(default=1000, ge=1)

    folder: str | None = None
    """Where checkpoints lie: a folder, or the URL of one in an object store (`s3://bucket/runs/NAME`), of this run
    alone; by default `checkpoints` in the run folder. On the way to a URL they are staged in TMPDIR."""

    keep_last: int = Field(default=2, ge=2)
    """Newest checkpoints to keep; at least two, since one of them may be the one being written."""

    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints to keep for ever: those at multiples of this."""

    milestones: tuple[int, ...] = ()
    """Steps whose checkpoints are written whatever the cadence, and kept for ever."""

    background: bool = False
    """Write while training goes on."""


class Profile(Settings):
    """A look at where a few steps spend their time."""

    at: int = Field(ge=1)
    """First step to be traced, counted from 1; later than the first few, which warm up."""

    steps: int = Field(default=3, ge=1)
    """Steps in the trace; each makes a GPU's trace some megabytes longer."""

    ranks: int = Field(default=1, ge=1)
    """How many of the ranks, from 0, write one."""


class OnlineProbe(Settings):
    """What can be read from the target's features while it learns: ridge regression of a label of a few videos."""

    shards: str
    """Folder of a corpus whose samples carry the label."""

    label: str
    """Its name. Numbers are scored by R2, anything else by accuracy."""

    split: str = "val"
    """Part of the corpus; half of the videos are to fit on, half to score on."""

    videos: int = Field(default=128, ge=4)
    """At most so many, always the same, from the middle of each; kept in memory, spread over the ranks."""

    every_steps: int = Field(default=1000, ge=1)


class Track(Settings):
    """What is recorded, and where. `metrics.jsonl` in the run folder is always written and is the truth."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between records; before a checkpoint there is always one."""

    monitor_every_steps: int = Field(default=100, ge=1)
    """Steps between the monitors of collapse (RankMe, feature spread), which cost a decomposition."""

    pictures_every_steps: int | None = Field(default=5000, ge=1)
    """Steps between pictures of a clip, its masks and its features, in `pictures/` and at W&B; null for none."""

    probe: OnlineProbe | None = None
    """A probe in the course of the run; by default none."""

    profile: Profile | None = None
    """A trace by torch's profiler, in `profile/` of the run folder; by default none."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """`auto` is online with a key and a network, else offline. W&B is never the reason that training stops."""

    project: str = "vjepa"
    entity: str | None = None

    wandb_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds to wait for W&B's server at the start, before the record goes on offline."""


class Health(Settings):
    """When a run must stop, rather than go on wrongly."""

    max_skipped_in_a_row: int = Field(default=3, ge=1)
    """Steps in a row with a loss or gradient that is not finite, which are skipped, before the run goes back to its
    last healthy checkpoint."""

    max_loss_ratio: float | None = Field(default=None, gt=1)
    """A loss above this many times the median of the last 200 recorded steps, `max_skipped_in_a_row` times in a row,
    is a spike, and the run goes back to a checkpoint from before it; by default only what is not finite counts."""

    roll_backs: int = Field(default=1, ge=0)
    """How often an attempt may go back, before it stops."""

    after_roll_back: Literal["replay", "pass_over"] = "replay"
    """What comes then. `replay`: the same steps with the same batches, which mends what a faulty machine did and shows
    what was no machine's fault. `pass_over`: the batches between the checkpoint and the last bad step are never used;
    step s then takes the batch, masks and all, that step s + n would have had, n being their number. It is written to
    `passed_over.json` and into every checkpoint, so that any later attempt does the same (PaLM, arXiv:2204.02311,
    section 5.1)."""

    collapse_share: Share = 0.25
    """RankMe or spread of the features below this share of its own highest value so far is called a collapse."""

    on_collapse: Literal["warn", "roll_back", "stop"] = "warn"
    """What to do then: say so, go back to a checkpoint from before (counted among `roll_backs`), or stop."""

    stall_s: float = Field(default=60.0, gt=0)
    """Seconds without a step after which the stacks of all threads are written to the run folder; ten times as long
    for the first step, which may compile."""

    hang_s: float = Field(default=3600.0, gt=0)
    """Seconds without a step after which the process ends, so that a launcher can start it again."""

    straggler_ratio: float = Field(default=1.5, gt=1)
    """A rank that takes this many times as long as the median rank, for its data or for a matrix product that each
    does alone, is named in the log."""


class Run(Settings):
    """One training run: everything that decides its result, and how it is carried out."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Name of the run; its folder is `runs/NAME` unless told otherwise."""

    seed: int = Field(default=0, ge=0)
    """Whatever is random is a function of (seed, step, slot)."""

    steps: int = Field(ge=1)
    """Optimizer updates in the whole run."""

    batch_size: int = Field(ge=1)
    """Clips per step over all ranks: the number of slots."""

    start: str | None = None
    """Run or checkpoint whose networks and optimizer moments this run begins with, at step 0 of its own schedule: a
    cooldown, or further training on other data. By default new weights."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and gradients in flight; weights, averages and reductions are fp32."""

    data: Data
    model: Model
    masks: tuple[Mask, ...] = Field(default=BLOCKS, min_length=1)
    """Kinds of mask; every clip is seen through each of them in every step."""

    objective: Objective = VJEPA2()
    optim: Optim

    parallel: Parallel = Parallel()
    loader: Loader = Loader()
    checkpoint: Checkpoint = Checkpoint()
    track: Track = Track()
    health: Health = Health()

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        px, patch = self.data.crop.px, self.model.patch_px
        if px % patch:
            raise ValueError(f"data.crop.px ({px}) must be divisible by model.patch_px ({patch})")
        lanes = self.data.lanes
        if lanes and self.batch_size % lanes:
            raise ValueError(f"batch_size ({self.batch_size}) must be divisible by data.lanes ({lanes})")
        if self.optim.warmup_steps > self.steps:
            raise ValueError(f"optim.warmup_steps ({self.optim.warmup_steps}) must not exceed steps ({self.steps})")
        if isinstance(self.objective, LeVJEPA):
            self._fits_views(self.objective)
        elif self.model.class_token:
            raise ValueError(f"objective {self.objective.name} asks nothing of a class token; remove model.class_token")
        if self.model.guess_visible != isinstance(self.objective, VJEPA21):
            raise ValueError(
                f"model.guess_visible ({self.model.guess_visible}) does not go with objective {self.objective.name}: "
                f"an output layer would be {'left untrained' if self.model.guess_visible else 'missing'}; "
                f"set it to {not self.model.guess_visible}"
            )
        return self

    def _fits_views(self, objective: LeVJEPA) -> None:
        if objective.local_px % self.model.patch_px:
            raise ValueError(
                f"objective.local_px ({objective.local_px}) must be divisible by model.patch_px ({self.model.patch_px})"
            )
        if len(self.masks) != 1 or isinstance(self.masks[0], ReferenceMask):
            raise ValueError("objective levjepa wants one kind of mask, with exact counts; try random")
        if self.model.levels:
            raise ValueError("objective levjepa learns the last block alone; remove model.levels")
        if self.parallel.accumulate > 1:
            raise ValueError(
                f"objective levjepa compares all clips of a step, so parallel.accumulate ({self.parallel.accumulate}) "
                "would change the result; use more ranks or a smaller batch_size"
            )


def load(config: str | Path, overrides: Sequence[str] = ()) -> Loaded[Run]:
    """The run that a file describes.

    Args:
        config: path of a YAML file, or the name of one that ships with the project (`demo`, `vitl16_256px_16f`).
        overrides: `dotted.name=value`, the value in YAML.

    Raises:
        BadInput: the file is missing, or a setting is unknown, missing or out of range.
    """
    return load_settings(Run, find_file(config, shipped_configs()), overrides)


def shipped_configs() -> list[Path]:
    """The run files that come with the project: inside the package when installed, beside it in a clone."""
    package = Path(__file__).parent
    return sorted([*package.glob("configs/*.yaml"), *package.parent.glob("configs/*.yaml")])
