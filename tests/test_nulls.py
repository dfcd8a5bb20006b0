"""What rate models reach, against the same formulas written out without any of the code under test."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtitan.evaluation.nulls import (
    histogram_nats,
    ngram_nats,
    ngram_probabilities,
    occurrences_before,
    poisson_nats,
)

# Of each file of real recordings: counts, and nats a count of the Poisson and the histogram null, from its README.
REAL = {"nelpy": (8_434_384, 0.1005, 0.0965), "aplysia": (1_429_602, 0.1286, 0.1280)}


def random_counts(bins: int, neurons: int, seed: int = 0) -> np.ndarray:
    """Poisson counts of neurons whose rates range from none at all to several a bin, uint8 [bins, neurons]."""
    random = np.random.default_rng(seed)
    rates = np.concatenate([[0.0], np.exp(random.normal(-1, 2, neurons - 1))])
    return np.minimum(random.poisson(rates, (bins, neurons)), 254).astype(np.uint8)


def random_scored(bins: int, neurons: int) -> np.ndarray:
    """Part of the counts, of the last neuron none."""
    scored = np.random.default_rng(1).random((bins, neurons)) < 0.7
    scored[:, -1] = False
    return scored


def read_real(folder: Path, name: str) -> list[np.ndarray]:
    """The rows of a file of real recordings, uint8 [bins, neurons] each."""
    rows = parquet.read_table(folder / f"{name}.parquet", columns=["spike_counts"])["spike_counts"]
    return [np.stack([neuron.values.to_numpy() for neuron in row], axis=1) for row in rows]


def nlb_bits_per_spike(rates: np.ndarray, spikes: np.ndarray) -> float:
    """The benchmark's metric as its paper defines it: log likelihoods under Poisson with the predicted and with the
    mean rates (of the evaluated bins), their difference over the number of spikes, in bits."""

    def log_likelihood(expected: np.ndarray) -> float:
        total = 0.0
        for rate, count in zip(expected.reshape(-1).tolist(), spikes.reshape(-1).tolist(), strict=True):
            if rate > 0:  # else the count is 0, and certain
                total += count * math.log(rate) - rate - math.log(math.factorial(count))
        return total

    null = np.broadcast_to(spikes.mean(axis=0), spikes.shape)
    return (log_likelihood(rates) - log_likelihood(null)) / spikes.sum() / math.log(2)


def test_poisson_is_the_null_of_the_neural_latents_benchmark() -> None:
    spikes = random_counts(400, 7)
    random = np.random.default_rng(3)
    rates = spikes.mean(axis=0) * random.lognormal(0, 0.3, spikes.shape)
    model = sum(
        rate - (count * math.log(rate) if count else 0) + math.lgamma(count + 1)
        for rate, count in zip(rates.reshape(-1).tolist(), spikes.reshape(-1).tolist(), strict=True)
    )
    null = poisson_nats(spikes, np.ones(spikes.shape, bool)).sum()
    ours = (null - model) / (spikes.sum() * math.log(2))
    assert ours == pytest.approx(nlb_bits_per_spike(rates, spikes), rel=1e-9)


def test_only_what_is_scored_counts() -> None:
    counts, scored = random_counts(300, 6), random_scored(300, 6)
    counts = np.where(scored, counts, np.uint8(0))  # as the matrices of a recording are
    poisson = histogram = ngram = 0.0
    for neuron in range(6):
        its = counts[scored[:, neuron], neuron].tolist()
        rate = sum(its) / len(its) if its else 0.0
        poisson += sum(rate - (count * math.log(rate) if count else 0) + math.lgamma(count + 1) for count in its)
        histogram -= sum(times * math.log(times / len(its)) for times in Counter(its).values())
        ngram -= float(np.log(ngram_probabilities(np.array(its, np.uint8))).sum())
    nats = poisson_nats(counts, scored)
    assert nats.sum() == pytest.approx(poisson, rel=1e-12)
    assert not nats[~scored].any()
    assert histogram_nats(counts, scored) == pytest.approx(histogram, rel=1e-12)
    assert ngram_nats(counts, scored) == pytest.approx(ngram, rel=1e-12)


@pytest.mark.parametrize("name", REAL)
def test_real_recordings(real_recordings: Path, name: str) -> None:
    rows = read_real(real_recordings, name)
    scored = [np.ones(row.shape, bool) for row in rows]
    size, poisson, histogram = REAL[name]
    assert sum(row.size for row in rows) == size
    found = sum(poisson_nats(*row).sum() for row in zip(rows, scored, strict=True)) / size
    assert round(found, 4) == poisson
    found = sum(histogram_nats(*row) for row in zip(rows, scored, strict=True)) / size
    assert round(found, 4) == histogram


def classes(count: int) -> int:
    return sum(count >= first for first in (1, 2, 3, 4, 6, 9, 16))


def ngram_by_hand(counts: list[int]) -> list[float]:
    """The n-gram's formula, one count after another with dictionaries."""
    sizes = [1, 1, 1, 1, 2, 3, 7, 239]
    seen: Counter[tuple[int, ...]] = Counter()
    followed: Counter[tuple[tuple[int, ...], int]] = Counter()
    members: Counter[int] = Counter()
    history, found = [0] * 4, []
    for count in counts:
        x = classes(count)
        probability = 2.0 ** -(x + 1) / (1 - 2.0**-8)
        contexts = [tuple(history[4 - order :]) for order in range(5)]
        for order, context in enumerate(contexts):
            strength = 30 if order else 1
            probability = (followed[context, x] + strength * probability) / (seen[context] + strength)
        if x >= 4:
            total = sum(times for member, times in members.items() if classes(member) == x)
            probability *= (members[count] + 1 / sizes[x]) / (total + 1)
        found.append(probability)
        for context in contexts:
            seen[context] += 1
            followed[context, x] += 1
        members[count] += 1
        history = [*history[1:], x]
    return found


@pytest.mark.parametrize("rate", [0.02, 0.5, 5.0, 20.0])
def test_ngram_is_its_formula(rate: float) -> None:
    counts = np.random.default_rng(0).poisson(rate, 500).astype(np.uint8)
    assert ngram_probabilities(counts) == pytest.approx(ngram_by_hand(counts.tolist()), rel=1e-12)


@given(history=st.lists(st.sampled_from([0, 0, 0, 1, 2, 5, 17]), max_size=30))
def test_ngram_is_a_distribution_and_knows_only_the_past(history: list[int]) -> None:
    """Whatever comes next, the probabilities of what came before stay, and those of all that may come sum to 1."""
    before = ngram_probabilities(np.array(history, np.uint8))
    after = [ngram_probabilities(np.array([*history, count], np.uint8)) for count in range(255)]
    assert all(np.array_equal(probabilities[:-1], before) for probabilities in after)
    assert sum(probabilities[-1] for probabilities in after) == pytest.approx(1, rel=1e-12)


def test_ngram_learns_what_a_histogram_cannot() -> None:
    regular = np.tile(np.array([0, 0, 0, 1], np.uint8), 500)[:, None]
    scored = np.ones(regular.shape, bool)
    assert ngram_nats(regular, scored) < 0.15 * histogram_nats(regular, scored)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_occurrences_before(values: list[int]) -> None:
    expected = [values[:place].count(value) for place, value in enumerate(values)]
    assert occurrences_before(np.array(values, np.uint16)).tolist() == expected
