"""The pictures of a sweep: curves of every setting, and metrics against an axis."""

import os
import re
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gn_practical.training.evaluation.curves import read_metrics, smooth
from gn_practical.training.sweep.plan import Plan, Run
from gn_practical.training.sweep.summary import Cell, Row
from gn_practical.training.sweep.task import is_finished

_MOST_CURVES = 20
_LARGE_RANGE = 20
_UNITS = (  # by the end of a metric's name
    (r"(error|/AP\w*|/PQ\w*|/SQ\w*|/RQ\w*|/mIoU|/fwIoU|ACC)$", ", %"),
    (r"cross_entropy$", ", nats"),
    (r"^train_loss$", ": mean of the last 5 % of the iterations"),
)


def draw_pictures(plan: Plan, rows: list[Row], output: str) -> list[str]:
    """Draw ``curves.png`` and one picture for each of the plan's ``pictures``.

    Args:
        plan: of the sweep.
        rows: from :func:`gn_practical.training.sweep.summarize`.
        output: the folder.

    Returns:
        The paths of what was drawn.
    """
    paths = []
    if any(is_finished(run) for run in plan.runs):
        paths.append(os.path.join(output, "curves.png"))
        _draw_curves(plan, paths[-1])
    for picture in plan.pictures:
        name = re.sub(r"\W+", "_", f"{picture['y']}_against_{picture['x']}")
        paths.append(os.path.join(output, f"{name}.png"))
        _draw_axis(plan, rows, picture["x"], picture["y"], paths[-1])
    return paths


def _draw_curves(plan: Plan, path: str) -> None:
    """Training loss and each metric over the iterations: mean over seeds, band from min to max."""
    by_setting: dict[str, list[Run]] = {}
    for run in filter(is_finished, plan.runs):
        by_setting.setdefault(", ".join(run.setting.values()), []).append(run)
    panels = {
        name: {label: _curves(runs, name) for label, runs in by_setting.items()}
        for name in ("total_loss", *(m for m in plan.metrics if m != "train_loss"))
    }
    panels = {name: curves for name, curves in panels.items() if any(curves.values())}
    figure = Figure(figsize=(6 * max(1, len(panels)), 5), layout="constrained")
    for index, (name, by_label) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for number, (label, curves) in enumerate(list(by_label.items())[:_MOST_CURVES]):
            _draw_band(axes, curves, label, f"C{number}")
        axes.set(xlabel="iteration", ylabel=_label(plan, name))
        _scale(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", title=_names(plan, list(plan.axes)))
    seeds = _seeds([len(runs) for runs in by_setting.values()])
    figure.suptitle(f"Mean of {seeds}, smoothed; band: smallest to largest", fontsize="medium")
    figure.savefig(path, dpi=110)


def _curves(runs: list[Run], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    curves = []
    for run in runs:
        series = read_metrics(os.path.join(run.folder, "metrics.json"))
        found = [value for key, value in series.items() if key == name or key.endswith("/" + name)]
        curves += [(np.array(x), np.array(y)) for x, y in found[:1]]
    return curves


def _draw_band(
    axes: Axes, curves: list[tuple[np.ndarray, np.ndarray]], label: str, color: str
) -> None:
    if not curves:  # of this setting alone: it may have ended before the first evaluation
        return
    x = curves[0][0]
    y = np.array([smooth(np.interp(x, *curve)) for curve in curves])
    axes.plot(x, y.mean(0), color=color, label=label, marker="o" if len(x) < 12 else "")
    axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15, linewidth=0)


def _draw_axis(plan: Plan, rows: list[Row], x: str, y: str, path: str) -> None:
    """One metric against one axis, mean and standard deviation, a line for each other setting."""
    labels, others = plan.axes[x], [axis for axis in plan.axes if axis != x]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    numeric = all(_is_number(label) for label in labels)
    place: Callable[[str], float] = float if numeric else lambda label: float(labels.index(label))
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(", ".join(row.setting[axis] for axis in others), []).append(row)
    for name, chosen in lines.items():
        cells: list[Cell] = [row.cells[y] for row in chosen]
        position = [place(row.setting[x]) for row in chosen]
        spread = np.nan_to_num([cell.std for cell in cells])
        means = [cell.mean for cell in cells]
        axes.errorbar(position, means, spread, marker="o", capsize=3, label=name)
    if numeric:
        axes.set_xscale("log", base=2)
    axes.set_xticks([place(label) for label in labels], labels)
    axes.minorticks_off()
    axes.set(xlabel=_names(plan, [x]), ylabel=_label(plan, y))
    seeds = _seeds([len(row.cells[y].by_seed) for row in rows])
    axes.set_title(f"Mean of {seeds}; bars: ± one standard deviation", fontsize="medium")
    _scale(axes)
    axes.grid(alpha=0.3)
    if others:
        axes.legend(title=_names(plan, others))
    figure.savefig(path, dpi=110)


def _names(plan: Plan, axes: list[str]) -> str:
    return "; ".join(plan.labels.get(axis, axis) for axis in axes)


def _label(plan: Plan, metric: str) -> str:
    """The metric's name with its unit."""
    name = plan.labels.get(metric)
    unit = next((unit for pattern, unit in _UNITS if re.search(pattern, metric)), "")
    return name or metric + unit


def _seeds(counts: list[int]) -> str:
    """Say how many runs a mean is of: "3 seeds", or "2 to 3 seeds" where some are missing."""
    low, high = min(counts), max(counts)
    return f"{high} seed{'s' * (high != 1)}" if low == high else f"{low} to {high} seeds"


def _scale(axes: Axes) -> None:
    """Take a logarithmic scale where a failed setting would press the others into one line."""
    values = np.array([value for line in axes.lines for value in line.get_ydata()], float)
    values = values[np.isfinite(values)]
    if len(values) and 0 < values.min() < values.max() / _LARGE_RANGE:
        axes.set_yscale("log")


def _is_number(label: str) -> bool:
    try:
        return float(label) > 0
    except ValueError:
        return False
