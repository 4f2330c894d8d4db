"""The contract of a method: networks, inputs, loss, and the step after an update.

    batch --prepare--> inputs --loss--> Loss --(backward, optimizer)--> after_update

The trainer, the checkpoints, the monitors, the estimate, the export and the pages work from `Networks` and from names
in `Loss.metrics`. Nothing outside a method's own folder asks which method it is.

Letters: B clips, T frames, Y X pixels, N tokens of a clip, D width. In a list each entry has its own: _B and _N.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vjepa.compat import local, move_towards
from vjepa.methods.masking import Mask, sample_masks
from vjepa.methods.settings import METHODS, MethodSettings, RunSettings, import_class
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import normalise
from vjepa.nn.grid import Grid
from vjepa_data.reader.batch import Batch, Signal

MONITORED_TOKENS = 4096
"""Tokens whose features the collapse monitors see, at most, for each micro-batch."""


@dataclass(frozen=True)
class Average:
    """A moving average of a trained network, which starts equal to it."""

    network: nn.Module
    of: str
    """Name of the trained network that it follows."""


@dataclass(frozen=True)
class Networks:
    """The networks of a method, by the names that prefix their tensors in checkpoints.

    Every network has `init_weights(seed)`, which fills its parameters and buffers. The result must depend neither on
    the device nor on the sharding. A pretrained network reads its file there.
    """

    trained: Mapping[str, nn.Module]
    """Networks that receive gradients: sharded, optimized, saved."""

    averages: Mapping[str, Average] = field(default_factory=dict)
    """Moving averages of trained networks: sharded and saved. Empty for a method without a teacher."""

    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    """Pretrained networks that stay as they are: sharded, neither optimized nor saved."""

    constants: Mapping[str, nn.Module] = field(default_factory=dict)
    """Small networks of numbers that a model needs and the optimizer does not change, such as the scale of actions:
    whole on each rank, fp32, saved. The name `dynamics.actions` makes the tensors a part of the network `dynamics`."""

    exported: str = "encoder"
    """Name of the encoder that evaluations and exports use."""

    def __getitem__(self, name: str) -> nn.Module:
        """Return a network by its name."""
        return dict(self.items())[name]

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield all networks by name: trained, averages, frozen, constants."""
        yield from self.trained.items()
        yield from ((name, average.network) for name, average in self.averages.items())
        yield from self.frozen.items()
        yield from self.constants.items()

    @property
    def saved(self) -> dict[str, nn.Module]:
        """Networks whose parameters are stored in checkpoints."""
        return {name: network for name, network in self.items() if name not in self.frozen}


