"""Line charts for the report: SVG to stand inside an HTML page, in the page's own text color."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

# Readable on a white and on a black page.
COLORS = ("#3b82f6", "#12a594", "#8a9a1b", "#e5850b", "#e0527a", "#9b6bdf")
# Matplotlib does not know `currentColor`, so it draws in this color, which is replaced.
_TEXT_COLOR = "#010203"
_MAX_POINTS = 1000
# Values further apart than this factor are shown on a logarithmic axis.
_LOG_RATIO = 30
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # also that with dollar signs
    "font.size": 9.5,
    "axes.formatter.limits": (-3, 4),
    **{f"{name}.color": _TEXT_COLOR for name in ("text", "xtick", "ytick")},
    "axes.labelcolor": _TEXT_COLOR,
    "axes.edgecolor": _TEXT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Points = Sequence[tuple[float, float]]


def line_chart(
    series: Mapping[str, Points], *, x_label: str, size: tuple[float, float], name: str
) -> str:
    """An `<svg>` element.

    Args:
      series: label -> (x, y) points, at least one, finite. Long series are averaged down.
      size: width and height in inches of 72 pixels; the page scales it.
      name: of this chart, unlike any other's on the page: keeps ids inside the SVG apart.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for i, (label, points) in enumerate(series.items()):
            x, y = _thinned(points)
            marker = "o" if len(x) < 12 else None
            color = COLORS[i % len(COLORS)]
            axes.plot(x, y, color=color, linewidth=1.5, marker=marker, markersize=3, label=label)
        values = [y for points in series.values() for _, y in points]
        if min(values) > 0 and max(values) > _LOG_RATIO * min(values):
            _set_log_scale(axes, "{x:g}", is_wide=max(values) > 1000 * min(values))
        elif max(values) >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if len(series) > 1:
            figure.legend(
                loc="outside upper left", ncols=6, frameon=False, handlelength=1, columnspacing=1
            )
        _finish(axes, x_label)
        return _svg(figure)


def histogram(
    values: Sequence[float], *, x_label: str, size: tuple[float, float], name: str
) -> str:
    """An `<svg>` element: how many of the values, at least one, lie where; else as `line_chart`."""
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    # Whole numbers, where there are few, have a bar each.
    is_whole = bool((values == values.round()).all()) and high - low < 40
    edges = np.arange(low - 0.5, high + 1) if is_whole else np.linspace(low, max(high, low + 1), 31)
    counts, _ = np.histogram(values, edges)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.stairs(counts, edges, fill=True, color=COLORS[0])
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _finish(axes, x_label)
        return _svg(figure)


def counts_chart(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    *,
    x_label: str,
    size: tuple[float, float],
    name: str,
) -> str:
    """An `<svg>` element: how many of each kind, one above the other, lie between which edges, all
    equally far apart; else as `line_chart`."""
    places = np.arange(len(edges))
    below = np.zeros(len(edges) - 1)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for color, (label, values) in zip(COLORS[::3], counts.items(), strict=False):
            axes.bar(places[:-1] + 0.5, values, 0.9, below, color=color, label=label)
            below = below + values
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        figure.legend(
            loc="outside upper left", ncols=6, frameon=False, handlelength=1, columnspacing=1
        )
        _finish(axes, x_label)
        shown = places[:: -(-len(edges) // 12)]
        axes.set_xticks(shown, [f"{edges[i]:g}" for i in shown])
        return _svg(figure)


def usage_chart(counts: np.ndarray, *, size: tuple[float, float], name: str) -> str:
    """An `<svg>` element: how often each code is used, (n_codes,) counts, most used code first.

    In multiples of the mean, on a logarithmic axis; codes that are never used leave a gap.
    """
    uses = np.sort(counts)[::-1] / counts.mean()
    n_used = np.count_nonzero(uses)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.step(np.arange(n_used), uses[:n_used], where="mid", color=COLORS[0], linewidth=1.5)
        axes.axhline(1, color=_TEXT_COLOR, alpha=0.5, linewidth=1, linestyle="--")
        _set_log_scale(axes, "{x:g} ×", is_wide=True)
        axes.set_xlim(0, len(uses))
        _finish(axes, "codes, most used first")
        return _svg(figure)


def _thinned(points):
    """x and y, averaged within bins where there are more than an eye can tell apart."""
    points_N2 = np.asarray(points, np.float64)
    bins = np.array_split(points_N2, min(len(points_N2), _MAX_POINTS))
    return np.stack([b.mean(axis=0) for b in bins]).T


def _set_log_scale(axes, tick_format, is_wide):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(tick_format)


def _finish(axes, x_label):
    axes.grid(axis="y", color=_TEXT_COLOR, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(length=0)
    axes.set_xlabel(x_label)


def _svg(figure):
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()  # without the XML declaration and document type
    # HTML knows the namespaces, and groups of all charts would have the same ids.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return svg.replace(_TEXT_COLOR, "currentColor")
