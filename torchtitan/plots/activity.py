"""Recorded activity beside what a model makes of its beginning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from torchtitan.data.tokens import Counts
from torchtitan.plots import spikes, style
from torchtitan.plots.spikes import Floats

MAX_PANELS = 7
"""Continuations in a raster; further ones are left out, and the caption says so."""
MAX_COLUMNS = 800
"""Columns of a raster's picture: more bins than that are drawn together."""
SMOOTHING_SECONDS, MAX_WINDOWS = 0.06, 200
"""Standard deviation of the window under which population rates are shown, or one in so many of the time shown."""
FAINTEST = 0.45
"""Opacity of a single spike where others are many, so that none is lost."""


MAX_DOTS = 3000
"""Neurons or pairs that are drawn as dots; of more, their density is."""


@dataclass(frozen=True)
class Activity:
    """What follows the prompt.

    Attributes:
        name: "recorded" for what really followed, else which sample it is: "sample 0".
        counts: spike counts, uint8 [neurons, bins].
    """

    name: str
    counts: Counts

    @property
    def is_recorded(self) -> bool:
        return self.name == "recorded"

    @property
    def color(self) -> str:
        return style.RECORDED if self.is_recorded else style.GENERATED


def raster(prompt: Counts, continuations: Sequence[Activity], *, title: str, bin_seconds: float = 0.02) -> Figure:
    """Spikes of all neurons over time: the prompt and each continuation, on one time axis.

    A row a neuron, sorted by their rates in the prompt, the fastest on top, alike in all panels. Of a prompt that is
    longer than the longest continuation only the end is shown, as long as that or a second.

    Args:
        prompt: spike counts that the model was given, uint8 [neurons, bins].
        continuations: what follows it, each of the same neurons; a panel each.
        title: which recording, and which checkpoint generated.
        bin_seconds: length of a bin.
    """
    shown = list(continuations[:MAX_PANELS])
    longest = max((activity.counts.shape[1] for activity in shown), default=0)
    start = _first_shown(prompt, longest, bin_seconds)
    order = np.argsort(-prompt.sum(axis=1, dtype=np.int64), kind="stable")
    recent = prompt[order, start:]
    nothing = Activity("", prompt[:, :0])
    panels = [(activity, activity.counts[order]) for activity in shown or [nothing]]

    num_neurons = len(prompt)
    panel_height = float(np.clip(0.09 * num_neurons, 1.1, np.clip(11 / len(panels), 1.5, 2.8)))
    caption = "One row a neuron, sorted by their rates in the prompt; the darker, the more spikes."
    if len(continuations) > len(shown):
        caption += f" {len(continuations) - len(shown)} further continuations are not shown."
    figure = style.new_figure(1.5 + panel_height * len(panels), "Recorded and generated spikes", title, caption)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]

    columns = max(-(-(recent.shape[1] + longest) // MAX_COLUMNS), 1)
    rows = max(int(panel_height * style.DPI / max(num_neurons, 1)), 1)
    darkest = max(_darkest(_together(counts, columns)) for counts in (recent, *(counts for _, counts in panels)))
    for number, (axes, (activity, counts)) in enumerate(zip(all_axes, panels, strict=True)):
        style.dress(axes, y_label="neuron")
        axes.grid(False)
        _mark_prompt(axes, recent.shape[1] * bin_seconds, label=number == 0, cut=start > 0)
        for piece, color, ends_at_zero in ((recent, style.RECORDED, True), (counts, activity.color, False)):
            _draw_spikes(axes, piece, color, columns, rows, darkest, bin_seconds, ends_at_zero=ends_at_zero)
        axes.set_ylim(num_neurons + 0.5, 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        if activity.name:
            _name_above(axes, activity)
    all_axes[-1].set_xlabel("time since the end of the prompt (s)", fontsize=style.MEDIUM)
    all_axes[-1].set_xlim(-recent.shape[1] * bin_seconds, max(longest, int(not recent.size)) * bin_seconds)
    return figure


def population_rate(
    prompt: Counts, continuations: Sequence[Activity], *, title: str, bin_seconds: float = 0.02
) -> Figure:
    """The rate of the mean neuron over time, in the prompt, the real continuation, and the samples.

    Smoothed by a Gaussian window, wider where more time is shown, which at the prompt's end looks to both sides. The
    prompt is cut as in `raster`.

    Args:
        prompt: spike counts that the model was given, uint8 [neurons, bins].
        continuations: what follows it, each of the same neurons.
        title: which recording, and which checkpoint generated.
        bin_seconds: length of a bin.
    """
    longest = max((activity.counts.shape[1] for activity in continuations), default=0)
    start = _first_shown(prompt, longest, bin_seconds)
    length = prompt.shape[1] - start
    sigma = max(SMOOTHING_SECONDS, (length + longest) * bin_seconds / MAX_WINDOWS)
    caption = f"Under a Gaussian window with a standard deviation of {1000 * sigma:.0f} ms."
    figure = style.new_figure(4.4, "Population rate, recorded and generated", title, caption)
    axes = style.dress(figure.subplots(), "time since the end of the prompt (s)", "rate of the mean neuron (Hz)")
    _mark_prompt(axes, length * bin_seconds, label=True, cut=start > 0)

    def draw(following: Counts, *, with_prompt: bool, **look: Any) -> Floats:
        whole = np.hstack([prompt, following])
        rates = spikes.population_rates(whole, bin_seconds, sigma / bin_seconds)
        first = start if with_prompt else prompt.shape[1]
        times = (np.arange(first, len(rates)) - prompt.shape[1] + 0.5) * bin_seconds
        axes.plot(times, rates[first:], marker=_marker(rates[first:]), **look)
        return rates[first:]

    recorded = next((activity.counts for activity in continuations if activity.is_recorded), prompt[:, :0])
    draw(recorded, with_prompt=True, color=style.RECORDED, linewidth=1.6, label="recorded", zorder=4)
    samples = [activity for activity in continuations if not activity.is_recorded]
    if len(samples) == 1:
        draw(samples[0].counts, with_prompt=False, color=style.GENERATED, linewidth=1.6, label="generated", zorder=5)
    elif samples:
        thin = {"color": style.GENERATED, "linewidth": 0.8, "alpha": 0.35}
        rates = [draw(activity.counts, with_prompt=False, **thin) for activity in samples]
        axes.lines[-1].set_label("generated, each")
        shortest = min(len(rate) for rate in rates)
        times = (np.arange(shortest) + 0.5) * bin_seconds
        mean = np.mean([rate[:shortest] for rate in rates], axis=0)
        name = f"generated, mean of {len(rates)}"
        axes.plot(times, mean, marker=_marker(mean), color=style.GENERATED, linewidth=2, label=name, zorder=5)
    axes.set_xlim(-length * bin_seconds, max(longest, int(not length)) * bin_seconds)
    axes.set_ylim(bottom=0)
    style.legend_above(axes, right=True)
    return figure


def statistics(real: Counts | None, generated: Sequence[Counts], *, title: str, bin_seconds: float = 0.02) -> Figure:
    """Whether generated activity is distributed as the recorded is, and neuron by neuron and pair by pair.

    Rates, inter-spike intervals, and pairwise correlations as `torchtitan.plots.spikes` defines them. The upper
    panels are cumulative distributions, free of any choice of bins; the lower ones compare single neurons and pairs,
    for which rates and correlations are means over the samples, and intervals are those of all samples together.

    Args:
        real: what really followed the prompt, uint8 [neurons, bins]; None where the recording ends there, which
            leaves out the lower panels.
        generated: samples, uint8 [neurons, bins] each, of the same neurons.
        title: which recording, and which checkpoint generated.
        bin_seconds: length of a bin.
    """
    real = None if real is None or not real.size else real
    generated = [counts for counts in generated if counts.size]
    sources = ([] if real is None else [real]) + generated
    if not sources:
        raise ValueError("statistics: neither recorded nor generated bins")
    num_neurons, num_samples = len(sources[0]), len(generated)
    comparable = real is not None and num_samples > 0
    kind = "Statistics of recorded and generated activity"
    figure = style.new_figure(7.9 if comparable else 4.4, kind, title)
    grid = figure.subplots(1 + comparable, 3, squeeze=False)

    rates = [spikes.firing_rates(counts, bin_seconds) for counts in sources]
    intervals = [spikes.inter_spike_intervals(counts, bin_seconds) for counts in sources]
    correlations = [spikes.pair_correlations(counts) for counts in sources]
    slowest = 1 / (max(counts.shape[1] for counts in sources) * bin_seconds)

    lengths = [seconds for _, seconds in intervals]
    in_bins = f"correlation in bins of {1000 * bin_seconds:g} ms"
    columns = (
        ("Firing rates", "rate (Hz)", "share of neurons at or below", rates),
        ("Inter-spike intervals", "interval (s)", "share of intervals at or below", lengths),
        ("Pairwise correlations", in_bins, "share of pairs at or below", correlations),
    )
    for axes, (name, x_label, y_label, values) in zip(grid[0], columns, strict=True):
        style.dress(axes, x_label, y_label, name)
        _distributions(axes, values[: len(sources) - num_samples], values[len(sources) - num_samples :])
    _rate_scale(grid[0, 0], "x", slowest)
    if some := [seconds for seconds in lengths if len(seconds)]:
        shortest, longest = min(map(np.min, some)), max(map(np.max, some))
        grid[0, 1].set_xlim(shortest / 1.3, longest * 1.3)
        style.log_scale(grid[0, 1], "x")
    handles = [
        *([Line2D([], [], color=style.RECORDED, linewidth=2, label="recorded")] if real is not None else []),
        *([Line2D([], [], color=style.GENERATED, linewidth=2, label=_samples(num_samples))] if generated else []),
        *([Line2D([], [], color=style.GENERATED, linewidth=0.8, alpha=0.5, label="each")] if num_samples > 1 else []),
    ]
    caption = "CV: standard deviation over mean of a neuron's intervals; 1 for a Poisson process." if comparable else ""
    style.legend_below(figure, handles, caption)
    if comparable:
        owners = np.concatenate([neurons for neurons, _ in intervals[1:]])
        of_recorded = spikes.interval_variation(*intervals[0], num_neurons)
        of_generated = spikes.interval_variation(owners, np.concatenate(lengths[1:]), num_neurons)
        _compare(grid[1, 0], rates[0], spikes.mean_known(rates[1:]), "rate (Hz)", "neurons")
        _compare(grid[1, 1], of_recorded, of_generated, "CV of intervals", "neurons")
        _compare(grid[1, 2], correlations[0], spikes.mean_known(correlations[1:]), "correlation", "pairs")
        _rate_scale(grid[1, 0], "xy", slowest)
    return figure


def _first_shown(prompt: Counts, longest: int, bin_seconds: float) -> int:
    """The first bin of the prompt that is shown; with nothing behind it, that is the very first."""
    return max(prompt.shape[1] - max(longest, round(1 / bin_seconds)), 0) if longest else 0


def _marker(rates: Floats) -> str:
    """A dot for a single bin, of which a line shows nothing."""
    return "o" if len(rates) == 1 else ""


def _samples(number: int) -> str:
    return "generated" if number == 1 else f"generated, {number} samples together"


def _mark_prompt(axes: Axes, seconds: float, *, label: bool, cut: bool) -> None:
    """Shades the prompt, and draws a line where it ends, at 0."""
    axes.axvspan(-seconds, 0, color=style.SHADE, linewidth=0, zorder=0)
    axes.axvline(0, color="black", linewidth=1, zorder=3)
    if label:
        name = f"prompt (its last {seconds:g} s)" if cut else "prompt"
        place = {"xytext": (0, 3), "textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
        axes.annotate(name, (-seconds, 1), **place, fontsize=style.MEDIUM, color=style.RECORDED)


def _name_above(axes: Axes, activity: Activity) -> None:
    name = "recorded" if activity.is_recorded else f"generated: {activity.name}"
    place = {"xytext": (2, 3), "textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
    axes.annotate(name, (0, 1), **place, fontsize=style.MEDIUM, color=activity.color)


def _together(counts: Counts, columns: int) -> NDArray[np.uint32]:
    """Sums over that many bins each, [neurons, ceil(bins / columns)]."""
    if not counts.size:
        return np.zeros((len(counts), 0), np.uint32)
    return np.add.reduceat(counts, np.arange(0, counts.shape[1], columns), axis=1, dtype=np.uint32)


def _darkest(sums: NDArray[np.uint32]) -> float:
    """The sum that is drawn opaque: all but the hundredth part of those with spikes are at most this."""
    positive = sums[sums > 0]
    return float(np.percentile(positive, 99)) if positive.size else 1.0


def _draw_spikes(
    axes: Axes,
    counts: Counts,
    color: str,
    columns: int,
    rows: int,
    darkest: float,
    bin_seconds: float,
    *,
    ends_at_zero: bool,
) -> None:
    """Draws counts as an image whose opacity grows with the square root of the spikes, from `FAINTEST` on."""
    if not counts.size:
        return
    missing = -counts.shape[1] % columns if ends_at_zero else 0
    sums = _together(np.pad(counts, ((0, 0), (missing, 0))), columns)
    opacity = np.where(sums > 0, FAINTEST + (1 - FAINTEST) * np.sqrt(np.minimum(sums / darkest, 1)), 0)
    if rows >= 4:
        opacity = opacity.repeat(rows, axis=0)
        opacity[::rows] = 0  # a gap between neurons, where there is room for one
    image = np.empty((*opacity.shape, 4), np.float32)
    image[..., :3] = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    image[..., 3] = opacity
    seconds = sums.shape[1] * columns * bin_seconds
    left = -seconds if ends_at_zero else 0.0
    extent = (left, left + seconds, len(counts) + 0.5, 0.5)
    axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest", zorder=2)


def _distributions(axes: Axes, recorded: list[Floats], generated: list[Floats]) -> None:
    """Cumulative distributions: of what was recorded, each sample, and all samples together."""
    axes.set_ylim(0, 1.02)
    for groups, color in ((recorded, style.RECORDED), (generated, style.GENERATED)):
        known = [values[np.isfinite(values)] for values in groups]
        known = [values for values in known if values.size]
        if len(known) > 1:
            for values in known:
                _shares(axes, values, color=color, linewidth=0.8, alpha=0.4)
        if known:
            _shares(axes, np.concatenate(known), color=color, linewidth=2)
    if not axes.lines:
        _nothing(axes)


def _shares(axes: Axes, values: Floats, **look: Any) -> None:
    """The share of values at or below x. (`Axes.ecdf` counts only the first of equal values where it joins them.)"""
    steps, number = np.unique(values, return_counts=True)
    shares = np.cumsum(number) / len(values)
    axes.plot([steps[0], *steps], [0, *shares], drawstyle="steps-post", **look)


def _compare(axes: Axes, real: Floats, generated: Floats, what: str, of: str) -> None:
    """A dot a neuron or pair, and the line on which both are equal."""
    known = np.isfinite(real) & np.isfinite(generated)
    real, generated = real[known], generated[known]
    style.dress(axes, f"recorded {what}", f"generated {what}", f"{len(real):,} {of}")
    if not real.size:
        _nothing(axes)
        return
    axes.axline((0, 0), slope=1, color=style.NULL, linewidth=1, zorder=3)
    if len(real) > MAX_DOTS:
        colors = LinearSegmentedColormap.from_list("generated", ["#FBE3D3", style.GENERATED, "#5E2900"])
        axes.hexbin(real, generated, gridsize=50, bins="log", mincnt=1, cmap=colors, linewidths=0.2)
    else:
        alpha = float(np.clip(300 / len(real), 0.15, 0.8))
        axes.scatter(real, generated, s=12, color=style.GENERATED, alpha=alpha, linewidth=0)
    low, high = min(real.min(), generated.min()), max(real.max(), generated.max())
    margin = 0.05 * (high - low) or 0.1
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    if len(real) > 2 and real.std() > 0 and generated.std() > 0:
        r = f"{np.corrcoef(real, generated)[0, 1]:.2f}".replace("-", "−")
        axes.set_title(f"{len(real):,} {of}, r = {r}", loc="left", fontsize=style.MEDIUM)


def _rate_scale(axes: Axes, which: str, slowest: float) -> None:
    """Logarithmic axes of rates that are linear below one spike in the whole time, so that 0 is on them.

    `which`: "x", or "xy" for both with the same limits.
    """
    fastest = max(slowest, *(getattr(axes, f"{one}axis").get_data_interval()[1] for one in which))
    decades = 10.0 ** np.arange(np.ceil(np.log10(slowest) + 0.15), np.floor(np.log10(1.3 * fastest)) + 1)
    for one in which:
        getattr(axes, f"set_{one}scale")("symlog", linthresh=slowest, linscale=0.4)
        axis = getattr(axes, f"{one}axis")
        axis.set_major_locator(FixedLocator([0.0, *(decades if len(decades) else [slowest])]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(style.PLAIN)
        getattr(axes, f"set_{one}lim")(0, 1.3 * fastest)


def _nothing(axes: Axes) -> None:
    place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, "none", **place, fontsize=style.MEDIUM, color=style.NULL)