def named_parameters(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return every parameter by its full name, such as `encoder.blocks.0.attn.qkv.weight`."""
    return {f"{name}.{path}": p for name, network in networks.items() for path, p in network.named_parameters()}


@dataclass(frozen=True)
class MaskedClips:
    """Clips of equal shape on the device, with the masks through which they are seen."""

    frames: Float[Tensor, "B C T Y X"]
    grid: Grid
    masks: Sequence[Mask]

    step: int
    """Number of the batch. Everything random about the clips is a function of it, the seed and the slots."""

    slots: tuple[int, ...]
    """Positions of the clips in the global batch."""

    @property
    def is_still(self) -> bool:
        """True for still pictures that were not repeated to fill a tubelet."""
        return self.frames.shape[2] == 1


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the clips of a micro-batch, counted once for each mask through which they are seen."""

    total: int = 0
    visible: int = 0
    hidden: int = 0
    """Predicted tokens. With `reference` masks some tokens are neither visible nor hidden."""


@dataclass(frozen=True)
class Loss:
    """A micro-batch's part of the loss of a step. The sum over micro-batches and ranks is the loss."""

    value: Float[Tensor, ""]
    """The part, with its gradient."""

    metrics: Mapping[str, Float[Tensor, ""]]
    """Parts of named numbers, without gradient. They are summed as the loss is, and logged as `loss/NAME`. With
    `baseline`, the loss of a constant prediction, the share that the model explains is logged as `loss/explained`. The
    baseline is per clip and does not depend on the number of ranks. It falls with the loss when features collapse."""

    features: Float[Tensor, "tokens D"]
    """Features for the collapse monitors: at most 4,096 targets, evenly spread, or embeddings."""

    tokens: TokenCounts = TokenCounts()

    ratios: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Ratios of two metrics to log, by name: numerator and denominator, each summed over micro-batches and ranks."""


class Method(ABC):
    """A way to train networks on clips. Subclasses live in a folder each and are registered in `METHODS`."""

    settings: Any
    """Settings of the method. Subclasses declare their own class."""

    def __init__(self, settings: MethodSettings, run: RunSettings) -> None:
        """Args:
        settings: the settings of the method.
        run: the settings of the run that a method may read.
        """
        self.settings, self.run = settings, run

    @abstractmethod
    def build(self, attention: Backend = "sdpa") -> Networks:
        """Return the networks with the initial weights of the run's seed, unless on the meta device.

        Args:
            attention: backend of attention over packed sequences, see `vjepa.nn.attention.choose`.
        """

    def example_signals(self, clips: int, frames: int, device: torch.device) -> Mapping[str, Signal]:
        """Return signals of the shapes that `prepare` reads, with any values. By default none.

        `vjepa estimate` counts a step without a corpus, and a corpus alone knows these shapes.

        Args:
            clips, frames: number of clips and of their frames.
            device: where the signals lie.
        """
        return {}

    @abstractmethod
    def prepare(self, batch: Batch, device: torch.device) -> Any:
        """Bring a micro-batch to the device and draw everything random about it from (seed, step, slot)."""

    @abstractmethod
    def loss(self, networks: Networks, inputs: Any, *, step: int) -> Loss:
        """Return this micro-batch's part of the loss.

        Args:
            networks: the networks, perhaps sharded.
            inputs: the result of `prepare`.
            step: number of earlier updates. It differs from the batch's number after batches were skipped.
        """

    def after_update(self, networks: Networks, *, ema: float, applied: Float[Tensor, ""]) -> None:
        """Move the averages towards the networks that they follow.

        Args:
            networks: the networks after the optimizer's step.
            ema: share of an average that stays.
            applied: 1, or 0 for a skipped step, which leaves the averages as they are. On the device.
        """
        for average in networks.averages.values():
            update_average(average.network, networks.trained[average.of], ema, applied=applied)


def create_method(run: Any) -> Method:
    """Return the method that a run trains.

    Args:
        run: a `vjepa.config.Run`.
    """
    return import_class(METHODS[run.objective.name].method)(run.objective, run)


class MaskingMethod(Method):
    """Base of the methods that see clips through masks."""

    def prepare(self, batch: Batch, device: torch.device) -> list[MaskedClips]:
        """Bring clips to the device and draw their masks.

        A still picture is a clip of a single frame. It is repeated to fill a tubelet, unless it has its own tokenizer.
        """
        return [self.mask(clips.frames, device, step=batch.step, slots=clips.slots) for clips in batch.groups]

    def mask(self, frames: Tensor, device: torch.device, *, step: int, slots: tuple[int, ...]) -> MaskedClips:
        """Normalise frames of equal shape and draw their masks.

        Args:
            frames: uint8 [B T H W C].
            device: where the clips and masks go.
            step: number of the batch.
            slots: positions of the clips in the global batch.
        """
        model = self.run.model
        pixels = normalise(send(frames, device))
        if pixels.shape[2] == 1 and not model.still_tokens:
            pixels = pixels.expand(-1, -1, model.tubelet_frames, -1, -1)
        _, _, count, height, width = pixels.shape
        grid = Grid.of(count, height, width, model)
        masks = sample_masks(self.settings.mask_kinds, grid, seed=self.run.seed, step=step, slots=slots)
        masks = [Mask(mask.kind, mask.rows, send(mask.visible, device), send(mask.hidden, device)) for mask in masks]
        return MaskedClips(pixels, grid, masks, step, slots)


def sample_tokens(features: Sequence[Float[Tensor, "_B _N D"]]) -> Float[Tensor, "tokens D"]:
    """Return at most `MONITORED_TOKENS` of the tokens, evenly spread over clips and positions."""
    tokens = [h.flatten(0, 1) for h in features]
    every, first, kept = -(-sum(map(len, tokens)) // MONITORED_TOKENS), 0, []
    for each in tokens:
        kept.append(each[-first % every :: every])
        first += len(each)
    return torch.cat(kept)  # a view would keep all of them


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, ema: float, *, applied: Float[Tensor, ""]) -> None:
    """Update a moving average shard by shard, without communication: average = ema * average + (1 - ema) * network.

    Averages are fp32. At 0.99925 an update in bf16 would round to nothing.

    Args:
        average: sharded as `network` is.
        network: the network that it follows.
        ema: share of the average that stays.
        applied: 1, or 0 for a skipped step, which leaves the average as it is. On the device.
    """
    move_towards(_shards(average), _shards(network), applied * (1 - ema))


def _shards(network: nn.Module) -> list[Tensor]:
    """Return this rank's shard of every parameter."""
    shards, is_sharded = [], isinstance(network, FSDPModule)
    for name, parameter in network.named_parameters():
        # A gathered root would take the update and drop it: see `vjepa.distributed.sharding.shard`.
        assert isinstance(parameter, DTensor) or not is_sharded, f"{name} is gathered; its update would be lost"
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}, too coarse for a moving average"
        shards.append(local(parameter))
    return shards


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device asynchronously. From pageable memory the host would wait for the copy."""
    if device.type == "cuda" and not tensor.is_cuda:  # the loader's frames may already be there
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
