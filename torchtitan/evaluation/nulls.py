"""What models without a network reach, fitted to the very tokens they are scored on: a comparison in their favour."""

from collections.abc import Iterable

import numpy as np

from torchtitan.data.tokens import Counts


def unigram_entropy(recordings: Iterable[Counts]) -> float:
    """Entropy of one distribution of spike counts for all neurons and bins, nats a count."""
    histogram = np.zeros(256, np.int64)
    for counts in recordings:
        histogram += np.bincount(counts.reshape(-1), minlength=256)
    return _total_entropy(histogram) / int(histogram.sum())


def histogram_entropy(recordings: Iterable[Counts]) -> float:
    """Cross-entropy under a histogram of each recording's each neuron, nats a count."""
    nats, size = 0.0, 0
    for counts in recordings:
        nats += sum(_total_entropy(np.bincount(neuron, minlength=256)) for neuron in counts)
        size += counts.size
    return nats / size


def _total_entropy(histogram: np.ndarray) -> float:
    """n · H of n samples with this histogram: their negative log likelihood under their own frequencies, nats."""
    seen = histogram[histogram > 0]
    return float(-(seen * np.log(seen / seen.sum())).sum())
