"""What an evaluation has found: bits per spike by source, loss against context, calibration, learning curves.

An evaluation is the content of an `evaluation/step-N.json`. Numbers that are null there are left out of the pictures.
"""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import PurePath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchtitan.plots import style
from torchtitan.plots.names import distinct_names, shorten

Evaluation = dict[str, Any]
Interval = dict[str, Any]

STRONGER_NULLS = {
    "bits_per_spike_over_histogram": ("over histogram", ">"),
    "bits_per_spike_over_ngram": ("over n-gram", "s"),
}
FEWEST = 5
"""Tokens that a dot of the calibration stands for, at least."""
_CALIBRATION = ("expected", "observed")
_ONLY_HOW = ("batch_size", "mixed_precision_param")
"""Settings that change no token that is scored."""
_NAMED = ("seq_len", "min_context", "overlap", "max_windows", "document_mask")
"""Settings that tell curves apart."""


def pictures(evaluation: Evaluation) -> dict[str, Figure]:
    """All pictures of one evaluation, by the name of their file."""
    return {
        "sources": bits_per_spike_by_source(evaluation),
        "context": loss_against_context(evaluation),
        "calibration": calibration(evaluation),
    }


def bits_per_spike_by_source(evaluation: Evaluation) -> Figure:
    """Bits per spike of each source: pooled, and of each of its sessions, the best source on top.

    Pooled numbers are also drawn against the stronger nulls, where the evaluation has them. Sessions far off the
    others, mostly ones with few spikes, are drawn at the panel's edge.
    """
    by_source = _sessions_by_source(evaluation)
    ranked = sorted(evaluation["sources"].items(), key=lambda item: -_number(item[1].get("bits_per_spike"), -math.inf))
    groups = [("all", evaluation["overall"]), *ranked]
    figure = style.new_figure(
        2.2 + 0.36 * len(groups),
        "Bits per spike by source",
        _subject(evaluation),
        "0: no better than the null; more is better. Nulls: for each neuron a Poisson process or a histogram, fitted "
        "to what is scored, or an n-gram that learns on the way. Sessions: over Poisson.",
    )
    axes = style.dress(figure.subplots(), "bits per spike")
    axes.axvline(0, color=style.NULL, linewidth=1.2)
    pooled = [_number(group.get("bits_per_spike")) for _, group in groups]
    stronger = {key: [_number(group.get(key)) for _, group in groups] for key in STRONGER_NULLS}
    limits = _limits(list(chain(pooled, *stronger.values())), list(chain(*by_source.values())))
    rows = np.arange(len(groups))
    axes.scatter(
        pooled, rows, s=60, marker="D", color=style.GENERATED, edgecolor="black", zorder=5, label="pooled, over Poisson"
    )
    for key, (name, marker) in STRONGER_NULLS.items():
        if np.isfinite(stronger[key]).any():
            look = {"facecolor": "white", "edgecolor": style.GENERATED, "linewidth": 1.2, "zorder": 4}
            axes.scatter(stronger[key], rows, s=34, marker=marker, label=f"pooled, {name}", **look)
    beyond = sum(_draw_sessions(axes, row, by_source[source], limits) for row, (source, _) in enumerate(ranked, 1))
    for row, value in enumerate(pooled):
        if not math.isfinite(value):
            axes.annotate(" undefined: no spikes", (0, row), va="center", fontsize=style.SMALL, color=style.NULL)
    names = [f"{shorten(source, 40)} ({_count(group.get('sessions'), 'session')})" for source, group in groups]
    axes.set_yticks(rows, names, fontsize=style.SMALL)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.axhline(0.5, color="black", linewidth=0.8)
    if beyond:
        axes.set_xlabel(f"bits per spike ({_count(beyond, 'session')} beyond the edges)", fontsize=style.MEDIUM)
    style.legend_above(axes)
    return figure


