"""The statistics in the pictures, against computations of another kind."""

import numpy as np
import pytest

from torchtitan.plots import spikes

RANDOM = np.random.default_rng(0)


def poisson(num_neurons: int, num_bins: int, rate: float = 0.3) -> np.ndarray:
    return RANDOM.poisson(rate, (num_neurons, num_bins)).astype(np.uint8)


def test_rates_are_spikes_over_seconds() -> None:
    counts = np.array([[0, 3, 0, 1], [0, 0, 0, 0], [200, 200, 0, 0]], np.uint8)
    assert spikes.firing_rates(counts, 0.02).tolist() == pytest.approx([50, 0, 5000])


def test_population_rate_is_a_mean_under_a_gaussian() -> None:
    counts = poisson(7, 60)
    rates = spikes.population_rates(counts, 0.02, smoothing_bins=2.5)
    for t in (0, 3, 30, 59):
        inside = [s for s in range(60) if abs(s - t) <= 8]
        weights = [np.exp(-((s - t) ** 2) / (2 * 2.5**2)) for s in inside]
        assert rates[t] == pytest.approx(np.average(counts.mean(axis=0)[inside] / 0.02, weights=weights))


@pytest.mark.parametrize("num_bins", [0, 1, 2, 5])
def test_population_rate_of_few_bins_has_as_many(num_bins: int) -> None:
    counts = np.ones((3, num_bins), np.uint8)
    assert spikes.population_rates(counts, 0.02, 10).tolist() == pytest.approx([50] * num_bins)


def test_intervals_are_those_of_spikes_spread_over_their_bins() -> None:
    counts = np.minimum(poisson(6, 200, 0.5), 5)
    counts[2] = 0
    owners, intervals = spikes.inter_spike_intervals(counts, 0.02)
    for neuron, row in enumerate(counts):
        times = [0.02 * (t + (j + 0.5) / k) for t, k in enumerate(row) for j in range(k)]
        assert intervals[owners == neuron].tolist() == pytest.approx(np.diff(times).tolist())
    assert not (owners == 2).any()


def test_intervals_of_single_spikes_are_whole_bins() -> None:
    _, intervals = spikes.inter_spike_intervals(np.array([[1, 0, 0, 1, 1]], np.uint8), 0.02)
    assert intervals.tolist() == pytest.approx([0.06, 0.02])


def test_variation_of_intervals_is_0_for_a_clock_and_near_1_for_poisson_spikes() -> None:
    counts = np.zeros((3, 20_000), np.uint8)
    counts[0, ::7] = 1
    counts[1] = RANDOM.random(20_000) < 0.01
    counts[2, :50:5] = 1  # nine intervals
    variation = spikes.interval_variation(*spikes.inter_spike_intervals(counts, 0.02), num_neurons=3)
    assert variation[0] == pytest.approx(0, abs=1e-6)
    assert variation[1] == pytest.approx(1, abs=0.2)
    assert np.isnan(variation[2])


def test_correlations_are_pearsons_pair_by_pair() -> None:
    counts = poisson(5, 300)
    counts[1] = counts[0]
    counts[3] = 2  # the same in every bin: no correlation is defined
    found = spikes.pair_correlations(counts)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    assert found[0] == pytest.approx(1, abs=1e-5)
    for value, (i, j) in zip(found, pairs, strict=True):
        if 3 in (i, j):
            assert np.isnan(value)
        else:
            assert value == pytest.approx(np.corrcoef(counts[i], counts[j])[0, 1], abs=1e-5)


def test_of_many_neurons_the_same_some_are_paired_each_time() -> None:
    chosen = spikes.chosen_neurons(2600)
    assert len(chosen) == spikes.MAX_NEURONS
    assert (chosen[0], chosen[-1]) == (0, 2599)
    assert set(np.diff(chosen)) == {8, 9}
    counts = poisson(2600, 20)
    np.testing.assert_array_equal(spikes.pair_correlations(counts), spikes.pair_correlations(counts[chosen]))


def test_means_leave_out_what_is_not_known() -> None:
    nan = np.nan
    mean = spikes.mean_known([np.array([1.0, nan, nan]), np.array([3.0, 5.0, nan])])
    np.testing.assert_array_equal(mean, [2, 5, nan])
