"""Rotary position embedding (Su et al., RoFormer, 2021), with Llama 3.1's frequency scaling."""

import math

import torch

from torchtitan.models.llama.shape import ModelShape

# Llama 3.1's scaling: frequencies that turn less than LOW times within the original context are slowed down by
# FACTOR, those that turn more than HIGH times stay, and those in between are interpolated.
FACTOR, LOW, HIGH, ORIGINAL_CONTEXT = 8.0, 1.0, 4.0, 8192


def frequencies(shape: ModelShape, device: torch.device | None = None) -> torch.Tensor:
    """Radians a token of each pair of channels, float32 [head_dim / 2]."""
    channels = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / shape.rope_theta ** (channels / shape.head_dim)
    if shape.rope_scaling == "none":
        return plain
    rotations = ORIGINAL_CONTEXT * plain / (2 * math.pi)
    kept = ((rotations - LOW) / (HIGH - LOW)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / FACTOR


def rope_cache(shape: ModelShape, length: int, device: torch.device | None = None) -> torch.Tensor:
    """Cosine and sine for every position, float32 [length, 2, head_dim / 2]."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies(shape, device))
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def apply_rope(x_BLHD: torch.Tensor, cache_LRD: torch.Tensor) -> torch.Tensor:
    """Turns each pair of neighbouring channels by its angle, in float32; returns x's dtype.

    Args:
        x_BLHD: queries or keys [batch, length, heads, head_dim].
        cache_LRD: the rows of `rope_cache` of their positions, float32
            [length, 2, head_dim / 2] or [batch, length, 2, head_dim / 2].
    """
    cos, sin = cache_LRD.unsqueeze(-3).unbind(-2)
    even, odd = x_BLHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BLHD.dtype)