def loss_against_context(evaluation: Evaluation) -> Figure:
    """Whether context helps: loss against the position in the window, bits per spike against time in the recording.

    Below each the number of tokens that the numbers rest on. Both axes of context are logarithmic; a first interval
    that begins at 0 is drawn from half of its end on.
    """
    figure = style.new_figure(5.8, "Loss against context", _subject(evaluation))
    grid = figure.subplots(2, 2, sharex="col", height_ratios=(3, 1))
    positions, times = evaluation["loss_by_position"], evaluation["loss_by_time"]

    axes = style.dress(grid[0, 0], y_label="nats per token", title="Position in the window")
    _stairs(axes, positions, "poisson_null_nats_per_token", style.NULL, "Poisson null")
    _stairs(axes, positions, "nats_per_token", style.GENERATED, "model")
    style.legend_below(figure, axes.get_legend_handles_labels()[0], "Of spike counts alone, without BOS.")
    axes = style.dress(grid[0, 1], y_label="bits per spike", title="Time since the recording began")
    axes.axhline(0, color=style.NULL, linewidth=1.8)
    _stairs(axes, times, "bits_per_spike", style.GENERATED)
    for axes, bins, x_label in (
        (grid[1, 0], positions, "position in the window (tokens)"),
        (grid[1, 1], times, "time (s)"),
    ):
        style.dress(axes, x_label, "tokens scored")
        _stairs(axes, bins, "tokens", style.NULL, fill=True)
        if bins:
            style.log_scale(axes, "x")
            style.log_scale(axes, "y", most_ticks=4)
    return figure


def calibration(evaluation: Evaluation) -> Figure:
    """How often each spike count was seen, against how often the model expected it, Σ p(count) over all tokens.

    Counts are drawn together with the next ones where fewer than `FEWEST` were seen or expected, as for Pearson's
    χ² test. Bars: two standard errors of the ratio's logarithm, 2 / sqrt(seen), if tokens were independent; they are
    not, so that the true ones are wider.
    """
    figure = style.new_figure(
        5.0,
        "Calibration: how often each spike count was seen, and how often it was expected",
        _subject(evaluation),
        f"Numbers beside dots: spikes in a bin; rare ones are drawn together, {FEWEST} tokens at least. "
        "Bars: two standard errors, if tokens were independent.",
    )
    left, right = figure.subplots(1, 2)
    style.dress(left, "tokens expected by the model", "tokens seen")
    style.dress(right, "spike count", "seen / expected")
    groups = _groups_of_counts(evaluation["calibration"])
    if not groups:
        return figure
    expected, seen = (np.array([sum(line[key] for line in group) for group in groups]) for key in _CALIBRATION)
    low, high = min(*expected, *seen) / 2, max(*expected, *seen) * 3
    left.axline((1, 1), (10, 10), color=style.NULL, linewidth=1)
    left.scatter(expected, seen, color=style.RECORDED, s=30, zorder=3)
    left.set(xlim=(low, high), ylim=(low, high))
    for which in "xy":
        style.log_scale(left, which)
    labelled: list[tuple[float, float]] = []
    for group, x, y in zip(groups, expected, seen, strict=True):
        place = (math.log(x / low) / math.log(high / low), math.log(y / low) / math.log(high / low))
        if all(math.dist(place, other) > 0.05 for other in labelled):
            labelled.append(place)
            first, last = group[0]["count"], group[-1]["count"]
            name = f"{first}" if first == last else f"{first}–{last}"
            left.annotate(name, (x, y), xytext=(6, -8), textcoords="offset points", fontsize=style.SMALL)

    right.axhline(1, color=style.NULL, linewidth=1.2)
    middle = [sum(line["count"] * line["observed"] for line in group) for group in groups] / seen
    ratio, error = seen / expected, 2 / np.sqrt(seen)
    bars = ratio * np.stack([1 - np.exp(-error), np.exp(error) - 1])
    right.errorbar(middle, ratio, bars, fmt="o", color=style.RECORDED, markersize=5, linewidth=1.2, zorder=3)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.log_scale(right, "y")
    return figure


