"""Curves and groups of runs over each other, as Bokeh's figures that a browser draws."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, Glyph, GlyphRenderer, HoverTool, Line, Scatter
from bokeh.palettes import Category10, Category20
from bokeh.plotting import figure

from gn_practical.training.comparison.runs import Run
from gn_practical.training.evaluation.curves import smooth

MOST_POINTS = 1000  # of a curve; of a longer one the extremes of as many stretches are drawn
MOST_IN_DETAIL = 6  # runs; of more a chart has one line each: the smoothed loss, no dots
_GREY = "#808080"  # is read on white and on black
_DASHES = ("solid", "dashed", "dotted", "dotdash")
_SIZE = {"width": 560, "height": 320}


@dataclass
class Chart:
    """A figure for the page; ``item`` is what BokehJS draws it from."""

    title: str
    item: dict[str, Any]
    is_shortened: bool = False


def colors(number: int) -> list[str]:
    """Return a colour for each run."""
    palette = Category10[10] if number <= 10 else Category20[20]
    return [palette[index % len(palette)] for index in range(number)]


def curve_chart(title: str, runs: list[Run], name: str, smoothed: bool = False) -> Chart | None:
    """Draw one scalar of all runs over the iterations; None if no run has it."""
    plot = _figure(title, "iteration")
    plot.add_tools(_hover([("iteration", "@x{0}"), (name, "@y{0.0000[00]}")]))
    drawn, shortened, is_crowded = [], False, len(runs) > MOST_IN_DETAIL
    for index, (run, color) in enumerate(zip(runs, colors(len(runs)), strict=True)):
        if name not in run.curves:
            continue
        iterations, values = (np.asarray(part) for part in run.curves[name])
        shortened |= len(values) > MOST_POINTS
        style = {"line_color": color, "line_dash": _DASHES[index // 20 % len(_DASHES)]}
        points = extremes(iterations, values)
        glyphs = []
        if smoothed:
            means = smooth_long(iterations, values)
            glyphs.append((means, Line(x="x", y="y", **style, line_width=2)))
            style |= {"line_alpha": 0.3}
        if not smoothed or not is_crowded:
            glyphs.insert(0, (points, Line(x="x", y="y", **style, line_width=1 if smoothed else 2)))
        if not smoothed and (len(values) == 1 or (len(values) < 60 and not is_crowded)):
            glyphs.append((points, _dots(color, 6)))
        for (x, y), glyph in glyphs:
            drawn.append(_add(plot, run, index, {"x": x, "y": y}, glyph))
    return Chart(title, json_item(plot), shortened) if drawn else None


def groups_chart(runs: list[Run], rows: dict[str, list[int | None]]) -> Chart | None:
    """Draw the groups of every layer, in the order of the model."""
    plot = _figure("groups per layer", "layer", y_axis_type="log")
    plot.add_tools(_hover([("layer", "@layer"), ("groups", "@y")]))
    points = 0
    for index, (run, color) in enumerate(zip(runs, colors(len(runs)), strict=True)):
        found = [(x, row[index], norm) for x, (norm, row) in enumerate(rows.items()) if row[index]]
        if found:
            x, y, layers = (list(part) for part in zip(*found, strict=True))
            data = {"x": x, "y": y, "layer": layers}
            _add(plot, run, index, data, _dots(color, 6 + 2 * (len(runs) - index) % 8))
            points += len(found)
    return Chart("groups per layer", json_item(plot)) if points else None


def extremes(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shorten a curve to the smallest and largest value of each stretch, and its two ends.

    So a spike of one iteration stays, which a mean or every n-th point would hide.
    """
    if len(values) > MOST_POINTS:
        stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2 - 1)
        kept = {0, len(values) - 1}
        for stretch in stretches:
            part = values[stretch]
            kept |= {int(stretch[part.argmin()]), int(stretch[part.argmax()])}
        order = np.array(sorted(kept))
        iterations, values = iterations[order], values[order]
    return iterations.astype(np.int32), values.astype(np.float32)


def smooth_long(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooth a curve as ``curves.png`` does; a long one by the means of stretches."""
    if len(values) > MOST_POINTS:
        stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2)
        iterations = np.array([iterations[s].mean() for s in stretches])
        values = np.array([values[s].mean() for s in stretches])
    return iterations.astype(np.float32), smooth(values).astype(np.float32)


def _figure(title: str, x_label: str, **options: Any) -> figure:
    tools = "pan,box_zoom,wheel_zoom,reset,save"
    plot = figure(title=title, x_axis_label=x_label, tools=tools, **_SIZE, **options)
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = None
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = plot.title.text_color = _GREY
    for axis in plot.axis:
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = _GREY
        axis.axis_label_text_color = axis.major_label_text_color = _GREY
    plot.grid.grid_line_color = _GREY
    plot.grid.grid_line_alpha = 0.25
    return plot


def _hover(columns: list[tuple[str, str]]) -> HoverTool:
    return HoverTool(tooltips=[("run", "$name"), *columns])


def _dots(color: str, size: int) -> Scatter:
    return Scatter(x="x", y="y", size=size, line_color=color, fill_color=color, fill_alpha=0.7)


def _add(plot: figure, run: Run, index: int, data: dict[str, Any], glyph: Glyph) -> GlyphRenderer:
    """Add a glyph by itself: ``plot.line`` makes four more for selections, which take the time."""
    return plot.add_glyph(ColumnDataSource(data), glyph, name=run.name, tags=[index])
