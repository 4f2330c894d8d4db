"""Counts of a training step, taken from the real loss on the meta device: no memory is used and nothing is computed.

A method declares nothing. Its networks are built, its inputs are prepared, and its loss runs forward and backward on
tensors without data, in the run's precision, while four observers count:

    FLOPs          torch's FlopCounterMode: the matrix products and the attention of the forward and backward passes
    activations    the storages that autograd saves for the backward pass, without parameters
    recomputation  of these, the storages that are kept when blocks are recomputed: their inputs, and products
    live bytes     the largest amount at any moment of the forward pass

Model FLOPs, by which MFU is measured, contain no recomputation.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vjepa.compat import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, TorchDispatchMode, storage_key, tree_leaves
from vjepa.config import Run
from vjepa.distributed.sharding import PRODUCTS, blocks_of, units_of
from vjepa.methods.base import Method, Networks, create_method
from vjepa_data.reader.batch import Batch, Clips

COUNTED_CLIPS = 64
"""Clips of the counted step. Masks differ between clips, so that fewer would make the mean of token counts rough."""

META = torch.device("meta")


@dataclass(frozen=True)
class StepCounts:
    """Counts of a step. Numbers of clips are means over the stream, and bytes are in the run's precision."""

    parameters: Mapping[str, int]
    """Parameters of each network."""

    trained: frozenset[str]
    averages: frozenset[str]
    evaluated: frozenset[str]
    """Names of the networks that are trained, that are averages, and that the forward pass runs."""

    largest_unit: int
    """Parameters of the largest unit of sharding: some neighbouring blocks of a network."""

    kept_gathered: frozenset[str]
    """Names of the trained networks of a single unit, which stay gathered from forward to backward pass."""

    roots: int
    """Parameters outside of blocks, of all networks."""

    flops: Mapping[str, float]
    """Model FLOPs of a clip, by network and for the rest of the loss."""

    tokens: float
    """Tokens of a clip, counted for each view."""
    visible: float
    hidden: float

    activations: Mapping[str, float]
    """Bytes that are kept of a clip until the backward pass, for each mode of `parallel.recompute`."""
    largest_activations: float
    """Bytes that autograd keeps inside of the largest trained block for a clip."""
    transient: float
    """Largest number of bytes for a clip that the forward pass holds in addition to the activations."""

    @property
    def flops_per_clip(self) -> float:
        """Model FLOPs of a clip."""
        return sum(self.flops.values())


def count_step(run: Run) -> StepCounts:
    """Count a step of a run, averaged over the clip lengths of its sources."""
    parts = [(share, _count(run, frames)) for frames, share in clip_lengths(run)]
    _, first = parts[0]
    means: dict[str, Any] = {}
    for field in fields(StepCounts):
        value = getattr(first, field.name)
        if isinstance(value, float):
            means[field.name] = sum(share * getattr(part, field.name) for share, part in parts)
        elif field.name in ("flops", "activations"):
            names = {name: [getattr(part, field.name)[name] for _, part in parts] for name in value}
            means[field.name] = {
                name: sum(share * each for (share, _), each in zip(parts, of_parts, strict=True))
                for name, of_parts in names.items()
            }
        else:
            means[field.name] = value
    return StepCounts(**means)


def clip_lengths(run: Run) -> list[tuple[int, float]]:
    """Return each number of frames per clip, with its share of the stream."""
    weights = defaultdict[int, float](float)
    for source in run.data.sources:
        weights[source.frames or run.data.clip.frames] += source.weight
    return [(frames, weight / sum(weights.values())) for frames, weight in weights.items()]


