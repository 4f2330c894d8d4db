"""Each tensor of a checkpoint is written and read whole, by a single rank: its owner.

If every rank wrote its own slices, rank 0 would plan and record a slice for each tensor and rank: 1.5 million for a
ViT-g on 512 ranks. Instead the ranks that share a copy of the model exchange slices before a save, in rounds of a few
tensors, and after a load. A checkpoint then has as many entries as tensors, whatever the number of ranks.

    slices       r0 [a0 b0 c0]   r1 [a1 b1 c1]        in memory, while training
    owners       r0 [a]          r1 [b c]             in files

With `parallel.replicate` every copy of the model writes its own part of the tensors, and the exchange stays inside it.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from vjepa.compat import local
from vjepa.distributed.world import World

ROUND_BYTES = 64 << 20
"""Bytes of whole tensors on the device in a round, unless a single tensor has more. A round takes milliseconds."""

ALIGNED = 16
"""Bytes to which tensors are padded in a message, so that each starts where its type may start."""


def owners_of(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Return the rank that owns each tensor. All ranks own about as many bytes.

    Args:
        tensors: by name. Only their shapes and types count, which are equal on all ranks.
        ranks: number of ranks.
    """
    sizes = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    load = [(0, rank) for rank in range(ranks)]
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        held, rank = load[0]
        heapq.heapreplace(load, (held + sizes[name], rank))
        found[name] = rank
    return found


def gather_owned(tensors: Mapping[str, Tensor], world: World, *, copy: bool) -> dict[str, Tensor]:
    """Return the whole tensors that this rank owns. All ranks must call this.

    Args:
        tensors: sharded over the mesh along their first dimension, or equal on all ranks, by name.
        world: the ranks.
        copy: whether the result must share no memory with `tensors`. It is then in host memory.
    """
    owners = owners_of(tensors, world.size)
    whole = {
        name: local(tensor)
        for name, tensor in tensors.items()
        if owners[name] == world.rank and (world.size == 1 or not isinstance(tensor, DTensor))
    }
    if copy:
        whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in whole.items()}
    if world.size == 1:
        return whole
    group = world.mesh.get_group(world.mesh.ndim - 1)
    ranks = dist.get_process_group_ranks(group)
    sharded = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor) and owners[name] in ranks]
    for names in _rounds(sharded, tensors):
        pieces = {name: _padded_slice(tensors[name], len(ranks), world.device) for name in names}
        sent = torch.cat(list(pieces.values()))
        received = sent.new_empty(len(ranks) * len(sent))
        dist.all_gather_into_tensor(received, sent, group=group)
        start = 0
        for name, piece in pieces.items():
            if owners[name] == world.rank:
                like = tensors[name]
                size = _rows(like, len(ranks)) * _row_bytes(like)
                joined = received.view(len(ranks), -1)[:, start : start + size].reshape(-1)
                whole[name] = joined[: bytes_of(like)].clone().view(like.dtype).view(like.shape).to("cpu")
            start += len(piece)
    return whole


@torch.no_grad()
def spread_owned(owned: Mapping[str, Tensor], tensors: Mapping[str, Tensor], world: World) -> None:
    """Copy whole tensors from their owners to the slices and copies of all ranks, in place. All ranks must call this.

    Args:
        owned: the whole tensors that this rank owns.
        tensors: the tensors to fill.
        world: the ranks.
    """
    owners = owners_of(tensors, world.size)
    slices = world.mesh.size(world.mesh.ndim - 1)
    number = world.mesh.get_local_rank(world.mesh.ndim - 1)
    for owner in range(world.size):
        for names in _rounds((name for name in tensors if owners[name] == owner), tensors):
            sizes = [_aligned(bytes_of(tensors[name])) for name in names]
            message = torch.zeros(sum(sizes), dtype=torch.uint8, device=world.device)
            places = dict(zip(names, message.split(sizes), strict=True))
            for name, place in places.items():
                if owner == world.rank:
                    data = owned[name].contiguous().view(-1).view(torch.uint8)
                    place[: len(data)].copy_(data)
            dist.broadcast(message, src=owner)
            for name, place in places.items():
                target = tensors[name]
                whole = place[: bytes_of(target)].view(target.dtype).view(target.shape)
                if isinstance(target, DTensor):
                    rows = _rows(target, slices)
                    whole = whole[number * rows : (number + 1) * rows]
                local(target).copy_(whole)


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a whole tensor."""
    return tensor.numel() * tensor.element_size()


def _row_bytes(tensor: Tensor) -> int:
    return prod(tensor.shape[1:]) * tensor.element_size()


def _rows(tensor: Tensor, slices: int) -> int:
    """Return the rows of each slice, as FSDP2 cuts them: the last slices may have fewer, or none."""
    return ceil(tensor.shape[0] / slices)


def _padded_slice(tensor: Tensor, slices: int, device: torch.device) -> Tensor:
    """Return the bytes of this rank's slice, padded to the same size on all ranks."""
    assert isinstance(tensor, DTensor)
    assert tensor.placements[-1] == Shard(0), f"slices are cut along {tensor.placements[-1]}"
    rows = _rows(tensor, slices)
    data = local(tensor).detach().contiguous().view(-1).view(torch.uint8)
    padded = torch.zeros(_aligned(rows * _row_bytes(tensor)), dtype=torch.uint8, device=device)
    padded[: len(data)].copy_(data)
    return padded


def _aligned(size: int) -> int:
    return ceil(size / ALIGNED) * ALIGNED


def _rounds(names: Iterable[str], tensors: Mapping[str, Tensor]) -> Iterator[Sequence[str]]:
    """Cut names into lists whose tensors have together at most `ROUND_BYTES`."""
    some: list[str] = []
    held = 0
    for name in names:
        size = bytes_of(tensors[name])
        if some and held + size > ROUND_BYTES:
            yield some
            some, held = [], 0
        some.append(name)
        held += size
    if some:
        yield some
