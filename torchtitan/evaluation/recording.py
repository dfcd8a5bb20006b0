"""One recording's share of an evaluation: from what the model made of its tokens to sums that can be added up."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtitan.data.tokens import Counts
from torchtitan.evaluation.nulls import histogram_nats, ngram_nats, poisson_nats
from torchtitan.evaluation.rates import RateSums, rate_sums

BIN_SECONDS = 0.02
"""Length of a bin of the Neural Pile."""
NUM_EDGES = 34
"""Geometric bins of positions and of times: more than any recording fills."""
TOKENS, SPIKES, NATS, POISSON = range(4)


@dataclass(frozen=True)
class Piece:
    """Scored tokens of a recording that follow each other in one window.

    Attributes:
        first: place of the first of them in the recording, in tokens.
        position: how much the first of them is predicted from: at position 0 from one token, and from one more at
            each further position. Without a mask of documents its place among the labels of its window; with one a
            recording begins at -1, BOS, of which no position is kept.
        labels: the tokens, uint8.
        nats: negative log likelihood of each, float32.
        rates: expected count at each, float32; where the token is BOS without meaning.
    """

    first: int
    position: int
    labels: NDArray[np.uint8]
    nats: NDArray[np.float32]
    rates: NDArray[np.float32]


@dataclass
class Sums:
    """Additive figures of one or more recordings, over exactly the scored tokens.

    Attributes:
        rows, neurons: recordings, and their neurons: one that stands in several recordings counts in each.
        bins: scored counts a neuron.
        tokens, bos_tokens: scored counts, and scored BOS.
        spikes: sum of the counts.
        clipped: scored counts that were clipped.
        nats, bos_nats: the model's negative log likelihood of counts and of BOS.
        poisson, histogram, ngram: the nulls' of the counts.
        rates: how the predicted rate follows the activity.
    """

    rows: int = 0
    neurons: int = 0
    bins: float = 0.0
    tokens: int = 0
    bos_tokens: int = 0
    spikes: int = 0
    clipped: int = 0
    nats: float = 0.0
    bos_nats: float = 0.0
    poisson: float = 0.0
    histogram: float = 0.0
    ngram: float = 0.0
    rates: RateSums = field(default_factory=RateSums)

    def __iadd__(self, other: "Sums") -> "Sums":
        for name, value in vars(other).items():
            mine = getattr(self, name)
            mine += value
            setattr(self, name, mine)
        return self


@dataclass(frozen=True)
class RecordingScore:
    """What one recording contributes.

    Attributes:
        sums: over all of its scored tokens.
        by_position: tokens, spikes, nats and Poisson's nats of its counts by `geometric_bin` of their position, float64
            [NUM_EDGES, 4].
        by_time: the same by that of the seconds since the recording began.
    """

    sums: Sums
    by_position: NDArray[np.float64]
    by_time: NDArray[np.float64]


@dataclass(frozen=True)
class Matrices:
    """A recording's scored tokens, as matrices [bins, neurons]; 0 where nothing is scored.

    Attributes:
        counts: uint8.
        scored: bool.
        nats, rates: float32.
        positions: geometric bin of the position, uint8.
        bins: each row's bin in the recording, int64 [bins].
        stretches: rows at which a bin is not the one after that of the row before.
        bos_tokens, bos_nats: number of BOS among the scored tokens, and nats of them.
    """

    counts: NDArray[np.uint8]
    scored: NDArray[np.bool_]
    nats: NDArray[np.float32]
    rates: NDArray[np.float32]
    positions: NDArray[np.uint8]
    bins: NDArray[np.int64]
    stretches: list[int]
    bos_tokens: int
    bos_nats: float


def geometric_bin(values: NDArray[np.integer] | NDArray[np.floating]) -> NDArray[np.uint8]:
    """The power of two that each value reaches, plus 1: 0 for [0, 1), 1 for [1, 2), 2 for [2, 4), …"""
    return np.frexp(np.asarray(values, np.float64))[1].clip(0).astype(np.uint8)


def score_recording(
    num_neurons: int, pieces: list[Piece], *, nulls: bool = True, recorded: Counts | None = None
) -> RecordingScore:
    """What a recording of that many neurons contributes; `pieces` are all of it that is scored, in order.

    Without `nulls` the costly ones stay 0: histogram, n-gram, and the comparison of rates. `recorded`, uint8 [neurons,
    bins], are its counts before they became tokens, where some may have been clipped.
    """
    m = assemble(num_neurons, pieces)
    poisson = poisson_nats(m.counts, m.scored)
    per_token = (m.scored, m.counts, m.nats, poisson)
    per_bin = np.stack([values.sum(axis=1, dtype=np.float64) for values in per_token])
    totals = per_bin.sum(axis=1)
    places = m.positions.reshape(-1)
    sums = Sums(
        rows=1,
        neurons=num_neurons,
        bins=float(totals[TOKENS]) / num_neurons,
        tokens=int(totals[TOKENS]),
        bos_tokens=m.bos_tokens,
        spikes=int(totals[SPIKES]),
        nats=float(totals[NATS]),
        bos_nats=m.bos_nats,
        poisson=float(totals[POISSON]),
    )
    if nulls:
        sums.histogram = histogram_nats(m.counts, m.scored)
        sums.ngram = ngram_nats(m.counts, m.scored)
        sums.rates = rate_sums(m.rates, m.counts, m.scored, m.stretches, BIN_SECONDS)
    if recorded is not None:
        sums.clipped = int(((recorded.T[m.bins] != m.counts) & m.scored).sum())
    times = geometric_bin(m.bins * BIN_SECONDS)
    return RecordingScore(
        sums,
        _by_bin(places, [values.reshape(-1) for values in per_token]),
        _by_bin(times, list(per_bin)),
    )


def _by_bin(places: NDArray[np.uint8], figures: list[NDArray[Any]]) -> NDArray[np.float64]:
    """Sums of each figure over equal places, float64 [NUM_EDGES, figures]."""
    return np.stack([np.bincount(places, figure, NUM_EDGES) for figure in figures], axis=1).astype(np.float64)


def assemble(num_neurons: int, pieces: list[Piece]) -> Matrices:
    """The pieces as matrices. Pieces that follow each other without a gap may meet inside a bin."""
    width = num_neurons + 1
    stretches: list[list[Piece]] = []
    for piece in pieces:
        if stretches and stretches[-1][-1].first + len(stretches[-1][-1].labels) == piece.first:
            stretches[-1].append(piece)
        else:
            stretches.append([piece])
    spans = [(stretch[0].first, stretch[-1].first + len(stretch[-1].labels)) for stretch in stretches]
    ranges = [(start // width, -(-stop // width)) for start, stop in spans]
    begins = np.cumsum([0, *(stop - start for start, stop in ranges)])
    size = int(begins[-1]) * width
    labels, positions = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    nats, rates = np.zeros(size, np.float32), np.zeros(size, np.float32)
    scored = np.zeros(size, bool)
    for stretch, (start, _), begin in zip(stretches, ranges, begins, strict=False):
        for piece in stretch:
            at = int(begin) * width + piece.first - start * width
            there = slice(at, at + len(piece.labels))
            labels[there], nats[there], rates[there], scored[there] = piece.labels, piece.nats, piece.rates, True
            positions[there] = geometric_bin(np.arange(piece.position, piece.position + len(piece.labels)))

    def of_counts(values: NDArray) -> NDArray:
        return np.ascontiguousarray(values.reshape(-1, width)[:, 1:])

    return Matrices(
        counts=of_counts(labels),
        scored=of_counts(scored),
        nats=of_counts(nats),
        rates=of_counts(rates),
        positions=of_counts(positions),
        bins=np.concatenate([np.arange(start, stop) for start, stop in ranges]),
        stretches=[int(begin) for begin in begins[:-1]],
        bos_tokens=int(scored.reshape(-1, width)[:, 0].sum()),
        bos_nats=float(nats.reshape(-1, width)[:, 0].sum(dtype=np.float64)),
    )
