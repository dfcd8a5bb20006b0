"""Whether a GPU has room for what is asked of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchtitan.generation.cache import Cache
from torchtitan.generation.decode import PIECE
from torchtitan.models.llama.shape import ModelShape

FEWER = "take fewer prompts, samples or bins"


def check_room(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    lengths: list[int],
    samples: int,
    steps: int,
    *,
    weights: bool = False,
) -> None:
    """Compares what is free with what prompts, and samples of each that go on for that many tokens, will take.

    `lengths`: tokens of the prompts; `weights`: whether those of the model are still to be read.

    Raises:
        ValueError: where a GPU has less.
    """
    free = free_bytes(device)
    needed = Cache.nbytes(shape, lengths, samples, steps, dtype) + prefill_bytes(shape, max(lengths), dtype)
    needed += weights * shape.num_params * dtype.itemsize
    if free is not None and needed > free:
        raise ValueError(
            f"{'the weights, and ' if weights else ''}keys and values of {len(lengths)} prompts of up to "
            f"{max(lengths):,} tokens, with {samples} samples of {steps:,} tokens each, take {needed / 2**30:.1f} GiB, "
            f"and the GPU has {free / 2**30:.1f} left: {FEWER}"
        )


def prefill_bytes(shape: ModelShape, length: int, dtype: torch.dtype) -> int:
    """What `Decoder.prefill` takes beside the cache where it takes most: before a layer's last product.

    By then there are the input, queries and attended values of all tokens, and of a piece of them the input, its norm,
    gate and up, and SwiGLU with what it is made of.
    """
    whole = shape.dim + 2 * shape.n_heads * shape.head_dim
    piece = 2 * shape.dim + 4 * shape.ffn_dim
    return (length * whole + min(length, PIECE) * piece) * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that no tensor takes; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@contextmanager
def full_memory_told() -> Iterator[None]:
    """Makes one line of it where the GPU's memory does not suffice all the same.

    Raises:
        ValueError: where that happens.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = str(error).partition(". GPU")[0]
        raise ValueError(f"the GPU's memory is full ({said}): {FEWER}") from error
