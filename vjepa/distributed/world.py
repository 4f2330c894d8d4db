"""Many processes, one run: the group, the mesh, and how the models are spread over it.

Each block of a model is a unit of sharding (FSDP2): its parameters live in slices, one per rank, are gathered just
before it runs and dropped after. Optimizer state and the target encoder are sliced alike. With `replicate` there are
several such sharded copies (HSDP): slices travel inside a copy, gradients between copies. A process that is alone, and
computes in the type that it keeps, has nothing to slice: its models stay as they are.

    replicate=1   [ r0 r1 r2 r3 ]            replicate=2   [ r0 r1 ]  one copy, on one node
                  one copy in four slices                  [ r2 r3 ]  another copy
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vjepa.config import Parallel
from vjepa.methods import Models
from vjepa_data.settings import BadInput

T = TypeVar("T")

# What launchers other than torchrun and ours export for each of several tasks. Two such tasks that did not find each
# other would each train alone and overwrite one another's checkpoints, so we would rather stop.
OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# Programs of a block that are kept. A mixture of clip lengths in other numbers may need another; beyond these, blocks
# run as they are, with a warning, where torch's own limit of 8 would be met within minutes.
COMPILED_FORMS = 64


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    control: dist.ProcessGroup
    """Gloo group for small messages between hosts, which neither wait for the device nor make it wait."""

    storage: dist.ProcessGroup
    """Gloo group for checkpoints alone: their messages may come from another thread, at any time."""

    ranks_here: int = 1
    """Ranks on this machine, which share its memory."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 only, and give its result to all.

        Raises:
            BadInput, OSError: on every rank, when the function raised it on rank 0.
        """
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = function()
            except (BadInput, OSError) as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.control)
        result, error = box
        if error is not None:
            raise error
        return result

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, on the device and without waiting for it."""
        total = value.clone()
        dist.all_reduce(total)
        return total


