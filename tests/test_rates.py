"""Smoothed activity, and how a predicted rate is compared with it."""

import math

import numpy as np
import pytest

from tests.test_nulls import random_counts, random_scored
from torchtitan.evaluation.rates import RateSums, rate_sums, smoothed

BIN = 0.02


def by_hand(counts: np.ndarray, scored: np.ndarray, stretches: list[int]) -> np.ndarray:
    """The weighted mean of the scored counts around, in the same stretch, up to 10 bins (4 × 50 ms) away."""
    out = np.zeros(counts.shape)
    for first, end in zip(stretches, [*stretches[1:], len(counts)], strict=True):
        for t, neuron in zip(*np.nonzero(scored), strict=True):
            if first <= t < end:
                near = [u for u in range(max(first, t - 10), min(end, t + 11)) if scored[u, neuron]]
                weights = [math.exp(-0.5 * ((u - t) * BIN / 0.05) ** 2) for u in near]
                out[t, neuron] = np.dot(weights, counts[near, neuron]) / sum(weights)
    return out


@pytest.mark.parametrize("stretches", [[0], [0, 1, 70, 150]])
def test_smoothing(stretches: list[int]) -> None:
    counts, scored = random_counts(200, 4), random_scored(200, 4)
    counts = np.where(scored, counts, np.uint8(0))
    assert smoothed(counts, scored, stretches, BIN) == pytest.approx(by_hand(counts, scored, stretches), abs=1e-5)


def test_a_constant_stays_what_it_is_up_to_the_edges() -> None:
    counts = np.full((100, 2), 3, np.uint8)
    assert smoothed(counts, np.ones(counts.shape, bool), [0], BIN) == pytest.approx(3.0, abs=1e-6)


def test_figures_against_numpy() -> None:
    counts, scored = random_counts(300, 5), random_scored(300, 5)
    counts = np.where(scored, counts, np.uint8(0))
    y = smoothed(counts, scored, [0], BIN)
    x = np.where(scored, y * 0.8 + np.random.default_rng(2).normal(0, 0.1, y.shape), 0).astype(np.float32)
    sums = rate_sums(x, counts, scored, [0], BIN)
    own = [(x[scored[:, i], i].astype(float), y[scored[:, i], i].astype(float)) for i in range(4)]
    predicted = np.concatenate([a - a.mean() for a, _ in own])
    activity = np.concatenate([b - b.mean() for _, b in own])
    residual = np.concatenate([b - a for a, b in own])
    assert sums.r2 == pytest.approx(1 - (residual**2).sum() / (activity**2).sum(), rel=1e-4)
    expected = (predicted * activity).sum() / math.sqrt((predicted**2).sum() * (activity**2).sum())
    assert sums.correlation == pytest.approx(expected, rel=1e-4)


def test_a_perfect_rate_and_a_mean_rate() -> None:
    counts = random_counts(300, 5)
    scored = np.ones(counts.shape, bool)
    y = smoothed(counts, scored, [0], BIN)
    perfect = rate_sums(y, counts, scored, [0], BIN)
    assert perfect.r2 == pytest.approx(1)
    assert perfect.correlation == pytest.approx(1)
    constant = rate_sums(np.broadcast_to(y.mean(axis=0), y.shape).astype(np.float32), counts, scored, [0], BIN)
    assert constant.r2 == pytest.approx(0, abs=1e-4)


def test_where_nothing_varies_there_is_no_figure() -> None:
    assert RateSums().r2 is None
    assert RateSums().correlation is None
