"""Spike counts to tokens and back.

For each time bin the token BOS = vocab_size - 1, then one token a neuron, in order, whose value is the neuron's
spike count in that bin: a recording of N neurons and T bins is (N + 1)·T tokens.
"""

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.uint8]
Tokens = NDArray[np.uint8]


def bos_token(vocab_size: int) -> int:
    """The token that begins every bin."""
    return vocab_size - 1


def largest_count(vocab_size: int) -> int:
    """The largest spike count that is kept as it is; larger ones would be taken for BOS and are clipped to it."""
    return vocab_size - 2


def write_tokens(counts: Counts, start: int, out: Tokens, vocab_size: int) -> int:
    """Writes the tokens `start` … `start + len(out)` of one recording, touching only the bins they lie in.

    Args:
        counts: spike counts, uint8 [neurons, bins]; any strides.
        start: first token, counted from the beginning of the recording.
        out: uint8 [tokens], contiguous.
        vocab_size: number of tokens, at most 256.

    Returns:
        How many of the written counts were clipped.
    """
    width = counts.shape[0] + 1
    first_bin, offset = divmod(start, width)
    stop = start + len(out)
    piece = counts[:, first_bin : -(-stop // width)]
    bins = np.empty((piece.shape[1], width), np.uint8)
    bins[:, 0] = bos_token(vocab_size)
    limit = largest_count(vocab_size)
    bins[:, 1:] = piece.T
    clipped = 0
    if piece.max() > limit:
        clipped_bins = bins[:, 1:] > limit
        bins[:, 1:][clipped_bins] = limit
        # The bins at either end may lie in the piece only in part: what is not written is not counted.
        marked = np.zeros(bins.shape, bool)
        marked[:, 1:] = clipped_bins
        clipped = int(marked.reshape(-1)[offset : offset + len(out)].sum())
    out[:] = bins.reshape(-1)[offset : offset + len(out)]
    return clipped


def encode(counts: Counts, vocab_size: int = 256) -> Tokens:
    """All tokens of a recording: uint8 [neurons, bins] -> uint8 [(neurons + 1) * bins]."""
    tokens = np.empty((counts.shape[0] + 1) * counts.shape[1], np.uint8)
    if tokens.size:
        write_tokens(counts, 0, tokens, vocab_size)
    return tokens


def decode(tokens: Tokens, num_neurons: int, vocab_size: int = 256) -> Counts:
    """The inverse of `encode`, but for clipping: uint8 [(neurons + 1) * bins] -> uint8 [neurons, bins].

    Raises:
        ValueError: where the tokens are not whole bins of that many neurons, each beginning with BOS.
    """
    width = num_neurons + 1
    if len(tokens) % width:
        raise ValueError(f"{len(tokens)} tokens are not whole bins of {num_neurons} neurons ({width} tokens each)")
    bins = tokens.reshape(-1, width)
    is_bos = bins == bos_token(vocab_size)
    if not is_bos[:, 0].all() or is_bos[:, 1:].any():
        raise ValueError(f"BOS does not stand at the beginning of each bin of {num_neurons} neurons, and only there")
    return np.ascontiguousarray(bins[:, 1:].T)
