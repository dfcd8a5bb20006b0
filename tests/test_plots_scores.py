"""Pictures of evaluations."""

import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from tests.evaluations import evaluation, group, intervals
from tests.test_plots_activity import words
from torchtitan.plots.names import distinct_names, shorten
from torchtitan.plots.scores import (
    bits_per_spike_by_source,
    calibration,
    learning_curve,
    loss_against_context,
    pictures,
)

pytestmark = pytest.mark.filterwarnings("error")


def dots(axes: Axes, label: str) -> np.ndarray:
    """The places of the dots with this label, [dots, 2]."""
    return np.asarray(next(dots for dots in axes.collections if dots.get_label() == label).get_offsets())


def levels(axes: Axes, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The values and edges of a panel's steps."""
    data = [patch.get_data() for patch in axes.patches if hasattr(patch, "get_data")][number]  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(data.values), np.asarray(data.edges)


def test_sources_are_ranked_with_their_sessions() -> None:
    sources = {"low": [0.1, 0.2], "high": [0.6, 0.8, 0.7], "none": [None], "a/b": [0.3]}
    figure = bits_per_spike_by_source(evaluation(90, sources, gain=0.44))
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["all (7 sessions)", "high (3 sessions)", "a/b (1 session)", "low (2 sessions)", "none (1 session)"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row on top
    pooled = dots(axes, "pooled, over Poisson")
    np.testing.assert_allclose(pooled[:4, 0], [0.44, 0.7, 0.3, 0.15])
    assert pooled[:, 1].tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(pooled[4, 0])
    np.testing.assert_allclose(dots(axes, "pooled, over n-gram")[:4, 0], pooled[:4, 0] - 0.2)
    assert sorted(dots(axes, "single session")[:, 0]) == pytest.approx([0.6, 0.7, 0.8])
    text = words(figure)
    for expected in ("Bits per spike", "outputs/demo/checkpoint/step-90", "recordings, split test", "no spikes"):
        assert expected in text


def test_sessions_far_off_are_at_the_edge_and_counted() -> None:
    bits: list[float | None] = [0.4, 0.45, 0.5, 0.42, 0.55, -30.0]
    figure = bits_per_spike_by_source(evaluation(90, {"demo": bits}) | {"sources": {"demo": group(0.45, 6)}})
    (axes,) = figure.axes
    assert axes.get_xlim()[0] > -1
    assert len(dots(axes, "single session")) == 5
    assert "1 session beyond the edges" in words(figure)


@pytest.mark.parametrize("number", [1, 12, 40])
def test_any_number_of_sources_has_room(number: int) -> None:
    names = [f"source {i} with a long name that goes on and on" for i in range(number)]
    figure = bits_per_spike_by_source(evaluation(90, {name: [0.1, 0.3, 0.2] for name in names}))
    words(figure)
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == number + 1
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))
    assert axes.get_window_extent().width > figure.bbox.width / 2


def test_loss_against_context_has_the_evaluations_numbers() -> None:
    figure = loss_against_context(evaluation())
    losses, bits, tokens, _ = figure.axes
    null, model = levels(losses, 0), levels(losses, 1)
    np.testing.assert_allclose(null[0], [0.15] * 5)
    np.testing.assert_allclose(model[0], [0.2, 0.19, 0.18, 0.17, 0.16])
    np.testing.assert_allclose(model[1], [0.5, 1, 2, 4, 8, 16])
    np.testing.assert_allclose(levels(bits, 0)[0], [0, 0.1, 0.2])
    np.testing.assert_allclose(levels(tokens, 0)[0], [100, 200, 300, 400, 500])
    assert tokens.get_xscale() == "log"
    text = words(figure)
    for expected in ("nats per token", "bits per spike", "tokens scored", "time (s)", "Poisson null", "model"):
        assert expected in text


def test_unknown_numbers_leave_gaps() -> None:
    bins = intervals([0, 1, 2, 4])
    bins[1] |= {"nats_per_token": None, "bits_per_spike": math.nan, "tokens": 0}
    figure = loss_against_context(evaluation(loss_by_position=bins, loss_by_time=bins))
    words(figure)
    for axes, number in zip(figure.axes, (1, 0, 0, 0), strict=True):
        assert np.isnan(levels(axes, number)[0]).tolist() == [False, True, False]


