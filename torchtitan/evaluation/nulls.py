"""What models without a network reach on the very tokens that a model is scored on.

Each sees one recording: counts, uint8 [bins, neurons], and which of them are scored, bool of the same shape. Poisson
and histogram are fitted to what they are scored on, a comparison in their favour; the n-gram learns as it goes.
"""

import math

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.uint8]
Scored = NDArray[np.bool_]

LOG_FACTORIALS = np.array([math.lgamma(count + 1) for count in range(256)])

FIRST_OF_CLASS = (0, 1, 2, 3, 4, 6, 9, 16)
"""The n-gram sorts counts into classes, of which these are the smallest members."""
NUM_CLASSES = len(FIRST_OF_CLASS)
CLASSES = (np.searchsorted(FIRST_OF_CLASS, np.arange(256), side="right") - 1).astype(np.uint8)
CLASS_SIZES = np.diff([*FIRST_OF_CLASS, 255])
ORDER = 4
"""Last counts that the n-gram looks at."""
STRENGTHS = (1.0, *[30.0] * ORDER)
"""How many observations the prior weighs as much as, by order: few counts tell much of a rate, little of a context."""
PRIOR = np.array([0.5 ** (1 + place) / (1 - 0.5**NUM_CLASSES) for place in range(NUM_CLASSES)])


def poisson_nats(counts: Counts, scored: Scored) -> NDArray[np.float64]:
    """Negative log likelihood of each scored count under a Poisson with its neuron's mean, 0 for the others.

    λ - k ln λ + ln k!, λ being the mean of the neuron's scored counts: the null of the Neural Latents Benchmark (Pei
    et al., Neural Latents Benchmark '21, 2021). A neuron that never fires has λ = 0, which predicts it exactly.

    Returns:
        Nats, float64 [bins, neurons].
    """
    sizes = scored.sum(axis=0)
    rates = (counts * scored).sum(axis=0, dtype=np.int64) / np.maximum(sizes, 1)
    log_rates = np.log(rates, where=rates > 0, out=np.zeros_like(rates))
    nats = LOG_FACTORIALS[counts]
    nats -= counts * log_rates
    nats += rates
    nats *= scored
    return nats


def histogram_nats(counts: Counts, scored: Scored) -> float:
    """Total negative log likelihood of the scored counts under each neuron's own relative frequencies, nats.

    n times the entropy of the neuron's histogram: what no model that gives a neuron one distribution can fall below.
    """
    num_neurons = counts.shape[1]
    histograms = np.bincount((counts + np.arange(num_neurons) * 256).reshape(-1), minlength=num_neurons * 256)
    histograms = histograms.reshape(num_neurons, 256)
    left_out = np.bincount((counts + np.arange(num_neurons) * 256)[~scored], minlength=num_neurons * 256)
    histograms = histograms - left_out.reshape(num_neurons, 256)
    shares = histograms / np.maximum(histograms.sum(axis=1, keepdims=True), 1)
    return -float((histograms * np.log(shares, where=histograms > 0, out=np.zeros_like(shares))).sum())


def ngram_nats(counts: Counts, scored: Scored) -> float:
    """Total negative log likelihood of the scored counts under an n-gram of each neuron over time, nats.

    What is not scored does not exist for it: a gap is closed. See `ngram_probabilities`.
    """
    counts_NT, scored_NT = np.ascontiguousarray(counts.T), np.ascontiguousarray(scored.T)
    neurons = zip(counts_NT, scored_NT, strict=True)
    return -sum(float(np.log(ngram_probabilities(neuron[its_scored])).sum()) for neuron, its_scored in neurons)


def ngram_probabilities(counts: Counts) -> NDArray[np.float64]:
    """Probability of each count of one neuron, given its counts before and nothing else.

    Prequential: each count is predicted before it is learned from. Counts fall into eight classes (0, 1, 2, 3, 4-5,
    6-8, 9-15, more). A class x is predicted from the classes c of the last j counts, by interpolation from j = 0 to 4:

        P_j(x | c) = (n_j(c, x) + a_j · P_{j-1}(x | c)) / (n_j(c) + a_j)

    where n_j counts how often c, and c followed by x, has occurred so far; a_j are `STRENGTHS`, and P_{-1}(x) ∝ 2^-x.
    It is the predictive rule of the hierarchical Dirichlet language model (MacKay & Peto, A hierarchical Dirichlet
    language model, 1995), each context having the next shorter one as its prior. A count within its class is predicted
    by the frequencies so far, with one observation's weight on all members alike. Before the first count there is
    silence.

    Args:
        counts: of one neuron, uint8 [bins], each below 255.

    Returns:
        Probabilities, float64 [bins]; over all counts from 0 to 254 they sum to 1.
    """
    classes = CLASSES[counts].astype(np.uint16)
    probabilities = PRIOR[classes]
    contexts = np.zeros(len(counts), np.uint16)
    # How often the context has stood there before: the empty one at every bin.
    seen = np.arange(len(counts))
    for order, strength in enumerate(STRENGTHS):
        continued = contexts * np.uint16(NUM_CLASSES) + classes
        seen_continued = occurrences_before(continued)
        probabilities *= strength
        probabilities += seen_continued
        probabilities /= seen + strength
        if order < ORDER:
            # A context and what has followed it are the next bin's context, one longer. The first bin's is silence,
            # which is 0 and no continuation of anything.
            contexts[1:] = continued[:-1]
            seen[1:] = seen_continued[:-1] + (continued[:-1] == 0)
            contexts[:1] = seen[:1] = 0

    large = counts >= FIRST_OF_CLASS[4]  # a class of several counts
    if large.any():
        within, its_class = counts[large], CLASSES[counts[large]]
        seen_within = occurrences_before(within.astype(np.uint16))
        probabilities[large] *= (seen_within + 1 / CLASS_SIZES[its_class]) / (
            occurrences_before(its_class.astype(np.uint16)) + 1
        )
    return probabilities


def occurrences_before(values: NDArray[np.uint16]) -> NDArray[np.int64]:
    """How many equal values stand before each one, int64 of the same length."""
    # For 16 bits NumPy's stable sort is a radix sort: equal values come to lie together, in their order.
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    places = np.arange(len(values))
    begins = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    first_of_group = np.zeros(len(values), np.int64)
    first_of_group[begins] = begins
    np.maximum.accumulate(first_of_group, out=first_of_group)
    occurrences = np.empty(len(values), np.int64)
    occurrences[order] = places - first_of_group
    return occurrences
