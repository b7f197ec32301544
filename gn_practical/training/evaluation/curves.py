"""Loss, learning rate and metrics over the iterations, as one picture."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Series = tuple[list[int], list[float]]

_METRICS = ("PQ", "PQ_th", "PQ_st", "AP", "AP50", "mIoU", "error")
_TASKS = {
    "panoptic_seg": "",
    "bbox": "box ",
    "segm": "mask ",
    "keypoints": "keypoint ",
    "sem_seg": "",
    "classification": "",
}


def read_metrics(path: str) -> dict[str, Series]:
    """Read Detectron2's ``metrics.json`` (one JSON object a line).

    A line that was cut off is left out. Where training began again at an earlier iteration, what
    the first run had written from there on is dropped.

    Args:
        path: the file.

    Returns:
        Scalar name → its iterations and values, in ascending order; values that are not finite
        are left out.

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
    return _series(records)


def plot_metrics(metrics_json_path: str, output_png: str) -> None:
    """Draw the curves of a run: losses (raw and smoothed), learning rate, evaluation metrics.

    Args:
        metrics_json_path: ``metrics.json`` in a run's OUTPUT_DIR.
        output_png: the picture to write.

    Raises:
        ValueError: as :func:`read_metrics`.

    Example:
        >>> plot_metrics("output/metrics.json", "output/curves.png")  # doctest: +SKIP
    """
    series = read_metrics(metrics_json_path)
    losses = {k: v for k, v in series.items() if k == "total_loss" or _is_partial_loss(k)}
    metrics = {_metric_title(k): v for k, v in series.items() if _metric_title(k)}
    rates = {"lr": series["lr"]} if "lr" in series else {}
    panels = [
        (draw, curves)
        for draw, curves in ((_draw_losses, losses), (_draw_rate, rates), (_draw_metrics, metrics))
        if curves
    ]
    figure = Figure(figsize=(6.5 * max(1, len(panels)), 5), layout="constrained")
    for index, (draw, curves) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        draw(axes, curves)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    os.makedirs(os.path.dirname(output_png) or ".", exist_ok=True)
    figure.savefig(output_png, dpi=110)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "iteration" in record else None


def _series(records: dict[int, dict[str, Any]]) -> dict[str, Series]:
    series: dict[str, Series] = defaultdict(lambda: ([], []))
    for iteration in sorted(records):
        for name, value in records[iteration].items():
            # NaN - NaN and inf - inf are NaN: only finite numbers pass
            if isinstance(value, (int, float)) and value - value == 0:
                series[name][0].append(iteration)
                series[name][1].append(value)
    return dict(series)


def _is_partial_loss(name: str) -> bool:
    return name.startswith("loss") or (name.rpartition("/")[2].startswith("loss"))


def _metric_title(name: str) -> str | None:
    """Turn "coco/bbox/AP" into "coco box AP"; None for what is not one of the main metrics."""
    if name == "train_error":  # of a classifier, batch by batch
        return "training error"
    *dataset, task, metric = name.split("/") if "/" in name else ("", name)
    if task not in _TASKS or metric not in _METRICS:
        return None
    return " ".join([*dataset, _TASKS[task] + metric])


def _draw_losses(axes: Axes, curves: dict[str, Series]) -> None:
    order = sorted(curves, key=lambda name: (name != "total_loss", name))
    for index, name in enumerate(order):
        iterations, values = curves[name]
        color = "black" if name == "total_loss" else f"C{index - 1}"
        axes.plot(iterations, values, color=color, alpha=0.35, linewidth=0.8)
        axes.plot(iterations, smooth(values), color=color, label=name, linewidth=1.6)
    axes.set_title("training loss (pale: as written, strong: smoothed)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _draw_rate(axes: Axes, curves: dict[str, Series]) -> None:
    axes.plot(*curves["lr"], color="C3")
    axes.set_title("learning rate")
    axes.set_ylim(bottom=0)


def _draw_metrics(axes: Axes, curves: dict[str, Series]) -> None:
    for name, (iterations, values) in curves.items():
        style = {"marker": "o", "markersize": 4} if len(values) < 200 else {}
        drawn = smooth(values) if name == "training error" else values
        axes.plot(iterations, drawn, label=f"{name}: {drawn[-1]:.3g}", **style)
    axes.set_title("evaluation, percent (legend: last value)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centred mean over a twentieth of the curve: it does not lag behind as a running mean does."""
    window = np.ones(1 + 2 * (len(values) // 40))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
