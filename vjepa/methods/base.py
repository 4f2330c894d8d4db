"""What all objectives are made of: the networks, the clips with their masks, the loss, and the moving average.

Letters: B clips, T frames, Y X pixels, N tokens of a clip, D width, M kinds of mask. In a list each
entry has its own: _B and _N.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vjepa.config import Run
from vjepa.methods.masking import Mask, sample_masks
from vjepa.nn.encoder import normalise
from vjepa.nn.grid import Grid
from vjepa_data.reader.loader import Batch

WATCHED = 4096


@dataclass(frozen=True)
class Models:
    """The three networks: two that learn and one that follows."""

    encoder: nn.Module
    predictor: nn.Module
    target: nn.Module

    @property
    def learning(self) -> dict[str, nn.Module]:
        """Those with gradients."""
        return {"encoder": self.encoder, "predictor": self.predictor}

    @property
    def all(self) -> dict[str, nn.Module]:
        """Those with a place in a checkpoint."""
        return {**self.learning, "target": self.target}


def named_parameters(models: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Every parameter by its full name, `encoder.blocks.0.attn.qkv.weight`."""
    return {f"{part}.{name}": p for part, model in models.items() for name, p in model.named_parameters()}


@dataclass(frozen=True)
class MaskedClips:
    """Clips of one shape with what each kind of mask shows and hides of them, on the device."""

    frames: Float[Tensor, "B C T Y X"]
    grid: Grid
    masks: Sequence[Mask]

    step: int
    """Number of their batch, from which all that is random about them follows."""

    slots: tuple[int, ...]
    """Their places in the global batch."""

    @property
    def is_still(self) -> bool:
        """Whether these are still pictures, not repeated."""
        return self.frames.shape[2] == 1


@dataclass(frozen=True)
class Loss:
    """One micro-batch's part of the step's loss: added up over micro-batches and ranks, the parts are the loss."""

    value: Float[Tensor, ""]
    """With its gradient."""

    numbers: Float[Tensor, " numbers"]
    """Without it, 2 + M of them: the same; what guessing a clip's mean feature everywhere would have cost (per clip, so
    that it is the same on any number of ranks; falls with the loss when features collapse); the loss of each kind of
    mask."""

    features: Float[Tensor, "tokens D"]
    """What would lose its variety in a collapse: some of the targets, evenly spread, at most 4,096; or embeddings."""

    tokens: int
    """Tokens of these clips, once for each mask that they were seen through."""

    visible: int
    """Those that were visible."""

    hidden: int
    """Those that were guessed. With `reference` masks some are neither."""


def prepare_batch(run: Run, batch: Batch, device: torch.device) -> list[MaskedClips]:
    """Bring clips to the device and decide what is hidden of them, by (seed, step, slot).

    A still picture is a clip of one frame; unless it has a tokenizer of its own it is repeated to fill a tubelet.
    """
    puzzles = []
    for clips in batch.groups:
        pixels = normalise(_send(clips.frames, device))
        if pixels.shape[2] == 1 and not run.model.still_tokens:
            pixels = pixels.expand(-1, -1, run.model.tubelet_frames, -1, -1)
        _, _, frames, height, width = pixels.shape
        grid = Grid.of(frames, height, width, run.model)
        masks = sample_masks(run.masks, grid, seed=run.seed, step=batch.step, slots=clips.slots)
        masks = [Mask(mask.kind, mask.rows, _send(mask.visible, device), _send(mask.hidden, device)) for mask in masks]
        puzzles.append(MaskedClips(pixels, grid, masks, batch.step, clips.slots))
    return puzzles


def some_tokens(features: Sequence[Float[Tensor, "_B _N D"]]) -> Float[Tensor, "tokens D"]:
    """At most `WATCHED` of the tokens, evenly spread over clips and places."""
    tokens = torch.cat([h.flatten(0, 1) for h in features])
    return tokens[:: -(-len(tokens) // WATCHED)].clone()  # a view would keep all of them


@torch.no_grad()
def update_target(models: Models, rate: float, *, applied: Float[Tensor, ""]) -> None:
    """Let the target follow the encoder: target = rate * target + (1 - rate) * encoder, slice by slice, no messages.

    Kept in fp32: at 0.99925 an update in bf16 rounds to nothing.

    Args:
        models: sharded alike.
        rate: how much of the target stays.
        applied: 1, or 0 for a step that was skipped, which leaves the target as it is; on the device.
    """
    target, encoder = (_slices(model) for model in (models.target, models.encoder))
    way = torch._foreach_sub(encoder, target)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(way, applied * (1 - rate))  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(target, way)  # pyright: ignore[reportPrivateImportUsage]


def _slices(model: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter."""
    slices, is_sliced = [], isinstance(model, FSDPModule)
    for name, parameter in model.named_parameters():
        # A gathered root would take the average and drop it: see `parallel.shard`.
        assert isinstance(parameter, DTensor) or not is_sliced, f"{name} is gathered; the average would pass with it"
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}, too coarse for a moving average"
        slices.append(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
    return slices


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device while it is busy; from ordinary memory the host would wait for it."""
    is_to_go = device.type == "cuda" and not tensor.is_cuda  # the loader's frames are there already
    return tensor.pin_memory().to(device, non_blocking=True) if is_to_go else tensor
