"""Run: all settings of a training run. Never imports torch.

Settings are grouped by consequence. These change the result: `seed steps batch_size data model objective optim
precision`. These affect only speed, process layout or logging: `parallel loader checkpoint track health`.

Settings live next to the code that they configure: `vjepa_data.settings` (data, loader), `vjepa.nn.settings`
(networks), `vjepa.methods.*.settings` (a file per method). This module adds the trainer's own and puts them together.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from vjepa.methods.mask_settings import BLOCKS as BLOCKS
from vjepa.methods.mask_settings import Mask as Mask
from vjepa.methods.settings import MethodSettings, read_method_settings, settings_classes
from vjepa.methods.vjepa2.settings import VJEPA2Settings
from vjepa.nn.settings import ENCODERS as ENCODERS
from vjepa.nn.settings import EncoderSize as EncoderSize
from vjepa.nn.settings import Model
from vjepa.nn.settings import Transformer as Transformer
from vjepa_data.config_files import Loaded, Variants, find_file, load_settings, move_renamed
from vjepa_data.settings import BadInput, Data, Loader, Settings, Share

Objective = Annotated[SerializeAsAny[MethodSettings], BeforeValidator(read_method_settings), Variants(settings_classes)]
"""Settings of any registered method (`vjepa.methods.settings.METHODS`)."""


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
    """Form of the decay from the peak of the learning rate to `final_lr`. `constant` stays at the peak."""

    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the first step. Biases, norms and other vectors have none."""

    final_weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay at the last step (cosine in between). By default constant."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)

    clip_norm: float | None = Field(default=None, gt=0)
    """Largest global gradient norm. By default gradients are not clipped (V-JEPA 2)."""

    ema: Share = 0.99925
    """Rate of the target encoder's moving average at the first step: target = ema * target + (1 - ema) * encoder."""

    final_ema: Share | None = None
    """The rate at the last step (linear in between). By default constant."""


