"""The tables of the page: final numbers, and single classes."""

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gn_practical.training.comparison.differences import Number, difference, mean_of
from gn_practical.training.comparison.runs import TRAINING, Run
from gn_practical.training.comparison.settings import Setting

_HIGHER = re.compile(r"(AP|AR|PQ|SQ|RQ|m?IoU|fwIoU|[mp]?ACC|BoundaryIoU|min\(IoU).*", re.IGNORECASE)
_LOWER = re.compile(r".*(loss|error|cross_entropy)$")


@dataclass
class Cell:
    """What stands in a table: a value, below it the difference, and whether that is good."""

    value: str
    difference: str = ""
    how: str = ""
    tone: str = ""  # "good", "bad" or neither
    size: float = math.nan  # the difference, to order and draw by


@dataclass
class Table:
    """Rows of one task: label → a cell for each setting."""

    title: str
    rows: dict[str, list[Cell]] = field(default_factory=dict)


def final_tables(settings: list[Setting], baseline: Setting) -> list[Table]:
    """Return a table for each task of the results, with all its numbers and texts."""
    keys = dict.fromkeys(key for s in settings for run in s.runs for key in run.results)
    tables: dict[str, Table] = {}
    for task, metric in sorted(keys, key=lambda key: key[0] == TRAINING):
        title = f"{task} (mean of the last 5 %)" if task == TRAINING else task
        table = tables.setdefault(task, Table(title))
        table.rows[metric] = [
            _cell(s, baseline, metric, task, lambda run, key=(task, metric): run.results.get(key))
            for s in settings
        ]
    return list(tables.values())


def class_tables(settings: list[Setting], baseline: Setting) -> list[Table]:
    """Return a table for each metric of single classes, the largest differences first."""
    keys = dict.fromkeys(key for s in settings for run in s.runs for key in run.classes)
    tables = []
    for task, metric in keys:
        rows = _class_rows(settings, baseline, task, metric)
        order = sorted(rows, key=lambda name, rows=rows: -_largest(rows[name]))
        title = f"{task}: {metric} of each class".removeprefix(": ")
        tables.append(Table(title, {name: rows[name] for name in order}))
    return tables


def _class_rows(
    settings: list[Setting], baseline: Setting, task: str, metric: str
) -> dict[str, list[Cell]]:
    def of(run: Run, name: str) -> Any:
        return run.classes.get((task, metric), {}).get(name)

    runs = [run for setting in settings for run in setting.runs]
    names = dict.fromkeys(name for run in runs for name in run.classes.get((task, metric), {}))
    return {
        name: [_cell(s, baseline, metric, task, partial(of, name=name)) for s in settings]
        for name in names
    }


def _largest(cells: list[Cell]) -> float:
    return max((abs(cell.size) for cell in cells if not math.isnan(cell.size)), default=-1.0)


def _cell(setting: Setting, baseline: Setting, metric: str, task: str, value: Any) -> Cell:
    found = [value(run) for run in setting.runs]
    numbers = [float(v) for v in found if isinstance(v, int | float)]
    if not numbers:
        texts = dict.fromkeys(str(v)[:200] for v in found if v is not None)
        return Cell(", ".join(texts) or "-")
    mean = mean_of(numbers)
    digits = 2 if abs(mean.mean) >= 0.1 else 4
    cell = Cell(_text(mean, digits) + (f" ({mean.count})" if len(setting.runs) > 1 else ""))
    if setting is not baseline:
        step = difference(setting, baseline, lambda run: _number(value(run)))
        if step:
            cell.difference, cell.how = _text(step, digits, "+"), step.how
            cell.size, cell.tone = step.mean, _tone(metric, task, step)
    return cell


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _tone(metric: str, task: str, step: Number) -> str:
    """A difference is good or bad where the metric has a direction and the interval is off 0."""
    inside = not math.isnan(step.interval) and abs(step.mean) <= step.interval
    higher = bool(_HIGHER.fullmatch(metric)) and not task.endswith("_errors")
    lower = bool(_LOWER.fullmatch(metric))
    if inside or step.mean == 0 or not (higher or lower):
        return ""
    return "good" if (step.mean > 0) == higher else "bad"


def _text(number: Number, digits: int, sign: str = "") -> str:
    half = "" if math.isnan(number.interval) else f" ± {number.interval:.{digits}f}"
    return f"{number.mean:{sign}.{digits}f}{half}"
