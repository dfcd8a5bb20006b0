"""Which operations a step is made of."""

import importlib.util
from dataclasses import replace

import torch

from torchtitan.generation.arguments import ATTENTION
from torchtitan.generation.operations import PYTORCH, Operations
from torchtitan.models.llama.attention import BACKENDS


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """`requested`, or for `auto` the first that can run there.

    Raises:
        ValueError: where it was asked for by name and cannot run.
    """
    obstacles = {name: _obstacle(name, device, dtype) for name in ATTENTION}
    if requested == "auto":
        return next(name for name in ATTENTION if obstacles[name] is None)
    if obstacles[requested] is not None:
        raise ValueError(f"--attention {requested} cannot run: {obstacles[requested]}; --attention auto picks one")
    return requested


def operations_with(attention: str, sequences: int) -> Operations:
    """The operations for that many sequences at a time with the attention that `choose_attention` has chosen."""
    if attention == "pytorch":
        return PYTORCH
    from torchtitan.generation import kernels

    chosen = kernels.operations_for(sequences)
    if attention == "fa3":
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
