"""Bind the process of a GPU to the CPU cores of its socket, whose memory the GPU reads fastest."""

import os
from pathlib import Path

import torch

PCI = Path("/sys/bus/pci/devices")


def bind_to_device(device: torch.device, pci: Path = PCI) -> None:
    """Let this process, and its loader workers, run on the cores next to its GPU, as far as it may use them.

    Without this the thread that launches kernels and the pinned memory land on any socket. The GPUs of a socket share
    its cores. Nothing changes on a CPU, or where the scheduler has bound the process to other cores.
    """
    if device.type != "cuda":
        return
    facts = torch.cuda.get_device_properties(device)
    address = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
    near = near_cores(address, pci) & os.sched_getaffinity(0)
    if near:
        os.sched_setaffinity(0, near)


def near_cores(address: str, pci: Path = PCI) -> set[int]:
    """Return the cores on the socket of a PCI device, or an empty set if the kernel does not say.

    Args:
        address: of the device: `0000:1b:00.0`.
        pci: folder of the PCI devices.

    Source: https://docs.kernel.org/PCI/sysfs-pci.html (local_cpulist).
    """
    try:
        text = (pci / address / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
