"""The processes of a run: starting them up, their mesh, and what one of them does for all."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.launcher import PATIENCE
from torchtitan.distributed.numa import bind_to_gpu
from torchtitan.logging import logger

T = TypeVar("T")

TORCHRUN_DEFAULTS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""What torchrun tells each process, and what holds without it."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def init_world(timeout_seconds: int) -> World:
    """Joins the processes that `torchrun` started; without it, this one alone is the world.

    Raises:
        ValueError: where there are GPUs, but none for this process.
    """
    # The flight recorder: the last collectives, which the watchdog writes out when a rank hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    rank, local_rank, size = (int(os.environ.get(key, default)) for key, default in TORCHRUN_DEFAULTS.items())
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "start one process a GPU (torchrun --nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        bind_to_gpu(device)
        # gloo beside NCCL: objects and checkpoints travel between the hosts without touching a GPU.
        backend, device_id = "cpu:gloo,cuda:nccl", device
    else:
        device, backend, device_id = torch.device("cpu"), "gloo", None
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), device_id=device_id, **alone)
    return World(rank, local_rank, size, device)


def set_timeout(mesh: DeviceMesh, seconds: int) -> None:
    """The limit for one collective from now on, in the groups that a step uses."""
    for group in (None, *mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def build_mesh(degrees: Degrees, device: torch.device) -> DeviceMesh:
    """The mesh that the model is sharded over: ("shard",), or ("replicate", "shard") for HSDP."""
    if degrees.replicate == 1:
        return init_device_mesh(device.type, (degrees.shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (degrees.replicate, degrees.shard), mesh_dim_names=("replicate", "shard"))


def from_rank_zero(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `make` returns on rank 0, on every rank. What it raises there, all ranks raise."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def first_on_each_node(world: World) -> Iterator[None]:
    """Local rank 0 goes first: what it downloads or converts, the other ranks of the node find in the cache."""
    if world.local_rank != 0:
        dist.barrier()
    try:
        yield
    finally:
        if world.local_rank == 0:
            dist.barrier()


def report_once(message: str) -> None:
    """Logs an error that most ranks find at once: on the first of them alone.

    The others return when it has said it, because torchrun ends all as soon as one has ended.
    """
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
    name = f"reported/{hashlib.sha256(message.encode()).hexdigest()}"
    if store.add(name, 1) == 1:
        logger.error(f"error: {message}")
        store.set(f"{name}/said", "")
    else:
        with suppress(dist.DistError):
            store.wait([f"{name}/said"], timedelta(seconds=PATIENCE))
