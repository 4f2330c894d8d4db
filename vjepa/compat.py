"""Every access of the trunk to private parts of torch.

Each function hides a private name, so an upgrade that breaks it breaks a single test in `tests/vjepa/test_compat.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
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
    """Return a store for a process group of one rank, which needs no address and no port."""
    from torch._C._distributed_c10d import HashStore

    return HashStore()


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


def skip_step_if(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Make the next step of a fused optimizer do nothing if a flag on the device is true, without asking the host.

    These are the attributes by which a gradient scaler makes a fused optimizer skip.
    """
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = flag.to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]


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
