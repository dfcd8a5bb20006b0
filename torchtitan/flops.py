"""How many floating-point operations a step takes, and how many a GPU could do."""

from collections.abc import Iterable

from torchtitan.models.llama.shape import ModelShape

FORMULA = "6 × parameters without the embedding + 6 × layers × heads × head size × length (causal) per token"

PEAK_BF16_FLOPS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}
"""Dense bf16 FLOP/s by the vendor's datasheets (SXM parts; PCIe and NVL cards have other rates)."""


def training_flops(shape: ModelShape, lengths: Iterable[int]) -> int:
    """FLOPs of forward and backward pass over sequences of these lengths, recomputation not counted.

    A weight takes a multiplication and an addition in the forward pass and twice that in the backward pass: 6 a token
    (Kaplan et al., Scaling Laws for Neural Language Models, 2020). Attention does the same for each pair of a query
    and a key, twice over (scores and values); causal, a sequence of n tokens has n²/2 pairs. The convention that
    counts n² reads up to twice as much.
    """
    weights = shape.num_params - shape.vocab_size * shape.dim
    per_pair = 12 * shape.n_layers * shape.n_heads * shape.head_dim
    lengths = list(lengths)
    return 6 * weights * sum(lengths) + per_pair * sum(n * n for n in lengths) // 2


def known_gpu(device_name: str, known: Iterable[str]) -> str | None:
    """Which of these GPUs the one is that CUDA calls so; None where it is none, or another part than SXM."""
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    # The longest name first: "GH200" contains "H200".
    return next((name for name in sorted(known, key=len, reverse=True) if name in device_name), None)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that CUDA gives it; None where it is not known."""
    name = known_gpu(device_name, PEAK_BF16_FLOPS)
    return None if name is None else PEAK_BF16_FLOPS[name]