class Parallel(Settings):
    """Distribution of the work. No setting changes the result beyond rounding."""

    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per step on each rank."""

    replicate: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Copies of the sharded model (HSDP): 1 shards over all ranks. `auto` makes a copy for each node, so that weights
    travel inside nodes only, and gradients between them once. `vjepa estimate` says whether a copy fits into a node."""

    recompute: Literal["off", "selective", "full"] = "off"
    """Activation checkpointing: keep all activations, recompute cheap activations, or recompute every block."""

    compile: bool = False
    """Compile each block with torch.compile."""

    attention: Literal["auto", "sdpa", "varlen", "xformers"] = "auto"
    """Attention backend. `auto` times those of varlen, xformers and sdpa that pass a small test on the shapes of the
    first step, once, and takes the fastest. `choices.json` in the run folder records it for later attempts."""

    offload: bool = False
    """Keep the slices of weights, gradients and moments in the memory of the host, and update them there (FSDP2's
    CPUOffloadPolicy): for models that do not fit otherwise, at the price of the way to the device and back."""

    deterministic: bool = False
    """Let torch take only kernels that give the same bits every time, and refuse operations that have none. On a CPU
    runs are exact without it."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which a collective that does not return ends the process."""

    collect_every_steps: int = Field(default=100, ge=1)
    """Steps between collections of Python's garbage, at the same step on all ranks: a rank that collects alone makes
    all ranks wait."""

    def copies(self, ranks: int, ranks_per_node: int) -> int:
        """Return the copies of the sharded model for a number of ranks."""
        if self.replicate != "auto":
            return self.replicate
        return max(1, ranks // ranks_per_node) if ranks % ranks_per_node == 0 else 1


class Checkpoint(Settings):
    """Times of saves, and the checkpoints that are kept."""

    every_steps: int = Field(default=1000, ge=1)

    folder: str | None = None
    """Place of the checkpoints of this run alone: a folder, or a URL in an object store (`s3://bucket/runs/NAME`). By
    default `checkpoints` in the run folder. On the way to a URL they are staged in TMPDIR."""

    keep_last: int = Field(default=2, ge=2)
    """Newest checkpoints to keep. At least two, since the newest may be incomplete."""

    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this step are never deleted."""

    milestones: tuple[int, ...] = ()
    """Steps whose checkpoints are always written and never deleted."""

    background: bool = False
    """Write while training goes on."""


class Profile(Settings):
    """A look at where a few steps spend their time."""

    at: int = Field(ge=1)
    """First step to be traced, counted from 1. It should be later than the first few, which warm up."""

    steps: int = Field(default=3, ge=1)
    """Steps in the trace. Each makes a GPU's trace some megabytes longer."""

    ranks: int = Field(default=1, ge=1)
    """Number of ranks, from 0, that write a trace."""


class OnlineProbe(Settings):
    """An online probe of the target's features: ridge regression of a label of a few videos."""

    shards: str
    """Folder of a corpus whose samples carry the label."""

    label: str
    """Its name. Numbers are scored by R2, anything else by accuracy."""

    split: str = "val"
    """Part of the corpus. The probe is fitted on half of its videos and scored on the other half."""

    videos: int = Field(default=128, ge=4)
    """Largest number of videos, always the same. Their middle clips are kept in memory, spread over the ranks."""

    every_steps: int = Field(default=1000, ge=1)


class OnlinePlan(Settings):
    """Planning in the course of a run: the success of a small deterministic planner, since a validation loss does not
    predict it."""

    every_steps: int = Field(ge=1)
    """Steps between measurements."""

    world: str = "two_room"
    """World of `vjepa plan`, at the rate of the run's clips."""

    layout: Literal["fixed", "random", "held_out"] = "fixed"
    """Layouts of the tasks."""

    episodes: int = Field(default=20, ge=1)
    """Tasks that a straight line does not solve, always the same."""

    samples: int = Field(default=32, ge=1)
    """Plans of an iteration of CEM."""

    iterations: int = Field(default=3, ge=1)
    """Rounds of a plan."""


class OnlineSurprise(Settings):
    """Surprise in the course of a run: how often a generated film that breaks a law of physics surprises the model more
    than one that obeys it. The films are those of `vjepa synthesize violations`, always the same."""

    every_steps: int = Field(ge=1)
    """Steps between measurements."""

    quadruplets: int = Field(default=28, ge=1)
    """Groups of four films, with two pairs each. Seven in a row break each law once."""


class Track(Settings):
    """Metrics to record, and their destinations. `metrics.jsonl` in the run folder is always written."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between records. There is always a record before a checkpoint."""

    monitor_every_steps: int = Field(default=100, ge=1)
    """Steps between the monitors of collapse (RankMe, feature spread), which cost a decomposition."""

    pictures_every_steps: int | None = Field(default=5000, ge=1)
    """Steps between pictures of a clip, its masks and its features, in `pictures/` and at W&B. Null for none."""

    probe: OnlineProbe | None = None
    """A probe in the course of the run. By default none."""

    plan: OnlinePlan | None = None
    """Planning in the course of the run, for methods with a dynamics predictor. By default none."""

    surprise: OnlineSurprise | None = None
    """Surprise in the course of the run, for methods with a masked predictor. By default none."""

    profile: Profile | None = None
    """A trace by torch's profiler, in `profile/` of the run folder. By default none."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """`auto` follows WANDB_MODE and the settings of `wandb`. By default it is online if there are a network and a login
    (`wandb login` or a key), else offline. WANDB_MODE=offline or disabled also overrules `online`, so that nothing is
    sent against it. W&B is never the reason that training stops."""

    project: str | None = None
    """W&B project. By default from WANDB_PROJECT or the settings of `wandb`, else vjepa."""

    entity: str | None = None
    """W&B user or team. By default from WANDB_ENTITY, the settings of `wandb`, or the account."""

    wandb_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds to wait for W&B's service and server at the start, before the record goes on offline or, if they hang,
    without W&B. The same limit holds for the last uploads at the end. `wandb sync` sends the rest later."""


class Health(Settings):
    """When a run must stop, rather than go on wrongly."""

    max_skipped_in_a_row: int = Field(default=3, ge=1)
    """Steps in a row with a loss or gradient that is not finite, which are skipped, before the run goes back to its
    last healthy checkpoint."""

    max_loss_ratio: float | None = Field(default=None, gt=1)
    """A loss above this many times the median of the last 200 recorded steps, `max_skipped_in_a_row` times in a row,
    is a spike, and the run goes back to a checkpoint from before it. By default only non-finite losses count."""

    roll_backs: int = Field(default=1, ge=0)
    """Number of times that an attempt may go back before it stops."""

    after_roll_back: Literal["replay", "pass_over"] = "replay"
    """Steps after going back. `replay`: the same steps with the same batches, which repairs faults of a machine, and
    repeats all other faults. `pass_over`: the n batches between the checkpoint and the last bad step are never used.
    Step s then takes the batch and masks of step s + n. It is written to `passed_over.json` and into every checkpoint,
    so that any later attempt does the same (PaLM, arXiv:2204.02311, section 5.1)."""

    collapse_share: Share = 0.25
    """RankMe or spread of the features below this share of its own highest value so far is called a collapse."""

    on_collapse: Literal["warn", "roll_back", "stop"] = "warn"
    """Action then: log it, go back to a checkpoint from before (counted among `roll_backs`), or stop."""

    stall_s: float = Field(default=60.0, gt=0)
    """Seconds without a step after which the stacks of all threads are written to the run folder. Ten times as long
    for the first step, which may compile."""

    hang_s: float = Field(default=3600.0, gt=0)
    """Seconds without a step after which the process ends, so that a launcher can start it again."""

    straggler_ratio: float = Field(default=1.5, gt=1)
    """A rank that takes this many times as long as the median rank, for its data or for a matrix product that each
    does alone, is named in the log."""


class Run(Settings):
    """A training run: everything that decides its result, and how it is carried out."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Name of the run. By default its folder is `runs/NAME`."""

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
    """Type of activations and gradients in flight. Weights, averages and reductions are fp32."""

    data: Data
    model: Model
    objective: Objective = VJEPA2Settings()
    """The method that is trained, with its settings. `name` selects it."""

    optim: Optim

    parallel: Parallel = Parallel()
    loader: Loader = Loader()
    checkpoint: Checkpoint = Checkpoint()
    track: Track = Track()
    health: Health = Health()

    renamed: ClassVar[dict[str, str]] = {
        "masks": "objective.masks",
        "model.guess_visible": "model.predict_context",
        "objective.variety": "objective.regularizer",
    }
    """Settings by the names that they had in version 0.1, which files and checkpoints may still use."""

    file_paths: ClassVar[tuple[str, ...]] = ("data.sources.*.shards", "data.sources.*.without")
    """Settings that hold paths. A relative path counts from the folder of the file that names it, if it exists there,
    else from the working directory."""

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed(cls, given: Any) -> Any:
        return move_renamed(given, cls.renamed) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        px, patch = self.data.crop.px, self.model.patch_px
        if px % patch:
            raise ValueError(f"data.crop.px ({px}) must be divisible by model.patch_px ({patch})")
        lanes = self.data.lanes
        if lanes and self.batch_size % lanes:
            raise ValueError(f"batch_size ({self.batch_size}) must be divisible by data.lanes ({lanes})")
        for mask in self.objective.mask_kinds:
            if mask.mode == "reference" and mask.groups and mask.groups * mask.batch != self.batch_size:
                raise ValueError(
                    f"a reference mask has {mask.groups} groups of {mask.batch} slots, and batch_size is "
                    f"{self.batch_size}. Set groups to batch_size / batch, or leave it out."
                )
        if self.optim.warmup_steps > self.steps:
            raise ValueError(f"optim.warmup_steps ({self.optim.warmup_steps}) must not exceed steps ({self.steps})")
        self.objective.check(self)
        return self

    @property
    def accumulate(self) -> int:
        """Micro-batches per step on each rank."""
        return self.parallel.accumulate

    @property
    def has_fixed_shapes(self) -> bool:
        """True if all clips have the same number of frames, and all masks the same number of tokens."""
        lengths = {source.frames or self.data.clip.frames for source in self.data.sources}
        return len(lengths) == 1 and not any(mask.mode == "reference" for mask in self.objective.mask_kinds)

    def check_ranks(self, ranks: int) -> None:
        """Check that a number of ranks can share the work, which only a launcher or the process group knows.

        Raises:
            BadInput: the ranks, or the micro-batches of a rank, do not divide the batch.
        """
        size, parts, lanes = self.batch_size, self.parallel.accumulate, self.data.lanes
        if size % ranks or (lanes or size) % ranks:
            what = f"the {lanes} lanes of the data" if lanes and not size % ranks else f"batch_size ({size})"
            raise BadInput(f"the number of ranks ({ranks}) must divide {what}; change either")
        if (size // ranks) % parts:
            raise BadInput(
                f"parallel.accumulate ({parts}) must divide the {size // ranks} clips of each of {ranks} ranks. Set it "
                f"to a divisor, or change batch_size ({size})."
            )
        if self.parallel.replicate != "auto" and ranks % self.parallel.replicate:
            raise BadInput(
                f"parallel.replicate ({self.parallel.replicate}) must divide the number of ranks ({ranks}); "
                f"1 shards over all of them"
            )

    def with_absolute_paths(self) -> "Run":
        """Return the same run with absolute paths, which mean the same in every working folder."""
        sources = tuple(
            source.model_copy(update={"shards": _absolute(source.shards), "without": _absolute(source.without)})
            for source in self.data.sources
        )
        probe = self.track.probe
        return self.model_copy(
            update={
                "start": _absolute(self.start),
                "objective": self.objective.with_absolute_paths(),
                "data": self.data.model_copy(update={"sources": sources}),
                "loader": self.loader.model_copy(update={"cache": _absolute(self.loader.cache)}),
                "checkpoint": self.checkpoint.model_copy(update={"folder": _absolute(self.checkpoint.folder)}),
                "track": self.track.model_copy(
                    update={"probe": probe and probe.model_copy(update={"shards": _absolute(probe.shards)})}
                ),
            }
        )


def _absolute(path: str | None) -> str | None:
    """Return a path that does not depend on the working folder. URLs stay as they are."""
    return path if path is None or "://" in path else os.path.abspath(path)


def load(config: str | Path, overrides: Sequence[str] = ()) -> Loaded[Run]:
    """The run that a file describes.

    Args:
        config: path of a YAML file, or the name of a file that ships with the project (`demo`, `vitl16_256px_16f`).
        overrides: `dotted.name=value`, the value in YAML.

    Raises:
        BadInput: the file is missing, or a setting is unknown, missing or out of range.
    """
    return load_settings(Run, find_file(config, shipped_configs()), overrides)


def shipped_configs() -> list[Path]:
    """The run files that come with the project: inside the package when installed, next to it in a clone."""
    package = Path(__file__).parent
    return sorted([*package.glob("configs/*.yaml"), *package.parent.glob("configs/*.yaml")])
