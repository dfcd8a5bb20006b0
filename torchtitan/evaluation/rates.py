"""The predicted rate against smoothed activity: does the model know when a neuron fires more than on average?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KERNEL_SECONDS = 0.05
"""Standard deviation of the Gaussian that counts are smoothed with: a usual width for spikes of single trials."""
REACH = 4
"""Standard deviations at which the kernel is cut off, on both sides."""
BLOCK = 64
"""Bins that are smoothed by one matrix product."""


@dataclass
class RateSums:
    """Sums over scored counts of squares about each neuron's mean in its recording, x predicted and y smoothed.

    Attributes:
        residual: Σ (y - x)².
        smoothed: Σ (y - ȳ)².
        predicted: Σ (x - x̄)².
        product: Σ (x - x̄)(y - ȳ).
    """

    residual: float = 0.0
    smoothed: float = 0.0
    predicted: float = 0.0
    product: float = 0.0

    def __iadd__(self, other: "RateSums") -> "RateSums":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def r2(self) -> float | None:
        """1 - Σ (y - x)² / Σ (y - ȳ)²; None where nothing varies."""
        return 1 - self.residual / self.smoothed if self.smoothed > 0 else None

    @property
    def correlation(self) -> float | None:
        """Pearson's, of the deviations from each neuron's mean; None where nothing varies."""
        scale = (self.smoothed * self.predicted) ** 0.5
        return self.product / scale if scale > 0 else None


def rate_sums(
    rates: NDArray[np.float32], counts: NDArray[np.uint8], scored: NDArray[np.bool_], stretches: list[int], bin_s: float
) -> RateSums:
    """Compares the predicted with the smoothed counts of one recording.

    Args:
        rates: predicted counts, float32 [bins, neurons]; 0 where nothing is scored.
        counts: uint8 [bins, neurons]; 0 where nothing is scored.
        scored: which of them are scored, bool [bins, neurons].
        stretches: first bins of the stretches that follow each other without a gap; the first is 0.
        bin_s: seconds of a bin.
    """
    smooth = smoothed(counts, scored, stretches, bin_s)
    sizes = np.maximum(scored.sum(axis=0), 1)

    def deviations(values: NDArray[np.float32]) -> NDArray[np.float32]:
        means = values.sum(axis=0, dtype=np.float64) / sizes
        return (values - means.astype(np.float32)) * scored

    def total(product: NDArray[np.float32]) -> float:
        return float(product.sum(dtype=np.float64))

    x, y = deviations(rates), deviations(smooth)
    return RateSums(
        residual=total((smooth - rates) ** 2),
        smoothed=total(y * y),
        predicted=total(x * x),
        product=total(x * y),
    )


def smoothed(
    counts: NDArray[np.uint8], scored: NDArray[np.bool_], stretches: list[int], bin_s: float
) -> NDArray[np.float32]:
    """Counts under a Gaussian kernel, float32 [bins, neurons], 0 where nothing is scored.

    The weighted mean of the scored counts within reach and in the same stretch: weights that fall on others are left
    out, and the rest scaled up.
    """
    sigma = KERNEL_SECONDS / bin_s
    reach = int(REACH * sigma)
    out = np.empty(counts.shape, np.float32)
    for first, end in zip(stretches, [*stretches[1:], len(counts)], strict=True):
        for start in range(first, end, BLOCK):
            stop = min(start + BLOCK, end)
            low, high = max(start - reach, first), min(stop + reach, end)
            distances = np.arange(start, stop)[:, None] - np.arange(low, high)
            weights = np.exp(-0.5 * (distances / sigma) ** 2) * (np.abs(distances) <= reach)
            weights = weights.astype(np.float32)
            # What is scored itself weighs 1.
            total = weights @ scored[low:high].astype(np.float32)
            out[start:stop] = weights @ counts[low:high].astype(np.float32) / np.maximum(total, 1)
    out *= scored
    return out
