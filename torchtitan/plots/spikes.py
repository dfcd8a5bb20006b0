"""Statistics of spike counts, as in the pictures: rates, inter-spike intervals, pairwise correlations."""

import numpy as np
from numpy.typing import NDArray

from torchtitan.data.tokens import Counts

Floats = NDArray[np.float64]

MIN_INTERVALS = 10
"""Intervals that a neuron needs before their spread says anything."""
MAX_NEURONS = 300
"""Neurons whose pairs are looked at: 44,850 pairs."""


def firing_rates(counts: Counts, bin_seconds: float) -> Floats:
    """Mean rate of each neuron, Hz, [neurons]: its spikes over the length of the recording."""
    return counts.sum(axis=1, dtype=np.int64) / (counts.shape[1] * bin_seconds)


def population_rates(counts: Counts, bin_seconds: float, smoothing_bins: float) -> Floats:
    """Rate of the mean neuron over time, Hz, [bins]: (spikes of the bin) / (neurons · bin), under a Gaussian window.

    At both ends the part of the window that lies inside the recording is taken, as wide as it is.

    Args:
        counts: uint8 [neurons, bins].
        bin_seconds: length of a bin.
        smoothing_bins: standard deviation of the window, bins.
    """
    rates = counts.sum(axis=0, dtype=np.int64) / (counts.shape[0] * bin_seconds)
    if not len(rates):
        return rates
    reach = min(int(np.ceil(3 * smoothing_bins)), len(rates) - 1)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / smoothing_bins) ** 2)
    inside = slice(reach, reach + len(rates))
    return np.convolve(rates, window)[inside] / np.convolve(np.ones(len(rates)), window)[inside]


def inter_spike_intervals(counts: Counts, bin_seconds: float) -> tuple[NDArray[np.int64], Floats]:
    """Times between successive spikes of a neuron, seconds, and which neuron's they are: [intervals] each.

    Bins tell no times within them: the k spikes of a bin are taken to be spread evenly over it, at (j + 1/2) / k of
    its length, j = 0 … k - 1. Single spikes in two bins are then a whole number of bins apart, and those that share a
    bin with others at least 1 / k of one.
    """
    neurons, bins = np.nonzero(counts)
    spikes = counts[neurons, bins].astype(np.int64)
    first = np.repeat(np.cumsum(spikes) - spikes, spikes)
    within = (np.arange(len(first)) - first + 0.5) / np.repeat(spikes, spikes)
    times = (np.repeat(bins, spikes) + within) * bin_seconds
    owners = np.repeat(neurons, spikes)
    same = owners[1:] == owners[:-1]
    return owners[1:][same], np.diff(times)[same]


def interval_variation(owners: NDArray[np.int64], intervals: Floats, num_neurons: int) -> Floats:
    """Coefficient of variation of each neuron's intervals, [neurons]: standard deviation over mean.

    1 for a Poisson process, 0 for a clock. nan where there are fewer than `MIN_INTERVALS`.
    """
    number = np.bincount(owners, minlength=num_neurons)
    enough = np.maximum(number, 1)
    mean = np.bincount(owners, intervals, num_neurons) / enough
    variance = np.bincount(owners, (intervals - mean[owners]) ** 2, num_neurons) / enough
    known = number >= MIN_INTERVALS
    return np.divide(np.sqrt(variance), mean, out=np.full(num_neurons, np.nan), where=known)


def chosen_neurons(num_neurons: int) -> NDArray[np.int64]:
    """The neurons whose pairs are looked at: all, or `MAX_NEURONS` of them at even distances."""
    return np.unique(np.linspace(0, num_neurons - 1, min(num_neurons, MAX_NEURONS)).round().astype(np.int64))


def pair_correlations(counts: Counts) -> Floats:
    """Pearson's correlation of the counts of each pair of the `chosen_neurons`, bin by bin, [pairs].

    nan where one of the two neurons has the same count in every bin. The order of the pairs depends on the number of
    neurons alone.
    """
    neurons = chosen_neurons(len(counts))
    deviations = counts[neurons].astype(np.float32)
    deviations -= deviations.mean(axis=1, keepdims=True)
    norms = np.sqrt((deviations**2).sum(axis=1, keepdims=True))
    deviations /= np.where(norms > 1e-6, norms, np.nan)
    return (deviations @ deviations.T)[np.triu_indices(len(neurons), 1)].astype(np.float64)


def mean_known(values: list[Floats]) -> Floats:
    """The mean of several arrays of the same shape, element by element, over those that are not nan there."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    number = known.sum(axis=0)
    total = np.where(known, stacked, 0).sum(axis=0)
    return np.divide(total, number, out=np.full(stacked.shape[1:], np.nan), where=number > 0)
