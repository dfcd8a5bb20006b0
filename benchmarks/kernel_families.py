"""Where a step's time goes, by family of kernels."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

FAMILIES = {
    "attention": ("flash", "cudnn_generated_fort_native_sdpa", "fmha", "_attend_kernel", "_combine_kernel"),
    "communication": ("nccl",),
    "copies to or from the host": ("Memcpy HtoD", "Memcpy DtoH"),
    "copies on the device": ("Memcpy DtoD", "Memset"),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "cublas", "_matvec_kernel"),
    "fused by torch.compile": ("triton_",),
    "optimizer and gradient norm": ("multi_tensor_apply", "FusedAdam", "foreach"),
    "FSDP's gathering and splitting": ("split_with_sizes", "chunk_cat", "CatArrayBatched"),
}
"""Names of kernels, by what they are part of; the first match counts."""


def family(kernel: str) -> str:
    """The family of a kernel by its name."""
    for name, parts in FAMILIES.items():
        if any(part in kernel for part in parts):
            return name
    return "other"


def profile_step(step: Callable[[], object]) -> dict[str, Any]:
    """Runs `step` under PyTorch's profiler.

    Returns:
        `seconds` from its first kernel's start to its last one's end; `families`, the share of them that kernels of
        each family ran on the busiest stream, the one that computes; `hidden`, the same of the streams beside it;
        `idle`, the share in which that stream ran nothing; `largest`, the longest kernels with their seconds.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    by_stream: defaultdict[int, float] = defaultdict(float)
    for event in kernels:
        by_stream[event.device_resource_id] += event.time_range.elapsed_us()
    computing = max(by_stream, key=lambda stream: by_stream[stream])
    total = max(event.time_range.end for event in kernels) - min(event.time_range.start for event in kernels)
    families: defaultdict[str, float] = defaultdict(float)
    hidden: defaultdict[str, float] = defaultdict(float)
    by_name: defaultdict[str, float] = defaultdict(float)
    for event in kernels:
        share = event.time_range.elapsed_us() / total
        (families if event.device_resource_id == computing else hidden)[family(event.name)] += share
        by_name[event.name] += event.time_range.elapsed_us() / 1e6
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:40]
    return {
        "seconds": total / 1e6,
        "families": dict(sorted(families.items(), key=lambda item: -item[1])),
        "hidden": dict(hidden),
        "idle": 1 - sum(families.values()),
        "largest": {name[:120]: seconds for name, seconds in longest},
    }
