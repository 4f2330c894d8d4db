"""The process group of a run: this rank, the device, the mesh, and small messages between ranks."""

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vjepa.compat import local_store
from vjepa.config import Parallel
from vjepa.distributed.numa import bind_to_device
from vjepa_data.settings import BadInput

T = TypeVar("T")

# Variables that other launchers export to each of several tasks. Two such tasks that did not form one group would each
# train alone and overwrite the other's checkpoints, so the process stops instead.
OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

DEFAULTS = {
    "TORCH_FR_BUFFER_SIZE": "2000",  # collectives kept in the flight recorder
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}
"""Environment of a rank that `vjepa launch` did not start."""

STORAGE_TIMEOUT_S = 1800.0
"""A checkpoint of a large model on a slow disk takes longer than any step."""


@dataclass(frozen=True)
class World:
    """This process as a rank of the run."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    control: dist.ProcessGroup
    """Gloo group for small messages between hosts, which do not synchronise with the device."""

    storage: dist.ProcessGroup
    """Gloo group for checkpoints alone, because their messages may come from another thread at any time."""

    ranks_here: int = 1
    """Ranks on this node, which share its memory."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all ranks on every rank. The message is a single tensor on the device. Waits for it."""
        own = torch.tensor(numbers, dtype=torch.float32, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own)
        return torch.stack(everyone).tolist()

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 only and return its result on all ranks.

        Raises:
            BadInput, OSError: on every rank, if the function raised it on rank 0.
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

    def deal(self, function: Callable[[], list[T]]) -> T:
        """Call a function on rank 0 only, and return the entry of its result that has this rank's number.

        Raises:
            BadInput, OSError: on every rank, if the function raised it on rank 0.
        """
        hands: list[Any] = []
        if self.is_first:
            try:
                hands = [(hand, None) for hand in function()]
            except (BadInput, OSError) as error:
                hands = [(None, error)] * self.size
        box: list[Any] = [None]
        dist.scatter_object_list(box, hands if self.is_first else None, src=0, group=self.control)
        hand, error = box[0]
        if error is not None:
            raise error
        return hand

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, on the device and without waiting for it."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    def from_first(self, value: Tensor) -> Tensor:
        """Return the tensor of rank 0 on every rank, on the device and without waiting for it."""
        same = value.clone()
        dist.broadcast(same, src=0)
        return same


@contextmanager
def join(settings: Parallel) -> Iterator[World]:
    """Join the process group of the run, and leave it at the end of a block that succeeds.

    After an exception the group is not destroyed, since that would wait for the other ranks: see `failure`.

    The group is read from `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, as
    torchrun and `vjepa launch` set them. Without them this process is the only rank.

    Raises:
        BadInput: these variables are incomplete, `parallel.replicate` does not divide the number of ranks, or this
            machine has no network interface at all.
        torch.distributed.DistError: other ranks did not join within `parallel.timeout_s`.
    """
    _make_exact(settings)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    rank, size, local = _place()
    here = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    copies = settings.copies(size, here)
    ranks_here = min(size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if size % copies:
        raise BadInput(
            f"parallel.replicate ({copies}) must divide the number of ranks ({size}); 1 shards over all of them"
        )
    _check_loopback()
    device = _device(local)
    bind_to_device(device)
    choose_interface()
    # Gloo connects every pair of ranks in every group. Only gradients on the host need it in addition to NCCL.
    on_host = "cpu:gloo,cuda:nccl" if settings.offload else "nccl"
    backend = on_host if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=settings.timeout_s)
    store = local_store() if size == 1 else None
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=size,
        timeout=timeout,
        store=store,
        device_id=device if device.type == "cuda" else None,
    )
    is_over = size == 1
    try:
        shape = (copies, size // copies)
        names = ("replicate", "shard")
        flat = copies == 1
        mesh = init_device_mesh(device.type, shape[flat:], mesh_dim_names=names[flat:])
        control = dist.new_group(backend="gloo", timeout=timeout)
        storage = dist.new_group(backend="gloo", timeout=max(timeout, timedelta(seconds=STORAGE_TIMEOUT_S)))
        assert isinstance(control, dist.ProcessGroup)
        assert isinstance(storage, dist.ProcessGroup)
        yield World(rank, size, device, mesh, control=control, storage=storage, ranks_here=ranks_here)
        is_over = True
    finally:
        if is_over:
            dist.destroy_process_group()


def _make_exact(settings: Parallel) -> None:
    """Make torch reject nondeterministic kernels, before anything touches the device."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # It would cost FSDP2 one more kernel for every buffer.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(settings.deterministic)


def _place() -> tuple[int, int, int]:
    """Read the rank, the number of ranks and the local rank from the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if "RANK" in given or "WORLD_SIZE" in given:
        if int(given.get("WORLD_SIZE", 2)) == 1:
            return 0, 1, int(given.get("LOCAL_RANK", 0))
        missing = [name for name in names if name not in given]
        if missing:
            raise BadInput(
                f"this process is part of a group but {', '.join(missing)} is not set (have {given}). Start it with "
                f"torchrun or vjepa launch, or unset RANK and WORLD_SIZE to run alone."
            )
        return int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"])
    for name in OTHER_LAUNCHERS:
        if int(os.environ.get(name, 1)) > 1:
            raise BadInput(
                f"this process is one of {os.environ[name]} ({name}), but RANK and WORLD_SIZE are not set. Start it "
                f"with vjepa launch or torchrun, or start a single task."
            )
    return 0, 1, 0


def _check_loopback() -> None:
    """Check that loopback is up. Gloo needs an address even for a single rank, and its own error is a page of C++."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("127.0.0.1", 9))  # sends nothing, and only looks up a route
    except OSError as error:
        raise BadInput(
            f"this machine has no network interface, not even loopback (127.0.0.1: {error.strerror}); bring it up: "
            f"ip link set lo up"
        ) from None


def choose_interface() -> None:
    """Let gloo use the interface by which this node reaches the first, unless the user has chosen an interface.

    By default gloo takes the address of the host's own name. On Debian that is 127.0.1.1, elsewhere perhaps a network
    for management.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if "GLOO_SOCKET_IFNAME" in os.environ or size <= int(os.environ.get("LOCAL_WORLD_SIZE", size)):
        return
    addresses = interface_addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", ""), 9))  # nothing is sent; the call only looks up a route
        except OSError:
            return  # IPv6 or an unknown name: gloo's own choice
        own = probe.getsockname()[0]
    if own.startswith("127."):  # the first node's own name
        own = next((address for address in addresses if not address.startswith("127.")), own)
    if own in addresses:
        os.environ["GLOO_SOCKET_IFNAME"] = addresses[own]


def interface_addresses() -> dict[str, str]:
    """Return the name of the network interface of every IPv4 address of this machine."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an address
                found[socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, asked)[20:24])] = name
    return found


SIOCGIFADDR = 0x8915  # linux/sockios.h


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    # Some launchers show each process its own device only, as number 0.
    number = 0 if seen == 1 else local_rank
    if number >= seen:
        raise BadInput(
            f"local rank {local_rank} sees {seen} GPUs; start a process for each GPU, or correct CUDA_VISIBLE_DEVICES"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device
