"""What `activation_checkpoint.mode = "auto"` comes to on the machine at hand."""

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan.config.schema import ActivationCheckpoint, JobConfig
from torchtitan.distributed.degrees import Degrees
from torchtitan.distributed.world import World
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
    step = Step.of(config, degrees, per_node)
    # An unknown GPU is taken to be as fast as this one: what is chosen depends on memory above all.
    gpu = find_gpu(properties.name) or replace(H200, memory_gib=device_gib)
    choice = choose(step, gpu, limits)
    needed = (
        f"{choice.memory.device / GIB:.1f} of {limits.device_gib:.1f} GiB of the GPU, "
        f"{choice.memory.host / GIB:.1f} of {limits.host_gib:.1f} GiB of the host"
    )
    if not choice.fits:
        logger.warning(f"by the memory plan nothing fits: the least is {needed}; memory may run out")
    return choice.recompute, f"auto: the fastest by the plan, {needed}, {choice.time.total:.2f} s a step"


def free_host_memory() -> float:
    """Bytes that processes can still have on this host, within the limits of this one's control groups."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
    for folder in (group, *group.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and limit.read_text().strip() != "max":
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return float(max(free, 0))
