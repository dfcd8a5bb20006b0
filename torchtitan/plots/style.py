"""What all pictures share: sizes, colours, titles, legends, and how one becomes a PNG."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

RECORDED = "#0072B2"
"""Whatever was recorded; this and the other colours are from Okabe and Ito's palette, https://jfly.uni-koeln.de/color."""
GENERATED = "#D55E00"
"""Whatever comes from the model: samples, predictions, scores."""
NULL = "#7A7A7A"
"""Baselines, and marks that are not data."""
QUIET = "#444444"
"""Captions."""
SHADE = "#EDEDED"
"""The time of the prompt."""
SERIES = ("#000000", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
"""Runs, in their order; `series` adds line styles for more of them."""
LINES = ("-", "--", ":", "-.")

WIDTH = 10.0
"""Of every figure, inches."""
DPI = 120
SMALL, MEDIUM, LARGE = 9, 10.5, 12.5
"""Points: what explains, labels, titles."""
LINE_LENGTH = 100
"""Letters of a title's line."""
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "handlelength": 1.6}


def new_figure(height: float, kind: str, subject: str, caption: str = "") -> Figure:
    """An empty figure.

    Args:
        height: inches.
        kind: what is shown, the title's first line.
        subject: of which recording, checkpoint, or run; its second line.
        caption: how to read it, below the panels.
    """
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    title = "\n".join(textwrap.wrap(kind, LINE_LENGTH) + textwrap.wrap(subject, LINE_LENGTH))
    figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE)
    if caption:
        figure.supxlabel("\n".join(textwrap.wrap(caption, 150)), x=0.01, ha="left", fontsize=SMALL, color=QUIET)
    return figure


def dress(axes: Axes, x_label: str = "", y_label: str = "", title: str = "") -> Axes:
    """The look of a panel: two spines, light grid lines behind the data, and its labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel(x_label, fontsize=MEDIUM)
    axes.set_ylabel(y_label, fontsize=MEDIUM)
    if title:
        axes.set_title(title, loc="left", fontsize=MEDIUM)
    return axes


def legend_above(axes: Axes, *, right: bool = False) -> None:
    """A legend in one row above the panel, where no data are, at its left or right end."""
    place, corner = ("lower right", (1, 1)) if right else ("lower left", (0, 1))
    columns = len(axes.get_legend_handles_labels()[0])
    if columns:
        axes.legend(loc=place, bbox_to_anchor=corner, ncols=columns, borderaxespad=0.2, columnspacing=1.2, **LEGEND)


def legend_below(figure: Figure, handles: Sequence[Artist], caption: str = "") -> None:
    """A legend below all panels, under a caption, which `new_figure` cannot hold as well."""
    title = {"title": caption or None, "title_fontsize": SMALL, "alignment": "left"}
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=4, **title, **LEGEND)
    legend.get_title().set_color(QUIET)


def log_scale(axes: Axes, which: str, most_ticks: int = 7) -> None:
    """Makes the axis "x" or "y" logarithmic, with ticks that are plain numbers also where it spans no whole decade."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    if 0 < low < high < 4 * low:
        axis.set_major_locator(MaxNLocator(most_ticks - 1))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=most_ticks))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())


def plain(number: float) -> str:
    """A tick's label: 0.002, 1,000, 20 M for millions."""
    if abs(number) >= 1e6:
        return f"{number / 1e6:,g} M"
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:g}"


PLAIN = FuncFormatter(lambda value, _: plain(value))


def count_steps(axes: Axes) -> None:
    """A horizontal axis of steps: ticks at whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(PLAIN)


def series(index: int) -> dict[str, Any]:
    """Colour and line style of the run with this number: twenty can be told apart."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": LINES[index // len(SERIES) % len(LINES)]}


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG; the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Writes the figure as a PNG, and the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_png(figure))
