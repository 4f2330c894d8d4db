"""Networks on the mesh: recomputation, compilation and sharding, block by block (FSDP2).

A few neighbouring blocks of a network are a unit of sharding. Its parameters are kept in a shard on each rank, gathered
just before the blocks run and freed afterwards. Optimizer state and averages are sharded alike. With `replicate` there
are several such sharded copies (HSDP): shards travel inside a copy, gradients between copies. A single rank that
computes in the stored type shards nothing.

    replicate=1   [ r0 r1 r2 r3 ]            replicate=2   [ r0 r1 ]  a copy, on one node
                  a copy in four shards                    [ r2 r3 ]  another copy
"""

import math
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vjepa.compat import ATTENTION_OPERATIONS, forget_forward, keep_compiled_variants, local
from vjepa.config import Parallel
from vjepa.methods.base import Networks
from vjepa_data.errors import BadInput

# Compiled variants of a block that are kept. A mixture of clip lengths in other numbers may need another one. Beyond
# this limit blocks run uncompiled, with a warning. torch's own limit of 8 would be reached within minutes.
COMPILED_VARIANTS = 64


UNIT_PARAMETERS = 50_000_000
"""Parameters of a unit of sharding, at most, unless a single block has more. Each unit costs the host about 5 ms a step
(one slow core, torch 2.13) and a message its latency. 100 MB in bf16 keep a network of 50 GB/s busy for 2 ms."""


def shard(
    networks: Networks, settings: Parallel, *, mesh: DeviceMesh, dtype: torch.dtype, fixed_shapes: bool = False
) -> None:
    """Recompute, compile and shard networks over the mesh in place, block by block and then the rest.

    Args:
        networks: equal on all ranks, on the device or on the meta device.
        settings: `recompute`, `compile` and `offload`.
        mesh: one-dimensional, or two-dimensional (replicate, shard).
        dtype: type of parameters and activations in computation. Shards, averages and gradient sums are fp32.
        fixed_shapes: whether every step has tensors of the same shapes. Each network is then compiled for its own
            shapes. Otherwise torch would take the difference between networks for sizes that change.
    """
    half = dtype != torch.float32
    # Inputs are not cast: rotary angles must stay fp32 (in bf16 they are off by 0.07 rad at 64 frames).
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    if settings.compile:
        keep_compiled_variants(COMPILED_VARIANTS)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if settings.offload else OffloadPolicy()
    is_sharded = mesh.size() > 1 or half or settings.offload
    is_whole = mesh.size(mesh.ndim - 1) == 1 and not settings.offload
    for name, network in networks.items():
        if name in networks.constants:
            continue
        is_trained = name in networks.trained
        for block in blocks_of(network):
            if is_trained:
                _recompute(block, settings.recompute)
            if settings.compile:
                # Not the module: the hooks of FSDP2 stay outside, so that they are neither traced nor guarded.
                block.forward = torch.compile(block.forward, dynamic=False if fixed_shapes else None)
        # The root of a network without a backward pass would stay gathered after its forward pass. An average would be
        # written to its shards while the next forward reads the stale gathered copy, so it is resharded explicitly.
        # The few parameters of a small trained network stay gathered until its backward pass, and so does everything
        # where a rank holds all shards, since it would only be cast again.
        units = units_of(network)
        stays = is_trained and (is_whole or len(units) == 1)
        for unit in [*units, network] if is_sharded else ():
            reshard = not (stays or (is_trained and unit is network))
            fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)


def blocks_of(network: nn.Module) -> Sequence[nn.Module]:
    """Return the modules that are units of sharding: the entries of every child list named `*blocks`."""
    lists = [child for name, child in network.named_children() if name.endswith("blocks")]
    return [block for child in lists if isinstance(child, nn.ModuleList) for block in child]


def units_of(network: nn.Module) -> list[list[nn.Module]]:
    """Return the units of sharding: neighbouring blocks of a list, of together at most `UNIT_PARAMETERS`."""
    units: list[list[nn.Module]] = []
    lists = [child for name, child in network.named_children() if name.endswith("blocks")]
    for blocks in lists:
        size = math.inf
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            own = sum(p.numel() for p in block.parameters())
            if size + own > UNIT_PARAMETERS:
                units.append([])
                size = 0
            units[-1].append(block)
            size += own
    return units


