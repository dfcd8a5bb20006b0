"""Which operations a step is made of."""

import importlib.util
from dataclasses import replace

import torch

from torchtitan.generation.arguments import ATTENTION
from torchtitan.generation.operations import PYTORCH, Operations
from torchtitan.models.llama.attention import BACKENDS


def choose_operations(requested: str, device: torch.device, dtype: torch.dtype, sequences: int) -> Operations:
    """The operations for that many sequences at a time, whose attention is `requested`, or the first that can run.

    Raises:
        ValueError: where it was asked for by name and cannot run.
    """
    obstacles = {name: _obstacle(name, device, dtype) for name in ATTENTION}
    if requested == "auto":
        requested = next(name for name in ATTENTION if obstacles[name] is None)
    if obstacles[requested] is not None:
        raise ValueError(f"--attention {requested} cannot run: {obstacles[requested]}; --attention auto picks one")
    if requested == "pytorch":
        return PYTORCH
    from torchtitan.generation import kernels

    chosen = kernels.operations_for(sequences)
    if requested == "fa3":
        from torchtitan.generation import flash3

        chosen = replace(chosen, attend=flash3.attend)
    return chosen


def _obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run there; None where it can."""
    if name == "pytorch":
        return None
    if device.type != "cuda":
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return BACKENDS["fa3"].activate(device, dtype) if name == "fa3" else None
