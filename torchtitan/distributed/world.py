"""The processes of a run: starting them up, their mesh, and what rank 0 does for all."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan.config.schema import Training

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def init_world(timeout_seconds: int) -> World:
    """Joins the processes that `torchrun` started; without it, this one alone is the world."""
    rank, local_rank, size = (int(os.environ.get(key, default)) for key, default in _TORCHRUN.items())
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # gloo beside NCCL: objects and checkpoints travel between the hosts without touching a GPU.
        backend, device_id = "cpu:gloo,cuda:nccl", device
    else:
        device, backend, device_id = torch.device("cpu"), "gloo", None
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), device_id=device_id, **alone)
    return World(rank, local_rank, size, device)


_TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def set_timeout(seconds: int) -> None:
    """The limit for one collective from now on, in all process groups."""
    groups = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def build_mesh(training: Training, world: World) -> DeviceMesh:
    """The mesh that the model is sharded over: ("shard",), or ("replicate", "shard") for HSDP.

    Raises:
        ValueError: where the configured degrees do not multiply to the number of processes.
    """
    replicate, shard = training.data_parallel_replicate_degree, training.data_parallel_shard_degree
    if shard == -1:
        shard = max(1, world.size // replicate)
    if replicate * shard != world.size:
        raise ValueError(
            f"training.data_parallel_replicate_degree = {replicate} times "
            f"training.data_parallel_shard_degree = {shard} is {replicate * shard}, "
            f"but the run has {world.size} processes"
        )
    if replicate == 1:
        return init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def accumulation_steps(training: Training, world: World) -> int:
    """Forward passes an optimizer step, so that all ranks together see `training.global_batch_size` sequences.

    Raises:
        ValueError: where the batch cannot be divided so.
    """
    at_once = training.batch_size * world.size
    wanted = at_once if training.global_batch_size == -1 else training.global_batch_size
    if wanted % at_once:
        raise ValueError(
            f"training.global_batch_size = {wanted} is not a multiple of {at_once}: "
            f"training.batch_size = {training.batch_size} on each of {world.size} processes"
        )
    return wanted // at_once


def from_rank_zero(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank. What it raises there, all ranks raise."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = make()
        except (ValueError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
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


def first_to_say(message: str) -> bool:
    """Whether no other process has asked this for the same message: most errors are found by all of them at once."""
    store = dist.distributed_c10d._get_default_store()
    return store.add(f"said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
