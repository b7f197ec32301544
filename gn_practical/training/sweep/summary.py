"""What a sweep found: mean and spread over seeds, and differences paired by seed."""

import csv
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tabulate import tabulate

from gn_practical.training.evaluation.curves import read_metrics
from gn_practical.training.evaluation.results import flat_results, write_results
from gn_practical.training.sweep.plan import Plan, Run
from gn_practical.training.sweep.task import is_finished, read_record

_LAST = 0.05  # share of the schedule over which the training loss is averaged


def summarize(plan: Plan) -> list[dict[str, Any]]:
    """Gather the results of the finished runs, one row a setting, in the plan's order.

    A row is {setting, seconds, metrics: metric → numbers}. The numbers are the values by_seed of
    the finished runs, mean, std (with n - 1), the difference to the baseline's value of the same
    seed, difference_std, difference_interval (half of the 95 % confidence interval), p_value of
    the paired two-sided t-test, and p_holm, which is corrected by Holm for the comparisons of
    this metric in the sweep; NaN where seeds are too few.

    The metric "train_loss" is the mean of ``total_loss`` over the last twentieth of the iterations;
    any other is looked up in ``results.json``.

    Raises:
        ValueError: if a finished run has no such metric, with those that it has.
    """
    # setting → metric → seed → value
    found = {tuple(run.setting.values()): {m: {} for m in plan.metrics} for run in plan.runs}
    finished = list(filter(is_finished, plan.runs))
    for run in finished:
        for metric, values in found[tuple(run.setting.values())].items():
            values[run.seed] = _value(run, metric)
    rows = []
    for labels, mine in found.items():
        setting = dict(zip(plan.axes, labels, strict=True))
        reference = tuple({**setting, **plan.baseline}.values())
        other = found.get(reference, {}) if reference != labels else {}
        metrics = {m: _numbers(mine[m], other.get(m, {})) for m in plan.metrics}
        times = [read_record(run)["seconds"] for run in finished if run.setting == setting]
        rows.append({"setting": setting, "seconds": _mean_std(times)[0], "metrics": metrics})
    for metric in plan.metrics:
        cells = [row["metrics"][metric] for row in rows]
        for cell, p_value in zip(cells, holm([c["p_value"] for c in cells]), strict=True):
            cell["p_holm"] = p_value
    return rows


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method; NaN stay and do not count.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = list(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def _markdown(plan: Plan, rows: list[dict[str, Any]]) -> str:
    """The table for people: mean ± standard deviation (number of seeds), difference, p."""
    headers = [*plan.axes]
    for metric in plan.metrics:
        compared = ["difference", "p", "p (Holm)"] if plan.baseline else []
        headers += [metric.rpartition("/")[2], *compared]
    lines = []
    for row in rows:
        line = [*row["setting"].values()]
        for cell in row["metrics"].values():
            digits = 2 if abs(cell["mean"]) >= 0.1 else 4  # percents two, small losses four
            line.append(f"{_spread(cell['mean'], cell['std'], digits)} ({len(cell['by_seed'])})")
            if plan.baseline:
                line.append(_spread(cell["difference"], cell["difference_interval"], digits, "+"))
                line += ["-" if math.isnan(p) else f"{p:.2g}" for p in _p_values(cell)]
        lines.append([*line, "-" if math.isnan(row["seconds"]) else f"{row['seconds']:.0f} s"])
    table = tabulate(lines, [*headers, "time a run"], tablefmt="pipe", disable_numparse=True)
    return f"{table}\n\n{_legend(plan, rows)}\n"


def write_tables(plan: Plan, rows: list[dict[str, Any]], output: str) -> str:
    """Write ``results.md``, ``results.csv`` (one line a run), ``results.json``; return the text."""
    markdown = _markdown(plan, rows)
    Path(output, "results.md").write_text(markdown, encoding="utf-8")
    with open(os.path.join(output, "results.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*plan.axes, "seed", *plan.metrics])
        for row in rows:
            for seed in plan.seeds:
                cells = [cell["by_seed"].get(seed, "") for cell in row["metrics"].values()]
                writer.writerow([*row["setting"].values(), seed, *cells])
    write_results({"rows": rows}, os.path.join(output, "results.json"))
    return markdown


def _value(run: Run, metric: str) -> float:
    if metric == "train_loss":
        iterations, losses = read_metrics(os.path.join(run.folder, "metrics.json"))["total_loss"]
        last = iterations[-1] * (1 - _LAST)
        return float(np.mean(losses[np.searchsorted(iterations, last) :]))
    content = json.loads(Path(run.folder, "results.json").read_text(encoding="utf-8"))
    values = flat_results(content, with_classes=True)
    found = {f"{task}/{name}".lstrip("/"): value for task, name, value in values}
    if metric not in found:
        raise ValueError(
            f"metrics must be in results.json, got {metric} where {run.folder} has "
            f"{', '.join(found)}. Correct the name in the sweep's file."
        )
    return math.nan if found[metric] is None else float(found[metric])


def _numbers(mine: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    mean, std = _mean_std(mine.values())
    pairs = [value - other[seed] for seed, value in mine.items() if seed in other]
    difference, spread = _mean_std(pairs)
    p_value = float(stats.ttest_1samp(pairs, 0).pvalue) if spread > 0 else math.nan
    numbers = {"by_seed": mine, "mean": mean, "std": std, "difference": difference}
    numbers |= {"difference_std": spread, "difference_interval": math.nan, "p_value": p_value}
    if len(pairs) > 1:
        quantile = float(stats.t.ppf(0.975, len(pairs) - 1))
        numbers["difference_interval"] = quantile * spread / len(pairs) ** 0.5
    return numbers


def _p_values(cell: dict[str, Any]) -> tuple[float, float]:
    return cell["p_value"], cell["p_holm"]


def _mean_std(values: Collection[float]) -> tuple[float, float]:
    array = np.array(list(values))
    mean = float(array.mean()) if len(array) else math.nan
    return mean, float(array.std(ddof=1)) if len(array) > 1 else math.nan


def _spread(mean: float, std: float, digits: int, sign: str = "") -> str:
    if math.isnan(mean):
        return "-"
    spread = "" if math.isnan(std) else f" ± {std:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread}"


def _legend(plan: Plan, rows: list[dict[str, Any]]) -> str:
    done = sum(len(next(iter(row["metrics"].values()))["by_seed"]) for row in rows)
    runs = f"{done} of {len(plan.runs)} runs finished."
    text = f"Mean ± standard deviation over seeds (number of seeds); {runs}"
    if plan.baseline:
        labels = ", ".join(f"{axis} {label}" for axis, label in plan.baseline.items())
        text += (
            f" Differences are to {labels}, paired by seed, with half of their 95 % confidence "
            "interval; p is of the two-sided paired t-test, beside it corrected by Holm for the "
            "comparisons of a column."
        )
    return text
