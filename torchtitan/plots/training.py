"""How runs train, from their `metrics.jsonl`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from torchtitan.plots import style

Metrics = Sequence[Mapping[str, Any]]

PANELS = (
    ("loss", "Loss", "nats per token, BOS included"),
    ("grad_norm", "Gradient norm, before clipping", "norm"),
    ("lr", "Learning rate", "learning rate"),
    ("tokens_per_second_per_gpu", "Speed", "tokens/s a process"),
)
HELD_OUT = (
    ("validation_nats_per_token", "Loss on held-out recordings", "nats per token, without BOS"),
    ("validation_bits_per_spike", "Bits per spike on held-out recordings", "bits per spike"),
)
"""Panels of runs that are validated."""
NOISY = ("loss", "grad_norm")
SMOOTH_FROM = 100
"""Logged steps from which on loss and gradient norm are drawn thinly, and a running mean over them."""


def training_curves(runs: Mapping[str, Metrics]) -> Figure:
    """Loss, gradient norm, learning rate and speed of runs against their steps, on common axes; and validations.

    Where loss or gradient norm were not finite, the line has a gap. Crosses at the bottom of the loss mark logged
    steps since whose predecessor updates were skipped.

    Args:
        runs: by name, the lines of each run's `metrics.jsonl`.
    """
    kind = "Training curves" if len(runs) == 1 else f"Training curves of {len(runs)} runs"
    held_out = any(line.get(key) is not None for lines in runs.values() for line in lines for key, *_ in HELD_OUT)
    panels = PANELS + HELD_OUT if held_out else PANELS
    height = 0.8 + 3 * len(panels) / 2 + 0.22 * (len(runs) // 4)
    figure = style.new_figure(height, kind, next(iter(runs)) if len(runs) == 1 else "")
    grid = figure.subplots(len(panels) // 2, 2, sharex=True)
    for axes, (key, title, unit) in zip(grid.flat, panels, strict=True):
        style.dress(axes, "step" if axes in grid[-1] else "", unit, title)
        for index, (name, lines) in enumerate(runs.items()):
            _curve(axes, lines, key, name, style.series(index))
        if key in NOISY:
            _log_if_wide(axes)
        elif (key, title, unit) in PANELS:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(style.PLAIN)
        style.count_steps(axes)
    skipping = False
    for index, lines in enumerate(runs.values()):
        skipped = _skipping_steps(lines)
        skipping |= bool(skipped)
        marks = {"marker": "x", "color": style.series(index)["color"], "s": 30, "clip_on": False, "zorder": 5}
        grid[0, 0].scatter(skipped, [0.0] * len(skipped), transform=grid[0, 0].get_xaxis_transform(), **marks)
    if skipping:
        grid[0, 0].set_title("Loss (×: updates skipped)", loc="left", fontsize=style.MEDIUM)
    smooth = any(len(lines) >= SMOOTH_FROM for lines in runs.values())
    if smooth or len(runs) > 1:
        handles = grid[0, 0].get_legend_handles_labels()[0] if len(runs) > 1 else []
        caption = "Thin lines: single steps; thick ones: their mean over a fiftieth of the run." if smooth else ""
        style.legend_below(figure, handles, caption)
    return figure


def _curve(axes: Axes, lines: Metrics, key: str, name: str, look: dict[str, Any]) -> None:
    # A loss that is null was not finite, which shows as a gap; a validation that is null was not made.
    points = [(line["step"], line[key]) for line in lines if key in line and (key in NOISY or line[key] is not None)]
    steps = np.array([step for step, _ in points], float)
    values = np.array([math.nan if value is None else value for _, value in points], float)
    smooth = len(points) >= SMOOTH_FROM and key in NOISY
    if smooth:
        thin = {**look, "linestyle": "-", "linewidth": 0.6, "alpha": 0.35}
        axes.plot(steps, values, **thin)
        values = _running_mean(values, max(len(values) // 50, 3))
    axes.plot(steps, values, **look, linewidth=1.8, label=name, marker="." if len(points) < SMOOTH_FROM // 2 else "")


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean of the finite ones among `width` values around each; nan where the value itself is not finite."""
    known = np.isfinite(values)
    window = np.ones(width)
    total = np.convolve(np.where(known, values, 0), window, "same")
    return np.divide(total, np.convolve(known, window, "same"), out=np.full(len(values), np.nan), where=known)


def _skipping_steps(lines: Metrics) -> list[int]:
    """Logged steps by which more updates were skipped than by the one before; a new process counts from 0 again."""
    steps, before = [], 0
    for line in lines:
        skipped = line.get("skipped_updates") or 0
        if skipped > before or (skipped < before and skipped > 0):
            steps.append(line["step"])
        before = skipped
    return steps


def _log_if_wide(axes: Axes) -> None:
    """A logarithmic axis where the largest value is more than five times the smallest, and none is 0."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.empty(0)])
    values = values[np.isfinite(values)]
    if values.size and 0 < 5 * values.min() < values.max():
        style.log_scale(axes, "y")
