"""Every access of the trunk to private parts of torch.

Each function hides a private name, so an upgrade that breaks it breaks a single test in `tests/vjepa/test_compat.py`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""torch's fused attention for the CPU, which also works on the meta device: (q, k, v, attn_mask=) -> (output, ...)."""

CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

ATTENTION_OPERATIONS = (
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._efficient_attention_forward.default",  # which xformers calls
    "torch_attn._varlen_attn.default",
)
"""The operations behind torch's attention functions, as names: some exist only when their module was imported."""


def local_store() -> Any:
    """Return a store for a process group of one rank, without an address or a port."""
    from torch._C._distributed_c10d import HashStore

    return HashStore()


def pretended_store() -> Any:
    """Return the store of a process group of the backend `fake`, whose messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def write_results(plan: Any) -> list[Any]:
    """Return the reports of a rank that has written its part of a checkpoint, without writing anything."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    return [
        WriteResult(index=item.index, size_in_bytes=0, storage_data=_StorageInfo("__0_0.distcp", number, 1))
        for number, item in enumerate(plan.items)
    ]


def flight_records() -> list[dict[str, Any]]:
    """Return the entries of torch's flight recorders of this process, oldest first for each recorder."""
    from torch._C import _distributed_c10d as c10d

    dumps = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # builds without NCCL lack the first
    texts = [getattr(c10d, name)() for name in dumps if hasattr(c10d, name)]
    return [entry for text in texts for entry in json.loads(text).get("entries", [])]


def store_reader(path: Path) -> "FileSystemReader":
    """Return DCP's reader for a checkpoint in an object store, through fsspec."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(str(path), use_listings_cache=False)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded.

    `DTensor.to_local` does the same in ten times the time, because it is an operation of autograd.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def adamw_(tensors: Mapping[str, Sequence[Tensor]], *, skip: Tensor, **rates: Any) -> None:
    """Make a fused step of AdamW in place, or none if a flag on the device is true, without asking the host.

    Args:
        tensors: `params`, `grads`, `exp_avgs`, `exp_avg_sqs` and `state_steps`, in the same order.
        skip: the flag. It takes the way by which a gradient scaler makes a fused optimizer skip.
        rates: `lr`, `beta1`, `beta2`, `weight_decay` and `eps`.
    """
    adamw(
        **{name: list(each) for name, each in tensors.items()},
        max_exp_avg_sqs=[],
        fused=True,
        found_inf=skip.to(torch.float32),
        amsgrad=False,
        maximize=False,
        **rates,
    )


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all tensors with a number on the device, in a few kernels for all."""
    torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType, reportCallIssue]


def forget_forward(network: nn.Module) -> None:
    """Clear FSDP2's record of a forward pass that no backward pass follows.

    The record serves to prefetch in the backward pass, which clears it. Without a name it grows in every step: 350 MB a
    day for a ViT-L. `FSDPModule.reset_iter_state` (torch 2.13) clears it too, but waits for the device.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            # torch 2.11 and 2.12 have one group of parameters.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                if group is not None:
                    group._post_forward_indices.clear()


def differences(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the difference of each pair, in a few kernels for all."""
    return torch._foreach_sub(tensors, others)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType, reportCallIssue]


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of all squares as a double, in a few kernels for all."""
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType, reportCallIssue]
    return torch.stack(list(norms)).double().square().sum()


def move_towards(tensors: Sequence[Tensor], goals: Sequence[Tensor], share: Tensor) -> None:
    """Add `share` of the difference to each tensor, `tensor += share * (goal - tensor)`, in a few kernels for all."""
    change = torch._foreach_sub(goals, tensors)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType, reportCallIssue]
    torch._foreach_mul_(change, share)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(tensors, change)  # pyright: ignore[reportPrivateImportUsage, reportArgumentType, reportCallIssue]


def keep_compiled_variants(count: int) -> None:
    """Let torch.compile keep `count` variants of a function before it runs that function uncompiled."""
    torch._dynamo.config.recompile_limit = count


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that views of the same storage share, also on the meta device, where addresses are zero."""
    return storage._cdata