def learning_curve(evaluations: Sequence[Evaluation]) -> Figure:
    """Bits per spike and nats a token of several checkpoints, against their steps.

    Checkpoints of one folder, scored on the same tokens, are joined by a line. Models with random weights are left
    out: the first checkpoints would lie on one line beside them.
    """
    curves: dict[tuple[str, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation["step"] is not None:
            curves.setdefault((_folder(evaluation), _scored(evaluation)), []).append(evaluation)
    runs = distinct_names([folder for folder, _ in curves])
    scored = [on for _, on in curves]
    settings = _differing_settings([points[0] for points in curves.values()])
    subject = ", on ".join(
        ([shorten(next(iter(curves))[0], 60)] if len(set(runs)) == 1 else ["several runs"])
        + ([_data(next(iter(curves.values()))[0])] if len(set(scored)) == 1 else [])
    )
    figure = style.new_figure(4.6, "Learning curve", subject)
    left, right = figure.subplots(1, 2)
    style.dress(left, "step", "bits per spike")
    style.dress(right, "step", "nats per token, without BOS")
    left.axhline(0, color=style.NULL, linewidth=1.2, label="Poisson null")
    several = len(curves) > 1
    nulls = set()
    for index, (points, run) in enumerate(zip(curves.values(), runs, strict=True)):
        points = sorted(points, key=lambda evaluation: evaluation["step"])
        steps = [evaluation["step"] for evaluation in points]
        name = run if len(set(scored)) == 1 else f"{run} on {_data(points[0])}{settings[index]}"
        look = style.series(index) if several else {"color": style.GENERATED}
        for axes, key in ((left, "bits_per_spike"), (right, "nats_per_token")):
            values = [_number(evaluation["overall"].get(key)) for evaluation in points]
            axes.plot(steps, values, marker="o", markersize=5, label=name if several else "model", **look)
        nulls.add(_number(points[-1]["overall"].get("poisson_null_nats_per_token")))
    for null in nulls:
        right.axhline(null, color=style.NULL, linewidth=1.2)
    for axes in (left, right):
        style.count_steps(axes)
    style.legend_below(figure, left.get_legend_handles_labels()[0])
    return figure


def _number(value: float | None, otherwise: float = math.nan) -> float:
    """The value, or `otherwise` where it is null or not finite."""
    return otherwise if value is None or not math.isfinite(value) else float(value)


def _sessions_by_source(evaluation: Evaluation) -> dict[str, list[float]]:
    """Bits per spike of each session of each source."""
    found: dict[str, list[float]] = {source: [] for source in evaluation["sources"]}
    for session in evaluation["sessions"].values():
        found[session["source_dataset"]].append(_number(session.get("bits_per_spike")))
    return found


def _draw_sessions(axes: Axes, row: int, bits_per_spike: list[float], limits: tuple[float, float]) -> int:
    """A dot a session, spread over the height of the row, the same every time. Returns how many are off the limits."""
    low, high = limits
    margin = 0.04 * (high - low)
    axes.set_xlim(low - 2 * margin, high + 2 * margin)
    known = np.array([bits for bits in bits_per_spike if math.isfinite(bits)])
    heights = row + 0.22 * np.cos(np.pi * (np.arange(len(known)) * 0.618 % 1))
    inside = (known >= low) & (known <= high)
    alpha = float(np.clip(30 / max(len(known), 1), 0.15, 0.45))
    look = {"color": style.GENERATED, "linewidth": 0}
    label = "single session" if row == 1 else None
    axes.scatter(known[inside], heights[inside], s=16, alpha=alpha, label=label, **look)
    for outside, edge, marker in ((known < low, low - margin, "<"), (known > high, high + margin, ">")):
        axes.scatter(np.full(outside.sum(), edge), heights[outside], s=26, marker=marker, **look)
    return int((~inside).sum())


def _groups_of_counts(calibration: list[Interval]) -> list[list[Interval]]:
    """Runs of counts that were seen and expected `FEWEST` times at least; what is left at the end joins the last."""
    known = [line for line in calibration if math.isfinite(_number(line["expected"]))]
    groups: list[list[Interval]] = [[]]
    for line in sorted(known, key=lambda line: line["count"]):
        if groups[-1] and all(sum(line[key] for line in groups[-1]) >= FEWEST for key in _CALIBRATION):
            groups.append([])
        groups[-1].append(line)
    if len(groups) > 1 and any(sum(line[key] for line in groups[-1]) < FEWEST for key in _CALIBRATION):
        groups[-2:] = [groups[-2] + groups[-1]]
    return [group for group in groups if all(sum(line[key] for line in group) > 0 for key in _CALIBRATION)]


def _limits(pooled: list[float], sessions: list[float]) -> tuple[float, float]:
    """Limits that hold 0, the pooled values, and the sessions that are not far off.

    Far is beyond the quartiles by three times their distance, or by three times the range of the pooled values.
    """
    inside = [0.0, *(bits for bits in pooled if math.isfinite(bits))]
    known = np.array([bits for bits in sessions if math.isfinite(bits)] or [0.0])
    lower, upper = np.percentile(known, (25, 75))
    far = 3 * max(upper - lower, max(inside) - min(inside))
    inside += known[np.abs(known - np.clip(known, lower, upper)) <= far].tolist()
    low, high = min(inside), max(inside)
    return (low, high) if high > low else (-1.0, 1.0)


def _stairs(axes: Axes, bins: list[Interval], key: str, color: str, name: str = "", *, fill: bool = False) -> None:
    """One level an interval [from, to); intervals where the number is null are left empty."""
    if not bins:
        return
    first, last = (float(bins[0]["from"]) or float(bins[0]["to"]) / 2), float(bins[-1]["to"])
    edges = [first, *(float(interval["from"]) for interval in bins[1:]), last]
    values = np.array([_number(interval.get(key)) for interval in bins])
    if fill:
        axes.stairs(np.where(values > 0, values, np.nan), edges, fill=True, color=color, alpha=0.6, baseline=0.5)
    else:
        axes.stairs(values, edges, color=color, linewidth=1.8, label=name or None, baseline=None)


def _count(number: int | None, of: str) -> str:
    return f"{number:,} {of}{'' if number == 1 else 's'}" if number is not None else f"? {of}s"


def _folder(evaluation: Evaluation) -> str:
    return str(PurePath(evaluation["checkpoint"] or "").parent)


def _scored(evaluation: Evaluation) -> str:
    """What tells which tokens an evaluation has scored, and what the model has seen before each."""
    settings = {key: value for key, value in evaluation["settings"].items() if key not in _ONLY_HOW}
    return repr((sorted(evaluation["data"].items(), key=str), sorted(settings.items(), key=str)))


def _differing_settings(evaluations: Sequence[Evaluation]) -> list[str]:
    """Of each evaluation the settings that are not the same in all, in words."""
    settings = [evaluation["settings"] for evaluation in evaluations]
    keys = [key for key in _NAMED if len({repr(one.get(key)) for one in settings}) > 1]
    return ["".join(f", {key} {one.get(key)}" for key in keys) for one in settings]


def _data(evaluation: Evaluation) -> str:
    """The recordings that were scored, in words."""
    data = evaluation["data"]
    chosen = data.get("source_datasets")
    split = f", split {data['split']}" if f"split {data['split']}" not in data["description"] else ""
    return shorten(data["description"], 60) + split + (f", of it {', '.join(chosen)}" if chosen else "")


def _subject(evaluation: Evaluation) -> str:
    model = "random weights" if evaluation["checkpoint"] is None else shorten(evaluation["checkpoint"], 60)
    return f"{model}, on {_data(evaluation)}"