def test_calibration_compares_what_was_expected_with_what_was_seen() -> None:
    figure = calibration(evaluation())
    left, right = figure.axes
    # Counts 2 to 4 were too rare alone, and 5 has nothing behind it to join.
    expected, seen = [900, 90, 10.51], [910, 80, 20]
    dots = np.asarray(left.collections[0].get_offsets())
    np.testing.assert_allclose(dots, np.transpose([expected, seen]))
    assert [text.get_text() for text in left.texts] == ["0", "1", "2–5"]
    (container,) = right.containers
    assert isinstance(container, ErrorbarContainer)
    dots, _, (bars,) = container.lines
    np.testing.assert_allclose(np.asarray(dots.get_xydata()), [[0, 910 / 900], [1, 80 / 90], [84 / 20, 20 / 10.51]])
    np.testing.assert_allclose(np.log(bars.get_segments()[1][:, 1] / (80 / 90)), [-2 / 80**0.5, 2 / 80**0.5])
    assert (left.get_xscale(), left.get_yscale(), right.get_yscale()) == ("log", "log", "log")


def test_learning_curve_joins_the_checkpoints_of_a_run() -> None:
    steps = (270, 90, 180)
    figure = learning_curve([*(evaluation(step, gain=step / 1000) for step in steps), evaluation(None, gain=-40)])
    left, right = figure.axes
    (curve,) = [line for line in left.lines if line.get_label() == "model"]
    np.testing.assert_allclose(np.asarray(curve.get_xydata()), [[90, 0.09], [180, 0.18], [270, 0.27]])
    np.testing.assert_allclose(
        np.asarray(right.lines[0].get_ydata()), [0.1 - 0.02 * 0.09, 0.1 - 0.02 * 0.18, 0.1 - 0.02 * 0.27]
    )
    assert "outputs/demo/checkpoint, on recordings, split test" in words(figure)


def test_no_learning_curve_is_an_empty_one() -> None:
    assert "Learning curve" in words(learning_curve([]))


def test_learning_curves_of_runs_and_of_data_stay_apart() -> None:
    runs = [evaluation(step, run=run) for run in ("outputs/a", "outputs/b") for step in (1, 2)]
    figure = learning_curve(runs)
    assert {line.get_label() for line in figure.axes[0].lines} == {"Poisson null", "a", "b"}
    other = evaluation(3) | {"data": {"description": "elsewhere", "split": "test", "source_datasets": ["x"]}}
    figure = learning_curve([evaluation(1), other])
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"checkpoint on recordings, split test", "checkpoint on elsewhere, split test, of it x"} < labels


def test_learning_curves_are_told_apart_by_what_changes_scored_tokens() -> None:
    points = [evaluation(step) for step in (1, 2)]
    points[1]["settings"] |= {"batch_size": 8, "mixed_precision_param": "float32"}
    (curve,) = [line for line in learning_curve(points).axes[0].lines if line.get_marker() == "o"]
    assert np.asarray(curve.get_xdata()).tolist() == [1, 2]
    later = [evaluation(step) for step in (1, 2)]
    for point in later:
        point["settings"] |= {"min_context": 16, "overlap": True, "windows": 9}
    labels = {text.get_text() for text in learning_curve([*points, *later]).legends[0].get_texts()}
    on = "checkpoint on recordings, split test"
    assert {f"{on}, min_context 0, overlap False", f"{on}, min_context 16, overlap True"} < labels


@pytest.mark.parametrize(
    "odd",
    [
        evaluation(90, {}, gain=math.nan, loss_by_position=[], loss_by_time=[], calibration=[]),
        evaluation(None, {"demo": [None, None]}),
        evaluation(90, {"demo": [math.nan]}, calibration=[{"count": 0, "expected": math.nan, "observed": 3}]),
        evaluation(90, overall=dict.fromkeys(group(None))),
        evaluation(90, calibration=[{"count": 0, "expected": 0.0, "observed": 4}]),
        evaluation(90, calibration=[{"count": 0, "expected": 2.0, "observed": 1}]),
        evaluation(90, loss_by_position=intervals([0, 1]), loss_by_time=intervals([5, 9])),
    ],
)
def test_odd_evaluations_are_drawn_without_a_warning(odd: dict) -> None:
    figures: list[Figure] = [*pictures(odd).values(), learning_curve([odd])]
    for figure in figures:
        assert words(figure)


def test_paths_are_told_apart_by_what_differs() -> None:
    assert distinct_names(["/x/a/checkpoint", "/x/b/checkpoint"]) == ["a", "b"]
    assert distinct_names(["/x/a", "/x/a/b"]) == ["a", "a/b"]
    assert distinct_names(["runs/a/1", "runs/b/2"]) == ["a/1", "b/2"]
    assert distinct_names(["/x/a"]) == ["a"]
    assert distinct_names(["/x/a", "/x/a"]) == ["a", "a"]
    assert distinct_names([]) == []


def test_long_paths_keep_their_ends() -> None:
    assert shorten("short", 10) == "short"
    assert shorten("/a/very/long/path/of/a/run/step-9", 20) == "…/of/a/run/step-9"
    assert shorten("x" * 30, 10) == "…" + "x" * 9
