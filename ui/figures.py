"""Curves, bands and axes as the plain data that Plotly draws in the browser (`board.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .html import text
from .look import COLOURS
from .tail import Curves, Numbers

Figure = dict[str, Any]
GREY, GRID = "#808a99", "rgba(128,138,153,.25)"
SMOOTHED = 30
"""Points from which on a single curve also gets a moving average, over `SPAN` of them."""
SPAN = 9
TOTAL = "the total"


def line(curves: Curves, name: str, label: str, colour: str, scale: float = 1.0, smooth: bool = True) -> list[Figure]:
    """A curve; a long one as a faint line with its moving average on top."""
    traces = trace(curves, name, label, colour, scale)
    if not smooth or not traces or len(traces[0]["x"]) < SMOOTHED:
        return traces
    raw = {**traces[0], "line": {"color": faint(colour, 0.35), "width": 1}, "showlegend": False, "hoverinfo": "skip"}
    return [raw, {**traces[0], "y": short(smoothed(traces[0]["y"]))}]


def trace(curves: Curves, name: str, label: str, colour: str, scale: float = 1.0) -> list[Figure]:
    values = curves.mean(name) * scale
    known = ~absent(values)
    if not known.any():
        return []
    few = int(known.sum()) < 3
    return [{
        "type": "scatter", "mode": "lines+markers" if few else "lines", "name": text(label), "legendgroup": text(label),
        "x": _whole(curves.steps()[known]), "y": short(values[known]), "line": {"color": colour, "width": 2},
    }]  # fmt: skip


def band(curves: Curves, mean: str, spread: str, colour: str, group: str = TOTAL) -> list[Figure]:
    """Mean plus and minus spread, as a filled shape."""
    middle, width = curves.mean(mean), curves.mean(spread)
    return _filled(curves.steps(), middle - width, middle + width, colour, group)


def extent(curves: Curves, name: str, colour: str) -> list[Figure]:
    """From the least to the greatest value of each bucket, where a bucket holds several steps."""
    return [] if curves.width == 1 else _filled(curves.steps(), *curves.range(name), colour, name)


def _filled(steps: Numbers, low: Numbers, high: Numbers, colour: str, group: str) -> list[Figure]:
    known = ~(absent(low) | absent(high))
    if known.sum() < 2:
        return []
    x, top, bottom = _whole(steps[known]), high[known].tolist(), low[known].tolist()
    if len(x) >= SMOOTHED:
        top, bottom = smoothed(top), smoothed(bottom)
    return [{
        "type": "scatter", "mode": "lines", "x": x + x[::-1], "y": short(top) + short(bottom)[::-1], "fill": "toself",
        "fillcolor": faint(colour, 0.14), "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "legendgroup": text(group),
    }]  # fmt: skip


def figure_of(data: list[Figure], legend: bool = False) -> Figure:
    axis = {"color": GREY, "gridcolor": GRID, "zerolinecolor": GRID, "automargin": True}
    layout = {
        "uirevision": "keep",                                        # a zoom outlives new data
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8}, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": GREY, "size": 12},
        "xaxis": {**axis, **_steps_axis(data)}, "yaxis": {**axis, **_values_axis(data)}, "hovermode": "x unified", "showlegend": legend,
        "legend": {"orientation": "h", "y": -0.25, "x": 0}, "dragmode": "zoom",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _steps_axis(data: Sequence[Figure]) -> Figure:
    """Whole steps, also where there are but a few."""
    steps = [step for one in data if one["type"] == "scatter" for step in one["x"]]
    few = {"dtick": 1} if steps and max(steps) - min(steps) < 10 else {}
    return {"title": {"text": "step", "standoff": 4}, "tickformat": ",d", **few}


def _values_axis(data: Sequence[Figure]) -> Figure:
    """From 0 on where that is near; Plotly would draw what is always the same around it, down to -1."""
    values = [value for one in data if one["type"] == "scatter" for value in one["y"]]
    if not values or min(values) < 0:
        return {}
    if min(values) == max(values):
        return {"range": [0, 2 * max(values) or 1]}
    return {"rangemode": "tozero"} if min(values) < max(values) / 2 else {}


def across(value: float) -> Figure:
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": {"color": "#dc2626", "width": 1.5, "dash": "dash"}}


def smoothed(values: Sequence[float], span: int = SPAN) -> list[float]:
    """Centred moving average.

    >>> smoothed([0.0, 1.0, 2.0], 3)
    [0.5, 1.0, 1.5]
    """
    half = span // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def faint(colour: str, alpha: float) -> str:
    """
    >>> faint("#2563eb", 0.5)
    'rgba(37,99,235,0.5)'
    """
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},{alpha})"


def absent(values: Numbers) -> Any:
    return values != values


def _whole(values: Numbers) -> list[int]:
    return [int(v) for v in values.tolist()]


def short(values: Iterable[float]) -> list[float]:
    """Five digits are more than a screen shows."""
    return [float(f"{v:.5g}") for v in values]
