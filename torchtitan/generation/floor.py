"""How fast a token could be at best: everything that it needs read once, at the speed of the memory."""

from torchtitan.flops import PEAK_BF16_FLOPS, known_gpu
from torchtitan.models.llama.shape import ModelShape

MEMORY_BANDWIDTH = {"H200": 4.3e12}
"""Bytes/s that a copy reaches, by the names of `PEAK_BF16_FLOPS`; others have not been measured."""


def bytes_per_step(shape: ModelShape, itemsize: int, prompts: list[int], samples: int, own: float) -> float:
    """Bytes that a token of each sequence reads: all weights but the embeddings, prompts once, continuations.

    Args:
        shape: of the model.
        itemsize: bytes of a weight, key or value.
        prompts: tokens of each prompt.
        samples: sequences of each.
        own: tokens of each continuation, on average.
    """
    weights = shape.num_params - shape.vocab_size * shape.dim
    token = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim
    return itemsize * (weights + token * (sum(prompts) + len(prompts) * samples * own))


def bandwidth(device_name: str) -> float | None:
    """Bytes/s of a GPU's memory by the name that CUDA gives it; None where it is not known."""
    return MEMORY_BANDWIDTH.get(known_gpu(device_name, PEAK_BF16_FLOPS) or "")
