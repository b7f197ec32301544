"""What a sweep found: mean and spread over seeds, and differences paired by seed."""

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tabulate import tabulate

from gn_practical.training.evaluation.curves import read_metrics
from gn_practical.training.evaluation.results import write_results
from gn_practical.training.sweep.plan import Plan, Run
from gn_practical.training.sweep.task import is_finished, read_record

_LAST = 0.05  # share of the schedule over which the training loss is averaged


@dataclass(frozen=True)
class Cell:
    """One metric of one setting.

    Attributes:
        by_seed: seed → value, of the finished runs that have one.
        mean: over seeds; NaN without any.
        std: over seeds, with n - 1; NaN with fewer than two.
        difference: mean difference to the baseline's value of the same seed; NaN without pairs.
        difference_std: its standard deviation over seeds.
        p_value: of the paired t-test, two-sided; NaN with fewer than two pairs.
    """

    by_seed: dict[int, float]
    mean: float
    std: float
    difference: float = math.nan
    difference_std: float = math.nan
    p_value: float = math.nan


@dataclass(frozen=True)
class Row:
    """A setting with its metrics."""

    setting: dict[str, str]
    cells: dict[str, Cell]
    seconds: float


def summarize(plan: Plan) -> list[Row]:
    """Gather the results of the finished runs, one row a setting, in the plan's order.

    The metric "train_loss" is the mean of ``total_loss`` over the last twentieth of the iterations;
    any other is looked up in ``results.json``.

    Args:
        plan: from :func:`gn_practical.training.sweep.read_plan`.

    Raises:
        ValueError: if a finished run has no such metric, with those that it has.
    """
    settings = list({tuple(run.setting.items()): run.setting for run in plan.runs}.values())
    finished = [run for run in plan.runs if is_finished(run)]
    values = {
        metric: {_key(run): _value(run, metric) for run in finished} for metric in plan.metrics
    }
    seconds = {_key(run): read_record(run)["seconds"] for run in finished}
    return [
        Row(
            setting,
            {metric: _cell(plan, setting, values[metric]) for metric in plan.metrics},
            _mean([seconds[k] for k in seconds if k[0] == tuple(setting.items())]),
        )
        for setting in settings
    ]


def results_markdown(plan: Plan, rows: list[Row]) -> str:
    """The table for people: mean ± standard deviation (number of seeds), difference, p."""
    headers = [*plan.axes]
    for metric in plan.metrics:
        headers.append(metric.rpartition("/")[2])
        if plan.baseline:
            headers += ["difference", "p"]
    lines = []
    for row in rows:
        line = [*row.setting.values()]
        for cell in row.cells.values():
            mean = _spread(cell.mean, cell.std, _digits(cell.mean))
            line.append(f"{mean} ({len(cell.by_seed)})")
            if plan.baseline:
                digits = _digits(cell.mean)
                line += [_spread(cell.difference, cell.difference_std, digits, "+")]
                line += [_p(cell.p_value)]
        lines.append([*line, "-" if math.isnan(row.seconds) else f"{row.seconds:.0f} s"])
    table = tabulate(lines, [*headers, "time a run"], tablefmt="pipe", disable_numparse=True)
    return f"{table}\n\n{_legend(plan, rows)}\n"


def write_tables(plan: Plan, rows: list[Row], output: str) -> None:
    """Write ``results.md``, ``results.csv`` (one line a run) and ``results.json``."""
    Path(output, "results.md").write_text(results_markdown(plan, rows), encoding="utf-8")
    with open(os.path.join(output, "results.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*plan.axes, "seed", *plan.metrics])
        for row in rows:
            for seed in plan.seeds:
                cells = [row.cells[metric].by_seed.get(seed, "") for metric in plan.metrics]
                writer.writerow([*row.setting.values(), seed, *cells])
    content = [
        {
            "setting": row.setting,
            "seconds": row.seconds,
            "metrics": {metric: vars(cell) for metric, cell in row.cells.items()},
        }
        for row in rows
    ]
    write_results({"rows": content}, os.path.join(output, "results.json"))


def _key(run: Run) -> tuple[tuple[tuple[str, str], ...], int]:
    return tuple(run.setting.items()), run.seed


def _value(run: Run, metric: str) -> float:
    if metric == "train_loss":
        iterations, losses = read_metrics(os.path.join(run.folder, "metrics.json"))["total_loss"]
        last = iterations[-1] * (1 - _LAST)
        return _mean([v for i, v in zip(iterations, losses, strict=True) if i >= last])
    found = json.loads(Path(run.folder, "results.json").read_text(encoding="utf-8"))
    value: Any = found
    for part in metric.split("/"):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    if isinstance(value, dict):
        raise ValueError(
            f"metrics must be in results.json, got {metric} where {run.folder} has "
            f"{', '.join(_leaves(found))}. Correct the name in the sweep's file."
        )
    return math.nan if value is None else float(value)


def _leaves(node: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in node.items():
        names += _leaves(value, f"{prefix}{key}/") if isinstance(value, dict) else [prefix + key]
    return names


def _cell(plan: Plan, setting: dict[str, str], values: dict[Any, float]) -> Cell:
    def of(labels: dict[str, str]) -> dict[int, float]:
        return {seed: v for (key, seed), v in values.items() if dict(key) == labels}

    mine = of(setting)
    cell = Cell(mine, _mean(list(mine.values())), _std(list(mine.values())))
    reference = {**setting, **plan.baseline}
    if not plan.baseline or reference == setting:
        return cell
    other = of(reference)
    pairs = [seed for seed in mine if seed in other]
    differences = [mine[seed] - other[seed] for seed in pairs]
    p_value = math.nan
    if _std(differences) > 0:
        p_value = float(stats.ttest_1samp(differences, 0).pvalue)
    return Cell(mine, cell.mean, cell.std, _mean(differences), _std(differences), p_value)


def _reduced(function: Callable[..., Any], values: list[float], least: int, **kwargs: int) -> float:
    return float(function(values, **kwargs)) if len(values) >= least else math.nan


def _mean(values: list[float]) -> float:
    return _reduced(np.mean, values, 1)


def _std(values: list[float]) -> float:
    return _reduced(np.std, values, 2, ddof=1)


def _digits(mean: float) -> int:
    """Return how many decimals a metric needs: percents two, small losses four."""
    return 2 if abs(mean) >= 0.1 else 4


def _spread(mean: float, std: float, digits: int, sign: str = "") -> str:
    if math.isnan(mean):
        return "-"
    spread = "" if math.isnan(std) else f" ± {std:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"


def _legend(plan: Plan, rows: list[Row]) -> str:
    done = sum(len(next(iter(row.cells.values())).by_seed) for row in rows)
    text = (
        f"Mean ± standard deviation over seeds (number of seeds); {done} of {len(plan.runs)} runs "
        "finished."
    )
    if plan.baseline:
        labels = ", ".join(f"{axis} {label}" for axis, label in plan.baseline.items())
        text += (
            f" Differences are to {labels}, paired by seed; p is of the two-sided paired t-test, "
            "not corrected for the number of comparisons."
        )
    return text