def _count(run: Run, frames: int) -> StepCounts:
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    method = create_method(run)
    with META:
        networks = method.build("sdpa")
    for _, network in networks.items():
        network.to(dtype)
    ignored = {storage_key(p.untyped_storage()) for _, network in networks.items() for p in network.parameters()}
    saved = _Saved(ignored)
    live, flops = _LiveBytes(ignored, saved), FlopCounterMode(display=False, custom_mapping=ATTENTION)
    blocks = [block for network in networks.trained.values() for block in blocks_of(network)]
    with live, flops, _observed(networks, blocks, saved, flops) as forward:
        inputs = method.prepare(_batch(run, method, frames), META)
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            loss = method.loss(networks, inputs, step=0)
        forward_flops, peak = flops.get_total_flops(), live.peak
        loss.value.backward()
    n = float(COUNTED_CLIPS)
    return StepCounts(
        parameters={name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        trained=frozenset(networks.trained),
        averages=frozenset(networks.averages),
        evaluated=frozenset(forward),
        largest_unit=max((sum(map(_size, unit)) for _, one in networks.items() for unit in units_of(one)), default=0),
        kept_gathered=frozenset(name for name, network in networks.trained.items() if len(units_of(network)) == 1),
        roots=sum(_size(network) - sum(map(_size, blocks_of(network))) for _, network in networks.items()),
        flops={name: count / n for name, count in _by_network(networks, forward, forward_flops, flops).items()},
        tokens=loss.tokens.total / n,
        visible=loss.tokens.visible / n,
        hidden=loss.tokens.hidden / n,
        activations={mode: saved.total(mode) / n for mode in RECOMPUTED},
        largest_activations=max(map(saved.total, saved.blocks), default=0) / n,
        transient=max(0.0, peak - saved.total("off")) / n,
    )


def _batch(run: Run, method: Method, frames: int) -> Batch:
    px, sequence = run.data.crop.px, run.data.clip.sequence
    slots = tuple(slot for slot in range(COUNTED_CLIPS) for _ in range(sequence))
    pixels = torch.empty(len(slots), frames, px, px, 3, dtype=torch.uint8, device=META)
    signals = method.example_signals(len(slots), frames, META)
    names = {"keys": ("",) * len(slots), "sources": (0,) * len(slots), "start_s": (0.0,) * len(slots)}
    clips = Clips(pixels, slots=slots, signals=signals, sequence=sequence, **names)
    return Batch(0, (clips,))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _by_network(
    networks: Networks, forward: Counter[str], forward_flops: int, counter: FlopCounterMode
) -> dict[str, float]:
    """Divide the FLOPs among networks. The backward pass is divided as the forward passes of trained networks."""
    backward = counter.get_total_flops() - forward_flops
    trained = sum(forward[name] for name in networks.trained) or 1
    found = {
        name: forward[name] + (backward * forward[name] / trained if name in networks.trained else 0.0)
        for name, _ in networks.items()
        if forward[name]
    }
    rest = counter.get_total_flops() - sum(found.values())
    return found | ({"loss": rest} if rest > 0.5 else {})


RECOMPUTED: dict[str, tuple[str, ...]] = {
    "off": ("outside", "inside"),
    "selective": ("outside", "inputs", "products"),
    "full": ("outside", "inputs"),
}
"""The groups of tensors that each mode of `parallel.recompute` keeps until the backward pass."""


class _Saved:
    """Storages that are kept for the backward pass. A storage counts once, whatever views of it are saved."""

    def __init__(self, ignored: set[int]) -> None:
        self._ignored = ignored
        self._found: dict[str, dict[int, torch.UntypedStorage]] = defaultdict(dict)
        self.blocks: list[str] = []
        """The names of the groups that hold what each trained block saves."""
        self.is_in_block = False

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        self.add("inside" if self.is_in_block else "outside", tensor)
        if self.is_in_block:
            self.add(self.blocks[-1], tensor)
        return tensor

    def add(self, group: str, tensor: Tensor) -> None:
        """Count a tensor in a group. Its storage is kept alive, so that its key is not used again."""
        storage = tensor.untyped_storage()
        if storage_key(storage) not in self._ignored:
            self._found[group][storage_key(storage)] = storage

    def total(self, name: str) -> int:
        """Return the bytes of a group or of a mode of recomputation."""
        union: dict[int, torch.UntypedStorage] = {}
        for group in RECOMPUTED.get(name, (name,)):
            union |= self._found[group]
        return sum(storage.nbytes() for storage in union.values())


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that exist. Also counts the results of matrix products inside of trained blocks as saved."""

    def __init__(self, ignored: set[int], saved: _Saved) -> None:
        super().__init__()
        self._ignored, self._saved, self._live = ignored, saved, dict[int, int]()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._watch(tensor.untyped_storage())
                if self._saved.is_in_block and (str(func) in PRODUCTS):
                    self._saved.add("products", tensor)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._live or key in self._ignored:
            return
        self._live[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.bytes -= self._live.pop(key, 0)


@contextmanager
def _observed(
    networks: Networks, blocks: list[nn.Module], saved: _Saved, flops: FlopCounterMode
) -> Iterator[Counter[str]]:
    """Count the forward FLOPs of each network, and tell `saved` which block runs."""
    forward, started = Counter[str](), dict[str, int]()

    def begin(name: str) -> None:
        started[name] = flops.get_total_flops()

    def end(name: str) -> None:
        forward[name] += flops.get_total_flops() - started[name]

    def enter(inputs: tuple[Any, ...]) -> None:
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                saved.add("inputs", tensor)
        saved.blocks.append(f"block {len(saved.blocks)}")
        saved.is_in_block = True

    def leave() -> None:
        saved.is_in_block = False

    with ExitStack() as hooks:
        for name, network in networks.items():
            hooks.callback(network.register_forward_pre_hook(lambda *_, name=name: begin(name)).remove)
            hooks.callback(network.register_forward_hook(lambda *_, name=name: end(name)).remove)
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(lambda _, inputs: enter(inputs)).remove)
            hooks.callback(block.register_forward_hook(lambda *_: leave()).remove)
        yield forward


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Count two products for each of the forward pass. Recomputation in a kernel is not model FLOPs."""
    return 2 * sdpa_flop_count(q, k, v)


# The operations of meta tensors in `vjepa.nn.attention`, which torch's counter does not list.
ATTENTION = {
    CPU_ATTENTION: _attention_flops,
    CPU_ATTENTION_BACKWARD: _attention_backward_flops,
}
