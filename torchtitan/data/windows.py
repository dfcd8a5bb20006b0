"""Which tokens a training sequence is: windows over the stream of recordings, and the order they are visited in.

Window k covers the stream tokens k·seq_len … (k + 1)·seq_len inclusive: seq_len inputs, and the same shifted by one as
labels, so that every token but the very first is predicted exactly once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from torchtitan.data.index import RecordingIndex
from torchtitan.data.tokens import Counts, Tokens, write_tokens


@dataclass(frozen=True)
class Window:
    """What is known of a window besides its tokens.

    Attributes:
        valid: number of labels; seq_len but for the last window of a split, which may be shorter.
        documents: positions in the window at which a recording's part begins; the first is 0.
        origin: (row of the dataset, bin) of its first token.
        clipped: number of its counts that were clipped.
    """

    valid: int
    documents: list[int]
    origin: tuple[int, int]
    clipped: int


class WindowSource(Protocol):
    """Windows by random access: what the loader needs to know of a dataset."""

    seq_len: int
    num_windows: int | None
    """Whole windows of an epoch; None where there are as many as one asks for."""
    fingerprint: str
    """Digest of the data, equal where the windows are."""

    def read(self, window: int, out: Tokens) -> Window:
        """Writes the tokens of a window into `out`, uint8 [seq_len + 1]."""
        ...

    def describe(self) -> str:
        """What the data is and how much of it there is, for the log."""
        ...


class Rows(Protocol):
    """Recordings by their row: what windows need to know of them."""

    description: str

    @property
    def location(self) -> str:
        """Where they lie, for the log."""
        ...

    def spike_counts(self, row: int, num_neurons: int, num_bins: int) -> Counts:
        """Counts of a row of that size, uint8 [neurons, bins]; not to be written to."""
        ...

    def ids(self) -> dict[str, list[str]]:
        """The identity columns of all rows."""
        ...


class RecordedWindows:
    """The windows of a dataset, rows following each other in its order.

    `num_windows` counts the whole ones. One more, `num_windows` itself, holds the tail that fills none, where
    there is any: training drops it, evaluation scores it.

    With a `stride` below `seq_len`, windows overlap: window k covers the tokens k·stride … k·stride + seq_len.
    """

    def __init__(
        self,
        recordings: Rows,
        index: RecordingIndex,
        *,
        seq_len: int,
        vocab_size: int,
        stride: int | None = None,
    ) -> None:
        self.recordings, self.index = recordings, index
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.stride = stride or seq_len
        assert 0 < self.stride <= seq_len, f"windows of {seq_len} tokens every {self.stride} tokens leave some out"
        self.ends = np.cumsum((index.neurons + 1) * index.bins)
        self.num_tokens = index.num_tokens
        overlap = seq_len - self.stride
        whole, tail = divmod(self.num_tokens - 1 - overlap, self.stride)
        if whole <= 0:
            whole, tail = 0, self.num_tokens - 1
        self.num_windows: int | None = whole
        self.tail = tail
        self.fingerprint = index.fingerprint

    def read(self, window: int, out: Tokens) -> Window:
        """See `WindowSource.read`. Where the window is the tail, `out` is filled up with zeros."""
        position = window * self.stride
        stop = min(position + self.seq_len + 1, self.num_tokens)
        valid = stop - position - 1
        assert valid > 0, f"window {window} lies behind the end of the stream"
        origin, documents, clipped, written = None, [], 0, 0
        for recording, start, length in self.pieces(position, stop):
            neurons, bins = int(self.index.neurons[recording]), int(self.index.bins[recording])
            row = int(self.index.rows[recording])
            counts = self.recordings.spike_counts(row, neurons, bins)
            clipped += write_tokens(counts, start, out[written : written + length], self.vocab_size)
            origin = origin or (row, start // (neurons + 1))
            # A recording that begins with the last token of the window is seen only as a label.
            if written < valid:
                documents.append(written)
            written += length
        out[written:] = 0
        assert origin is not None
        return Window(valid, documents, origin, clipped)

    def pieces(self, position: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The recordings that the stream's tokens `position` … `stop - 1` belong to.

        Yields:
            For each its place in the index, its first token among these, counted from its beginning, and their number.
        """
        recording = int(np.searchsorted(self.ends, position, side="right"))
        while position < stop:
            end = int(self.ends[recording])
            start = position - (end - int((self.index.neurons[recording] + 1) * self.index.bins[recording]))
            length = min(end, stop) - position
            yield recording, start, length
            position, recording = position + length, recording + 1

    def describe(self) -> str:
        """See `WindowSource.describe`."""
        return (
            f"{self.recordings.description}: {len(self.index.rows):,} recordings, {self.num_tokens:,} tokens, "
            f"{self.num_windows:,} windows an epoch, {self.tail:,} tokens in the dropped tail, "
            f"fingerprint {self.fingerprint}, in {self.recordings.location}"
        )


class WindowOrder:
    """The window that the data cursor stands for: epoch after epoch, each in an order of its own.

    The order is a permutation that depends on (seed, epoch) alone and is computed for one position at a time, so
    that going on from any cursor costs the same and nothing is held in memory.
    """

    def __init__(self, num_windows: int | None, *, seed: int, shuffle: bool) -> None:
        self.num_windows, self.seed, self.shuffle = num_windows, seed, shuffle

    def __getitem__(self, cursor: int) -> int:
        if self.num_windows is None:
            return cursor
        epoch, position = divmod(cursor, self.num_windows)
        if not self.shuffle:
            return position
        return permute(position, self.num_windows, _mix(_mix(self.seed) + epoch))


def permute(position: int, length: int, key: int) -> int:
    """Where a keyed pseudo-random permutation of 0 … length - 1 puts `position`.

    A Feistel network permutes the smallest even power of two that holds `length`; results outside are fed in again
    until one falls inside ("cycle walking", Black & Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = ((length - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for round_number in range(6):
            left, right = right, left ^ (_mix(right ^ _mix(key + round_number)) & mask)
        position = left << half | right
        if position < length:
            return position


def _mix(value: int) -> int:
    """A 64-bit hash: the output function of SplitMix64 (Steele, Lea & Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
