"""Loss, learning rate and metrics over the iterations, as one picture."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gn_practical.training.evaluation.results import flat_results

Series = tuple[list[int], list[float]]

_SMOOTHED = " (pale: as written, strong: smoothed)"
_LOSS = r"(.*/)?(loss|total_loss)[^/]*$"  # how the names of losses begin, behind a "model/"


def read_metrics(path: str) -> dict[str, Series]:
    """Read Detectron2's ``metrics.json``: scalar name → its iterations and values, ascending.

    A line that was cut off is left out, and values that are not finite. Where training began again
    at an earlier iteration, what the first run had written from there on is dropped.

    Raises:
        ValueError: if there is no such file, or no record in it.
    """
    if not os.path.isfile(path):
        raise ValueError(f"The metrics must be a file, got path={path}. Train first.")
    records: dict[int, dict[str, Any]] = {}
    last_step = -1
    with open(path, encoding="utf-8") as f:
        for record in filter(None, map(_parse, f)):
            iteration = record.pop("iteration")
            if "total_loss" in record:  # other records may come out of order within one run
                if iteration <= last_step:
                    records = {i: r for i, r in records.items() if i < iteration}
                last_step = iteration
            records.setdefault(iteration, {}).update(record)
    if not records:
        raise ValueError(f"The metrics must hold a record, got none in path={path}. Train first.")
    series: dict[str, Series] = defaultdict(lambda: ([], []))
    for iteration, record in sorted(records.items()):
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series[name][0].append(iteration)
                series[name][1].append(value)
    return dict(series)


def plot_metrics(metrics_json_path: str, output_png: str) -> None:
    """Draw the curves of a run: losses (raw and smoothed), learning rate, each task's metrics.

    The tasks and metrics are those of ``results.json`` in the same folder; those of single classes
    are left out. A task that was evaluated once has bars.

    Raises:
        ValueError: as :func:`read_metrics`.

    Example:
        >>> plot_metrics("output/metrics.json", "output/curves.png")  # doctest: +SKIP
    """
    series = read_metrics(metrics_json_path)
    panels = [
        (f"training loss{_SMOOTHED}", _draw_smoothed, _named(series, _LOSS)),
        ("learning rate", _draw_lines, _named(series, "lr$")),
        (f"training error{_SMOOTHED}", _draw_smoothed, _named(series, "train_error$")),
    ]
    for task, curves in _evaluated(series, metrics_json_path).items():
        once = all(len(values) == 1 for _, values in curves.values())
        panels.append((task, _draw_bars if once else _draw_lines, curves))
    _draw([panel for panel in panels if panel[2]], output_png)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "iteration" in record else None


def _named(series: dict[str, Series], pattern: str) -> dict[str, Series]:
    return {name: curve for name, curve in series.items() if re.match(pattern, name)}


def _evaluated(series: dict[str, Series], metrics_json_path: str) -> dict[str, dict[str, Series]]:
    """Task → metric → its curve, as far as ``results.json`` names them."""
    path = Path(metrics_json_path).with_name("results.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tasks: dict[str, dict[str, Series]] = defaultdict(dict)
    for task, metric, _ in flat_results(results):
        if f"{task}/{metric}" in series:
            tasks[task][metric] = series[f"{task}/{metric}"]
    return tasks


def _draw(panels: list[tuple[str, Callable[..., None], dict[str, Series]]], path: str) -> None:
    columns = min(3, len(panels)) or 1
    rows = math.ceil(len(panels) / columns) or 1
    figure = Figure(figsize=(6.5 * columns, 5 * rows), layout="constrained")
    for index, (title, draw, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, index, title=title)
        axes.grid(alpha=0.3)
        draw(axes, curves)
        if len(curves) > 1 and axes.get_legend_handles_labels()[0]:  # below: it hides nothing
            axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_smoothed(axes: Axes, curves: dict[str, Series]) -> None:
    order = sorted(curves, key=lambda name: (name != "total_loss", name))
    for index, name in enumerate(order):
        iterations, values = curves[name]
        color = "black" if index == 0 else f"C{index - 1}"
        axes.plot(iterations, values, color=color, alpha=0.35, linewidth=0.8)
        axes.plot(iterations, smooth(values), color=color, label=name, linewidth=1.6)
    _from_zero(axes)


def _draw_lines(axes: Axes, curves: dict[str, Series]) -> None:
    for name, (iterations, values) in curves.items():
        style = {"marker": "o", "markersize": 4} if len(values) < 200 else {}
        axes.plot(iterations, values, label=f"{name}: {values[-1]:.3g}", **style)
    _from_zero(axes)


def _draw_bars(axes: Axes, curves: dict[str, Series]) -> None:
    names = list(curves)
    bars = axes.barh(names, [curves[name][1][0] for name in names])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.1)  # room for the numbers
    axes.invert_yaxis()  # the first on top
    axes.set_xlabel(f"after iteration {curves[names[0]][0][0]}")


def _from_zero(axes: Axes) -> None:
    axes.set_xlabel("iteration")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=min(0, axes.dataLim.y0))


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centred mean over a twentieth of the curve: it does not lag behind as a running mean does."""
    window = np.ones(1 + 2 * (len(values) // 40))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
