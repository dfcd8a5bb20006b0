"""Pictures of recorded and generated activity."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchtitan.plots import spikes, style
from torchtitan.plots.activity import MAX_PANELS, Activity, population_rate, raster, statistics

pytestmark = pytest.mark.filterwarnings("error")
RANDOM = np.random.default_rng(0)


def poisson(num_neurons: int, num_bins: int, rate: float = 0.3) -> np.ndarray:
    return RANDOM.poisson(rate, (num_neurons, num_bins)).astype(np.uint8)


def continuations(num_neurons: int, num_bins: int, samples: int = 2, rate: float = 0.3) -> list[Activity]:
    names = ["recorded", *(f"sample {i}" for i in range(samples))]
    return [Activity(name, poisson(num_neurons, num_bins, rate)) for name in names]


def words(figure: Figure) -> str:
    """All text in the figure, which is laid out and drawn first, all but the pixels."""
    figure.draw_without_rendering()
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))  # pyright: ignore[reportAttributeAccessIssue]


def spikes_drawn(axes: Axes) -> list[tuple[np.ndarray, tuple[float, ...]]]:
    """Opacity and extent of each image in a panel."""
    return [(np.asarray(image.get_array())[..., 3], tuple(image.get_extent())) for image in axes.images]


def test_raster_has_a_panel_a_continuation_on_one_time_axis() -> None:
    figure = raster(poisson(30, 100), continuations(30, 150), title="row 7")
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert axes.get_xlim() == pytest.approx((-2, 3))
        assert any(np.array_equal(line.get_xdata(), [0, 0]) for line in axes.lines)
    text = words(figure)
    for expected in ("row 7", "prompt", "recorded", "generated: sample 1", "neuron", "time since the end", "(s)"):
        assert expected in text


def test_raster_shows_every_spike_where_it_belongs() -> None:
    prompt, continuation = np.zeros((40, 100), np.uint8), np.zeros((40, 120), np.uint8)
    prompt[7, [3, 99]] = [1, 5]
    prompt[9, 50] = 1
    continuation[[7, 9, 0], [0, 119, 60]] = 1
    (axes,) = raster(prompt, [Activity("sample 0", continuation)], title="").axes
    (left, left_extent), (right, right_extent) = spikes_drawn(axes)
    assert left_extent[:2] == pytest.approx((-2, 0))
    assert right_extent[:2] == pytest.approx((0, 2.4))
    # Sorted by rate in the prompt: 7, 9, then the silent ones in their own order; a row may be several pixels high.
    height = len(left) // 40
    assert np.flatnonzero(left[:height].any(axis=0)).tolist() == [3, 99]
    assert np.flatnonzero(left[height : 2 * height].any(axis=0)).tolist() == [50]
    assert not left[2 * height :].any()
    found = {(row // height, column) for row, column in np.argwhere(right)}
    assert found == {(0, 0), (1, 119), (2, 60)}
    assert left[:, 99].max() > left[:, 3].max() > 0.3


def test_raster_draws_many_bins_together_and_loses_none() -> None:
    prompt, continuation = np.zeros((300, 3000), np.uint8), np.zeros((300, 3001), np.uint8)
    prompt[RANDOM.permutation(300)[:50], RANDOM.permutation(3000)[:50]] = 1
    continuation[5, 3000] = 1
    (axes,) = raster(prompt, [Activity("recorded", continuation)], title="").axes
    (left, left_extent), (right, right_extent) = spikes_drawn(axes)
    assert max(left.shape[1], right.shape[1]) < 800
    assert (left > 0).sum() == 50
    assert (right > 0).sum() == 1
    assert left_extent[1] == 0
    assert right_extent[0] == 0
    assert right_extent[1] >= 3001 * 0.02


def test_raster_cuts_a_long_prompt_and_says_so() -> None:
    figure = raster(poisson(5, 1000), continuations(5, 100), title="")
    assert figure.axes[0].get_xlim() == pytest.approx((-2, 2))
    assert "prompt (its last 2 s)" in words(figure)


def test_raster_says_what_it_leaves_out() -> None:
    figure = raster(poisson(5, 50), continuations(5, 50, samples=MAX_PANELS + 1), title="")
    assert len(figure.axes) == MAX_PANELS
    assert "2 further continuations" in words(figure)


def test_colors_tell_recorded_from_generated() -> None:
    figure = raster(poisson(5, 50), continuations(5, 50, samples=1), title="")
    colors = [[tuple(np.asarray(image.get_array())[0, 0, :3]) for image in axes.images] for axes in figure.axes]
    assert colors[0][0] == colors[0][1] == colors[1][0] != colors[1][1]
    lines = {
        str(line.get_label()): line.get_color()
        for line in population_rate(poisson(5, 50), continuations(5, 50, samples=1), title="").axes[0].lines
    }
    assert (lines["recorded"], lines["generated"]) == (style.RECORDED, style.GENERATED)


def test_population_rate_is_the_smoothed_one() -> None:
    prompt, (recorded, sample) = poisson(6, 80), continuations(6, 90, samples=1)
    (axes,) = population_rate(prompt, [recorded, sample], title="row 7").axes
    lines = {str(line.get_label()): line for line in axes.lines}
    for activity, label, first in ((recorded, "recorded", 0), (sample, "generated", 80)):
        whole = np.hstack([prompt, activity.counts])
        np.testing.assert_allclose(
            np.asarray(lines[label].get_ydata()), spikes.population_rates(whole, 0.02, 3)[first:]
        )
        np.testing.assert_allclose(np.asarray(lines[label].get_xdata()), (np.arange(first, 170) - 79.5) * 0.02)


def test_population_rate_of_samples_is_drawn_with_their_mean() -> None:
    figure = population_rate(poisson(6, 80), continuations(6, 70, samples=4), title="row 7")
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
    each = [values for name, values in lines.items() if len(values) == 70 and "mean" not in name]
    assert len(each) == 4
    np.testing.assert_allclose(lines["generated, mean of 4"], np.mean(each, axis=0))
    text = words(figure)
    for expected in ("row 7", "prompt", "recorded", "mean of 4", "(Hz)", "60 ms"):
        assert expected in text


def test_statistics_are_distributions_above_and_comparisons_below() -> None:
    real, generated = poisson(12, 400), [poisson(12, 400) for _ in range(3)]
    figure = statistics(real, generated, title="row 7")
    assert len(figure.axes) == 6
    computed: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda counts: spikes.firing_rates(counts, 0.02),
        lambda counts: spikes.inter_spike_intervals(counts, 0.02)[1],
        spikes.pair_correlations,
    ]
    for axes, of in zip(figure.axes[:3], computed, strict=True):
        recorded, *each, together = axes.lines
        assert len(each) == 3
        for line, values in (
            (recorded, of(real)),
            (each[1], of(generated[1])),
            (together, np.concatenate([of(counts) for counts in generated])),
        ):
            for quantile in (0.25, 0.5, 0.8):
                x = np.sort(values)[int(quantile * len(values))]
                share = np.asarray(line.get_ydata())[np.asarray(line.get_xdata()) <= x].max()
                assert share == pytest.approx((values <= x).mean())
    dots = np.asarray(figure.axes[3].collections[0].get_offsets())
    np.testing.assert_allclose(dots[:, 0], spikes.firing_rates(real, 0.02))
    np.testing.assert_allclose(dots[:, 1], spikes.firing_rates(np.hstack(generated), 0.02))
    dots = np.asarray(figure.axes[5].collections[0].get_offsets())
    assert len(dots) == 66
    np.testing.assert_allclose(dots[:, 0], spikes.pair_correlations(real))
    text = words(figure)
    for expected in ("row 7", "Firing rates", "(Hz)", "interval (s)", "bins of 20 ms", "12 neurons", "66 pairs, r ="):
        assert expected in text


def test_statistics_without_a_real_continuation() -> None:
    figure = statistics(None, [poisson(12, 100)], title="")
    assert len(figure.axes) == 3
    assert "recorded" not in {text.get_text() for text in figure.legends[0].get_texts()}
    assert len(statistics(np.zeros((12, 0), np.uint8), [poisson(12, 100)], title="").axes) == 3


def test_statistics_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="neither recorded nor generated"):
        statistics(None, [], title="")


@pytest.mark.parametrize(
    ("num_neurons", "prompt_bins", "num_bins", "rate", "samples"),
    [(1, 50, 50, 0.3, 2), (30, 50, 50, 0.0, 1), (30, 1, 1, 0.3, 2), (30, 0, 20, 0.3, 1), (30, 50, 0, 0.3, 1),
     (1, 1, 1, 0.0, 0), (30, 100, 100, 0.005, 3), (2, 20, 20, 100.0, 1), (320, 100, 100, 0.3, 1)],
)  # fmt: skip
def test_odd_sizes_are_drawn_without_a_warning(
    num_neurons: int, prompt_bins: int, num_bins: int, rate: float, samples: int
) -> None:
    prompt = poisson(num_neurons, prompt_bins, rate)
    following = continuations(num_neurons, num_bins, samples, rate)
    assert "prompt" in words(raster(prompt, following, title="title"))
    assert "prompt" in words(population_rate(prompt, following[1:], title="title"))
    if num_bins:
        words(statistics(following[0].counts, [activity.counts for activity in following[1:]], title="title"))


def test_long_titles_are_wrapped() -> None:
    title = " ".join(["a recording with a long name"] * 12)
    figure = raster(poisson(5, 50), [], title=title)
    style.to_png(figure)
    suptitle = figure.get_suptitle()
    assert title == " ".join(suptitle.split("\n")[1:])
    box = figure.findobj(lambda artist: getattr(artist, "get_text", str)() == suptitle)[0].get_window_extent()
    assert box.x1 < figure.bbox.x1


def test_a_single_bin_is_a_dot_and_its_rates_have_a_scale() -> None:
    following = continuations(30, 1)
    axes = population_rate(poisson(30, 2), following, title="").axes[0]
    assert [line.get_marker() for line in axes.lines[-3:]] == ["o"] * 3
    compared = statistics(following[0].counts, [10 * activity.counts for activity in following[1:]], title="").axes[3]
    assert compared.get_xlim() == compared.get_ylim()
    assert len(compared.get_xticks()) == len(compared.get_yticks()) > 1
    silent = np.zeros((3, 1), np.uint8)
    rates = statistics(silent, [silent], title="").axes[3]
    assert rates.get_xticks().tolist() == [0, 50]
