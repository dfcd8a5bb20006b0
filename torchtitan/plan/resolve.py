"""What `activation_checkpoint.mode = "auto"` comes to on the machine at hand."""

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan.config.schema import ActivationCheckpoint, JobConfig
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.numa import read_ranges
from torchtitan.distributed.world import World, from_rank_zero
from torchtitan.logging import logger
from torchtitan.plan.choose import Limits, choose
from torchtitan.plan.costs import GIB, Step
from torchtitan.plan.hardware import H200, find_gpu


def resolve_recompute(config: JobConfig, degrees: Degrees, world: World) -> tuple[ActivationCheckpoint, str]:
    """The recomputation that the run uses, the same on all ranks, and why."""
    configured = config.activation_checkpoint
    if configured.mode != "auto":
        return configured, "as configured"
    if world.device.type != "cuda":
        return ActivationCheckpoint(mode="none"), "auto, on a CPU"

    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    properties = torch.cuda.get_device_properties(world.device)
    # What one rank is short of, all do without: ranks wait for each other.
    found = torch.tensor([properties.total_memory / GIB, free_host_memory() / GIB / per_node])
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    device_gib, host_gib = found.tolist()
    limits = Limits.of(configured, device_gib, host_gib)
    # An unknown GPU is taken to be as fast as this one: what is chosen depends on memory above all.
    gpu = find_gpu(properties.name) or replace(H200, memory_gib=device_gib)
    choice = from_rank_zero(lambda: choose(Step.of(config, degrees, per_node), gpu, limits))
    needed = (
        f"{choice.memory.device / GIB:.1f} of {limits.device_gib:.1f} GiB of the GPU, "
        f"{choice.memory.host / GIB:.1f} of {limits.host_gib:.1f} GiB of the host"
    )
    if not choice.fits:
        logger.warning(f"by the memory plan nothing fits: the least is {needed}; memory may run out")
    return choice.recompute, f"auto: the fastest by the plan, {needed}, {choice.time.total:.2f} s a step"


def free_host_memory() -> float:
    """Bytes that processes can still have on this host, within the limits of this one's control groups (version 2).

    Only memory beside a CPU counts: on Grace Hopper the GPU's is the system's too.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    nodes = Path("/sys/devices/system/node")
    if (nodes / "has_cpu").is_file():
        beside = [nodes / f"node{n}/meminfo" for n in read_ranges((nodes / "has_cpu").read_text())]
        free = min(free, sum(_kilobytes(path, "MemFree:", "Inactive(file):") for path in beside) * 1024)
    group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if limit.is_file() and limit.read_text().strip() != "max":
            used = int((folder / "memory.current").read_text())
            # Cached files, which recordings are, make room.
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, int(limit.read_text()) - used + int(statistics["inactive_file"]))
    return float(max(free, 0))


def _kilobytes(path: Path, *names: str) -> int:
    """The sum of these lines of a node's memory statistics, which read `Node 0 MemFree: 123 kB`."""
    lines = (line.split() for line in path.read_text().splitlines())
    return sum(int(words[3]) for words in lines if words[2] in names)
