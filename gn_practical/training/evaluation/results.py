"""The numbers of an evaluation, as tables and as a file."""

import json
import math
from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

from gn_practical.atomic import write_json

_WIDTH = 100  # of the tables, in characters


def flat_results(
    results: dict[str, Any], task: str = "", with_classes: bool = False
) -> Iterator[tuple[str, str, Any]]:
    """Go through the metrics of an evaluation, as (task, metric, value).

    Results are task → metric → value, as Detectron2's evaluators return them, or data set → task →
    metric → value, whose task is then "data set/task". Metrics of single classes, told by a hyphen
    as in "AP-person", are left out unless ``with_classes``.

    Example:
        >>> list(flat_results({"val": {"bbox": {"AP": 40.7, "AP-person": 50.0}}}))
        [('val/bbox', 'AP', 40.7)]
    """
    for name, value in results.items():
        if isinstance(value, dict):
            yield from flat_results(value, f"{task}/{name}".lstrip("/"), with_classes)
        elif with_classes or "-" not in name:
            yield task, name, value


def results_table(results: dict[str, Any]) -> str:
    """Lay out the main metrics in Markdown, one table a task and no line above 100 characters.

    A row is a data set, "-" a metric that cannot be computed; no metric gives an empty text.

    Example:
        >>> print(results_table({"bbox": {"AP": 40.7, "AP50": 61.2, "AP75": 44.6}}))
        |      |     AP |   AP50 |   AP75 |
        |:-----|-------:|-------:|-------:|
        | bbox | 40.700 | 61.200 | 44.600 |
    """
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for path, metric, value in flat_results(results):
        dataset, _, task = path.rpartition("/")
        row = tasks.setdefault(task, {}).setdefault(dataset or task, {})
        row[metric] = value
    tables = [table for task, rows in tasks.items() for table in _tables(task, rows)]
    return "\n\n".join(tables)


def write_results(results: dict[str, Any] | list[Any], path: str) -> None:
    """Write results, any dicts and lists, as strict JSON: NaN and infinity become null.

    The file is written all at once, a reader never sees half of it; its folder is made.

    Example:
        >>> write_results({"bbox": {"AP": float("nan")}}, "output/results.json")  # doctest: +SKIP
    """
    # float is for NumPy's scalars and zero-dimensional tensors; NaN and infinity are constants.
    plain = json.loads(json.dumps(results, default=float), parse_constant=lambda _: None)
    write_json(path, plain, indent=2, allow_nan=False)


def _tables(task: str, rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the table of a task, in as many parts as its width asks for."""
    part: list[str] = []
    for metric in dict.fromkeys(metric for row in rows.values() for metric in row):
        if part and _table(task, rows, [*part, metric]).index("\n") > _WIDTH:
            yield _table(task, rows, part)
            part = []
        part.append(metric)
    yield _table(task, rows, part)


def _table(task: str, rows: dict[str, dict[str, Any]], metrics: list[str]) -> str:
    cells = [[name, *(_cell(row.get(metric)) for metric in metrics)] for name, row in rows.items()]
    align = ["left", *("right" for _ in metrics)]
    title = task if list(rows) != [task] else ""
    return tabulate(cells, [title, *metrics], "pipe", colalign=align, disable_numparse=True)


def _cell(value: Any) -> str:
    try:
        return f"{value:.3f}" if math.isfinite(value) else "-"
    except (TypeError, ValueError):  # None, or a text
        return "-" if value is None else str(value)