@contextmanager
def join(settings: Parallel) -> Iterator[World]:
    """Meet the other processes of this run; leave them at the end.

    Who they are is read from `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`,
    as torchrun and `vjepa launch` set them; without them this process is the whole world.

    Raises:
        BadInput: these variables are incomplete, `parallel.replicate` does not divide the number of ranks, or this
            machine has no network interface at all.
        torch.distributed.DistError: the others did not come within `parallel.timeout_s`.
    """
    _make_exact(settings)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that are remembered for when one hangs
    rank, size, local = _place()
    if size % settings.replicate:
        raise BadInput(
            f"parallel.replicate ({settings.replicate}) must divide the number of ranks ({size}); "
            f"1 shards over all of them"
        )
    _check_loopback()
    device = _device(local)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=settings.timeout_s)
    store = HashStore() if size == 1 else None  # alone: no address, no port to clash with another run
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=size,
        timeout=timeout,
        store=store,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        shape = (settings.replicate, size // settings.replicate)
        names = ("replicate", "shard")
        flat = settings.replicate == 1
        mesh = init_device_mesh(device.type, shape[flat:], mesh_dim_names=names[flat:])
        control = dist.new_group(backend="gloo", timeout=timeout)
        # A checkpoint of a large model on a slow disk takes longer than any step.
        storage = dist.new_group(backend="gloo", timeout=max(timeout, timedelta(minutes=30)))
        assert isinstance(control, dist.ProcessGroup)
        assert isinstance(storage, dist.ProcessGroup)
        here = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        yield World(rank, size, device, mesh, control=control, storage=storage, ranks_here=here)
    finally:
        dist.destroy_process_group()


def shard(models: Models, settings: Parallel, *, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread models over the mesh in place: recompute, then compile, then slice, block by block and then the rest.

    Args:
        models: equal on all ranks, on the device.
        settings: `recompute`, `compile` and `offload`.
        mesh: of one dimension, or of two (replicate, shard).
        dtype: of parameters and activations at work. Slices, averages and the sums of gradients are fp32.
    """
    half = dtype != torch.float32
    # Inputs are not cast: angles of rotary positions must stay fp32 (in bf16 they are off by 0.07 rad at 64 frames).
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    if settings.compile:
        torch._dynamo.config.recompile_limit = COMPILED_FORMS
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if settings.offload else OffloadPolicy()
    slices = mesh.size() > 1 or half or settings.offload
    for name, model in models.all.items():
        learns = name != "target"
        for block in blocks_of(model):
            if learns:
                _recompute(block, settings.recompute)
            if settings.compile:
                block.compile()
            if slices:
                fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
        # The target's root would stay gathered after its forward, for a backward that never comes: the average would
        # be written to its slices while the next forward reads the stale whole. Said outright, it is dropped.
        if slices:
            reshard = None if learns else True
            fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks of an encoder or of a predictor."""
    blocks = getattr(model, "blocks", None) or getattr(model, "predictor_blocks", None)
    assert isinstance(blocks, nn.ModuleList), f"{type(model).__name__} has neither blocks nor predictor_blocks"
    return list(blocks)


def materialise(models: Models, device: torch.device, *, seed: int) -> None:
    """Give sharded models of the meta device their memory and their first weights.

    No rank ever holds a whole model: each draws one parameter after another and keeps its slice. The memory is filled
    with NaN before, so that a parameter that nobody initialised shows.

    Args:
        models: with `init_weights(seed)`, whose result depends neither on device nor on sharding.
        device: where the slices live: the CPU for models that are offloaded.
        seed: of the run; the target starts equal to the encoder.
    """
    for name, model in models.all.items():
        model.to_empty(device=device)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        model.init_weights(seed)  # pyright: ignore[reportCallIssue]
        for path, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            assert not local.isnan().any(), f"{name}.{path} was not initialised"


def local_parts(model: nn.Module) -> list[Tensor]:
    """This rank's slice of every parameter."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def send_gradients(models: Models, *, now: bool) -> None:
    """Say whether the next backward pass averages gradients over ranks, or only adds to what is there.

    Args:
        models: sharded models.
        now: true for the last micro-batch of a step.
    """
    for model in models.learning.values():
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(now)


def _recompute(block: nn.Module, mode: str) -> None:
    """Trade memory for work: keep what enters a block and compute the rest again in the backward pass."""
    if mode == "off":
        return
    # The forward is wrapped, not the module, so that names of parameters stay as they are.
    block.forward = MethodType(_forward_kept if mode == "selective" else _forward_again, block)


# Functions of the block, as its own forward is: torch.compile traces them, and all blocks share what it makes of one.
# Nothing in a block is random, so no state of a generator is kept.


def _forward_again(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _forward_kept(block: nn.Module, *inputs: Any) -> Any:
    return checkpoint(
        type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_products
    )


def _keep_products() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of matrix products and attention, where nearly all the work is; redo the cheap rest."""
    return CheckpointPolicy.MUST_SAVE if str(operation) in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


# By name, since some are registered only when their module is imported.
PRODUCTS = frozenset(
    {
        "aten.mm.default",
        "aten.addmm.default",
        # sdpa
        "aten._scaled_dot_product_flash_attention.default",
        "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        # varlen
        "torch_attn._varlen_attn.default",
        # xformers, by the kernel that it picks
        "xformers_flash.flash_fwd.default",
        "xformers_flash3.flash_fwd.default",
        "aten._efficient_attention_forward.default",
    }
)


def _make_exact(settings: Parallel) -> None:
    """Let torch refuse what does not give the same bits every time; before anything touches the device."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # A kernel more for every buffer of FSDP2.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(settings.deterministic)


def _place() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this node, from the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if "RANK" in given or "WORLD_SIZE" in given:
        if int(given.get("WORLD_SIZE", 2)) == 1:
            return 0, 1, int(given.get("LOCAL_RANK", 0))
        missing = [name for name in names if name not in given]
        if missing:
            raise BadInput(
                f"this process is one of several but {', '.join(missing)} is not set (have {given}); start it with "
                f"torchrun or vjepa launch, or unset RANK and WORLD_SIZE to run alone"
            )
        return int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"])
    for name in OTHER_LAUNCHERS:
        if int(os.environ.get(name, 1)) > 1:
            raise BadInput(
                f"this process is one of {os.environ[name]} ({name}) but RANK and WORLD_SIZE are not set; start it "
                f"with vjepa launch or torchrun, or start one task only"
            )
    return 0, 1, 0


def _check_loopback() -> None:
    """Gloo wants an address even for a process that is alone, and its own words for none are a page of C++."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("127.0.0.1", 9))  # nothing is sent: it asks for a way there
    except OSError as error:
        raise BadInput(
            f"this machine has no network interface, not even loopback (127.0.0.1: {error.strerror}); bring it up: "
            f"ip link set lo up"
        ) from None


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    # Some launchers show each process its own device only; then it is number 0.
    number = 0 if seen == 1 else local_rank
    if number >= seen:
        raise BadInput(
            f"this process is number {local_rank} of this machine, counted from 0, and sees {seen} GPUs; start one "
            f"process for each GPU, or see to CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device
