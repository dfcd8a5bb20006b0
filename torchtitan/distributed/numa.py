"""Keeps a process beside its GPU: on machines of several NUMA nodes, host memory of another one is slow to copy."""

import os
from pathlib import Path

import torch


def bind_to_gpu(device: torch.device) -> None:
    """Moves this thread, those it starts and the host memory that they fill to the NUMA node of the GPU.

    Where the system does not tell which that is, or leaves the process none of its cores, nothing changes.
    """
    properties = torch.cuda.get_device_properties(device)
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    cores = cores_beside(address) & os.sched_getaffinity(0)
    if cores:
        # Linux gives a page the node of the core that touches it first.
        os.sched_setaffinity(0, cores)


def cores_beside(pci_address: str, system: Path = Path("/sys")) -> set[int]:
    """The cores of the NUMA node that a PCI device is attached to; empty where that is not known."""
    try:
        node = int((system / "bus/pci/devices" / pci_address / "numa_node").read_text())
        ranges = (system / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):  # a node of -1 has no folder
        return set()
    return read_ranges(ranges)


def read_ranges(text: str) -> set[int]:
    """The numbers in a list as Linux writes it: `0-3,8`."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
