"""Networks on the mesh: recomputation, compilation and sharding, block by block (FSDP2).

Each block of a network is a unit of sharding. Its parameters are kept in a shard on each rank, gathered just before the
block runs and freed afterwards. Optimizer state and averages are sharded alike. With `replicate` there are several such
sharded copies (HSDP): shards travel inside a copy, gradients between copies. A single rank that computes in the stored
type nothing is sharded.

    replicate=1   [ r0 r1 r2 r3 ]            replicate=2   [ r0 r1 ]  a copy, on one node
                  a copy in four shards                    [ r2 r3 ]  another copy
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vjepa.compat import ATTENTION_OPERATIONS, keep_compiled_variants
from vjepa.config import Parallel
from vjepa.methods.base import Networks

# Compiled variants of a block that are kept. A mixture of clip lengths in other numbers may need another one. Beyond
# this limit blocks run uncompiled, with a warning; torch's own limit of 8 would be reached within minutes.
COMPILED_VARIANTS = 64


def shard(networks: Networks, settings: Parallel, *, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Recompute, compile and shard networks over the mesh in place, block by block and then the rest.

    Args:
        networks: equal on all ranks, on the device or on the meta device.
        settings: `recompute`, `compile` and `offload`.
        mesh: one-dimensional, or two-dimensional (replicate, shard).
        dtype: type of parameters and activations in computation. Shards, averages and gradient sums are fp32.
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
    for name, network in networks.items():
        if name in networks.constants:
            continue
        is_trained = name in networks.trained
        for block in blocks_of(network):
            if is_trained:
                _recompute(block, settings.recompute)
            if settings.compile:
                block.compile()
            if is_sharded:
                fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
        # The root of a network without a backward pass would stay gathered after its forward pass. An average would be
        # written to its shards while the next forward reads the stale gathered copy, so it is resharded explicitly.
        if is_sharded:
            reshard = None if is_trained else True
            fully_shard(network, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)


def blocks_of(network: nn.Module) -> Sequence[nn.Module]:
    """Return the modules that are units of sharding: the entries of every child list named `*blocks`."""
    lists = [child for name, child in network.named_children() if name.endswith("blocks")]
    return [block for child in lists if isinstance(child, nn.ModuleList) for block in child]


def materialise(networks: Networks, device: torch.device, *, seed: int) -> None:
    """Allocate sharded networks of the meta device and initialise them.

    No rank ever holds a whole network: each rank draws parameter after parameter and keeps its shard. Memory is
    filled with NaN first, so that an uninitialised parameter is found.

    Args:
        networks: with `init_weights(seed)`, whose result depends neither on the device nor on the sharding.
        device: where the shards are kept: the CPU for offloaded networks.
        seed: seed of the run. An average starts equal to the network that it follows.
    """
    for name, network in networks.items():
        network.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        network.init_weights(seed)  # pyright: ignore[reportCallIssue]
        for path, parameter in network.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert not local.isnan().any(), f"{name}.{path} was not initialised"


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