def materialise(networks: Networks, device: torch.device, *, seed: int | None) -> None:
    """Allocate sharded networks of the meta device and initialise them.

    No rank ever holds a whole network: each rank draws parameter after parameter and keeps its shard. Memory is
    filled with NaN first, so that an uninitialised parameter is found.

    Args:
        networks: with `init_weights(seed)`, whose result depends neither on the device nor on the sharding.
        device: where the shards are kept: the CPU for offloaded networks.
        seed: seed of the run, or None if a checkpoint will fill all saved networks, which then stay NaN: drawing the
            weights of a ViT-g takes a rank 19 CPU seconds. An average starts equal to the network that it follows.
    """
    for name, network in networks.items():
        network.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        if seed is None and (name in networks.averages or name in networks.trained):
            continue
        if name in networks.averages:  # drawing the weights again would take as long as the first time
            _copy_shards(network, networks.trained[networks.averages[name].of])
        else:
            network.init_weights(seed or 0)  # pyright: ignore[reportCallIssue]
    if seed is not None:
        check_filled(networks)


def check_filled(networks: Networks) -> None:
    """Check that every parameter was drawn or restored. Memory starts as NaN.

    Raises:
        BadInput: a parameter is NaN, which a checkpoint of a healthy run never holds.
    """
    for name, network in networks.items():
        for path, parameter in network.named_parameters():
            if local(parameter).isnan().any():
                raise BadInput(f"{name}.{path} is NaN at the start; choose another checkpoint to start from")


@torch.no_grad()
def _copy_shards(network: nn.Module, source: nn.Module) -> None:
    """Fill a network with the weights of another that is sharded alike."""
    for one, other in ((network.parameters(), source.parameters()), (network.buffers(), source.buffers())):
        for tensor, value in zip(one, other, strict=True):
            local(tensor).copy_(local(value))


def local_shards(network: nn.Module) -> list[Tensor]:
    """Return this rank's shard of every parameter."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]


def synchronise_gradients(networks: Networks, *, now: bool) -> None:
    """Choose whether the next backward pass averages gradients over ranks or only accumulates them.

    Args:
        networks: sharded networks.
        now: true for the last micro-batch of a step.
    """
    for network in networks.trained.values():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(now)


def free_gathered(network: nn.Module) -> None:
    """Free the gathered weights of a network after a forward pass that no backward pass follows.

    Trained networks keep some of them for their backward pass. While gathered, their parameters are not the shards that
    the optimizer and the checkpoints know.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def mark_updated(networks: Networks, device: torch.device) -> None:
    """Let the first gathers of the next step wait for this update alone. Call it once per step.

    By default each network waits until all work queued on the device is done, so that the weights of the encoder and
    the predictor could not travel while the target runs.
    """
    if device.type != "cuda":
        return
    updated = torch.cuda.current_stream(device).record_event()
    for _, network in networks.items():
        if isinstance(network, FSDPModule):
            network.set_post_optim_event(updated)


def forget_forwards(networks: Networks) -> None:
    """Clear FSDP2's records of the forward passes of averages and frozen networks. Call it once per step."""
    for name, network in networks.items():
        if name not in networks.trained and isinstance(network, FSDPModule):
            forget_forward(network)


def _recompute(block: nn.Module, mode: str) -> None:
    """Keep only the inputs of a block and compute the rest again in the backward pass."""
    if mode == "off":
        return
    # The forward is wrapped rather than the module, so that parameter names do not change.
    block.forward = MethodType(_forward_kept if mode == "selective" else _forward_again, block)


# These are functions of the block, as its own forward is. torch.compile traces them, and all blocks share one trace.
# Blocks draw no random numbers, so no generator state is saved.


def _forward_again(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _forward_kept(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(
        type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
    )


def _keep_products() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of matrix products and attention, where nearly all the work is, and recompute the rest."""
    return CheckpointPolicy.MUST_SAVE if str(operation) in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


PRODUCTS = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        *ATTENTION_OPERATIONS,
        "xformers_flash.flash_fwd.default",
        "xformers_flash3.flash_fwd.default",
    }
)
