"""The pictures of a sweep: curves of every setting, and metrics against an axis."""

import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gn_practical.training.evaluation.curves import Series, read_metrics, smooth
from gn_practical.training.sweep.plan import Plan
from gn_practical.training.sweep.task import is_finished

_MOST_CURVES = 20
_LARGE_RANGE = 20
_UNITS = (  # by the end of a metric's name
    (r"(error|/AP\w*|/PQ\w*|/SQ\w*|/RQ\w*|/mIoU|/fwIoU|ACC)$", ", %"),
    (r"cross_entropy$", ", nats"),
    (r"^train_loss$", ": mean of the last 5 % of the iterations"),
)


def draw_pictures(plan: Plan, rows: list[dict[str, Any]], output: str) -> list[str]:
    """Draw ``curves.png`` and the plan's ``pictures`` of the summary's rows; return their paths."""
    paths = [os.path.join(output, "curves.png")]
    _draw_curves(plan, paths[0])
    for picture in plan.pictures:
        name = re.sub(r"\W+", "_", f"{picture['y']}_against_{picture['x']}")
        paths.append(os.path.join(output, f"{name}.png"))
        _draw_axis(plan, rows, picture["x"], picture["y"], paths[-1])
    return paths


def _draw_curves(plan: Plan, path: str) -> None:
    """Training loss and each metric over the iterations: mean over seeds, band from min to max."""
    by_setting: dict[str, list[dict[str, Series]]] = {}
    for run in filter(is_finished, plan.runs):
        series = read_metrics(os.path.join(run.folder, "metrics.json"))
        by_setting.setdefault(", ".join(run.setting.values()), []).append(series)
    metrics = ("total_loss", *(m for m in plan.metrics if m != "train_loss"))
    panels = {
        name: {label: _curves(runs, name) for label, runs in by_setting.items()} for name in metrics
    }
    panels = {name: curves for name, curves in panels.items() if any(curves.values())}
    figure = Figure(figsize=(6 * max(1, len(panels)), 5), layout="constrained")
    for index, (name, by_label) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for number, (label, curves) in enumerate(list(by_label.items())[:_MOST_CURVES]):
            if curves:  # a setting may have ended before the first evaluation
                _draw_band(axes, curves, label, f"C{number}")
        axes.set(xlabel="iteration", ylabel=_label(plan, name))
        axes.legend(fontsize="small", title=_names(plan, list(plan.axes)))
    title = f"Mean of {_seeds(map(len, by_setting.values()))}, smoothed; band: smallest to largest"
    _save(figure, title, path)


def _curves(runs: list[dict[str, Series]], name: str) -> list[Series]:
    found = ([key for key in series if f"/{key}".endswith(f"/{name}")] for series in runs)
    return [series[keys[0]] for series, keys in zip(runs, found, strict=True) if keys]


def _draw_band(axes: Axes, curves: list[Series], label: str, color: str) -> None:
    x = curves[0][0]
    y = np.array([smooth(np.interp(x, *curve)) for curve in curves])
    axes.plot(x, y.mean(0), color=color, label=label, marker="o" if len(x) < 12 else "")
    axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)


def _draw_axis(plan: Plan, rows: list[dict[str, Any]], x: str, y: str, path: str) -> None:
    """One metric against one axis, mean and standard deviation, a line for each other setting."""
    labels, others = plan.axes[x], [axis for axis in plan.axes if axis != x]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=_names(plan, [x]), ylabel=_label(plan, y))
    place = {label: float(index) for index, label in enumerate(labels)}
    if all(map(_is_number, labels)):
        place = {label: float(label) for label in labels}
        axes.set_xscale("log", base=2)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(", ".join(row["setting"][axis] for axis in others), []).append(row)
    for name, chosen in lines.items():
        position = [place[row["setting"][x]] for row in chosen]
        means = [row["metrics"][y]["mean"] for row in chosen]
        spread = np.nan_to_num([row["metrics"][y]["std"] for row in chosen])
        axes.errorbar(position, means, spread, marker="o", capsize=3, label=name)
    axes.set_xticks(list(place.values()), labels)
    axes.minorticks_off()
    if others:
        axes.legend(title=_names(plan, others))
    seeds = _seeds(len(row["metrics"][y]["by_seed"]) for row in rows)
    _save(figure, f"Mean of {seeds}; bars: ± one standard deviation", path)


def _save(figure: Figure, title: str, path: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        # A failed setting would press the others into one line.
        values = np.array([value for line in axes.lines for value in line.get_ydata()], float)
        values = values[np.isfinite(values)]
        if len(values) and 0 < values.min() < values.max() / _LARGE_RANGE:
            axes.set_yscale("log")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)


def _names(plan: Plan, axes: list[str]) -> str:
    return "; ".join(plan.labels.get(axis, axis) for axis in axes)


def _label(plan: Plan, metric: str) -> str:
    """The metric's name with its unit."""
    unit = next((unit for pattern, unit in _UNITS if re.search(pattern, metric)), "")
    return plan.labels.get(metric) or metric + unit


def _seeds(counts: Iterable[int]) -> str:
    """Say how many runs a mean is of: "3 seeds", or "2 to 3 seeds" where some are missing."""
    counts = list(counts)
    low, high = min(counts), max(counts)
    return f"{high} seed{'s' * (high != 1)}" if low == high else f"{low} to {high} seeds"


def _is_number(label: str) -> bool:
    try:
        return float(label) > 0
    except ValueError:
        return False
