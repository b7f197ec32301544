"""The numbers of an evaluation, as one table and as a file."""

import json
import math
import os
from typing import Any

from tabulate import tabulate

# (task, metric, title): the columns of the paper's Tables 5 and 6, then what else is measured.
_COLUMNS = (
    *(("panoptic_seg", metric, metric) for metric in ("PQ", "PQ_th", "PQ_st", "SQ", "RQ")),
    *(("bbox", metric, f"box {metric}") for metric in ("AP", "AP50", "AP75")),
    *(("segm", metric, f"mask {metric}") for metric in ("AP", "AP50", "AP75")),
    ("sem_seg", "mIoU", "mIoU"),
    *(("classification", metric, metric) for metric in ("error", "top5_error", "cross_entropy")),
)


def results_table(results: dict[str, Any]) -> str:
    """One table with the paper's columns, of the tasks that were evaluated.

    Args:
        results: task → metric → percent, as Detectron2's evaluators return it, or data set → task
            → metric → percent where several data sets were evaluated.

    Returns:
        A Markdown table, one row a data set; "-" where a metric cannot be computed. An empty
        string if there is no such task.

    Example:
        >>> print(results_table({"bbox": {"AP": 40.7, "AP50": 61.2, "AP75": 44.6}}))
        | box AP   | box AP50   | box AP75   |
        |:---------|:-----------|:-----------|
        | 40.700   | 61.200     | 44.600     |
    """
    by_dataset = results if _has_datasets(results) else {"": results}
    columns = [c for c in _COLUMNS if any(c[0] in tasks for tasks in by_dataset.values())]
    if not columns:
        return ""
    rows = [
        [name, *(_cell(tasks.get(task, {}).get(metric)) for task, metric, _ in columns)]
        for name, tasks in by_dataset.items()
    ]
    headers = ["data set", *(title for _, _, title in columns)]
    if by_dataset is not results:
        headers, rows = headers[1:], [row[1:] for row in rows]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def write_results(results: dict[str, Any] | list[Any], path: str) -> None:
    """Write results as strict JSON, all at once: a reader never sees half a file.

    Args:
        results: as for :func:`results_table`, or any of dicts and lists; NaN and infinity become
            null.
        path: the file; its folder is made.

    Example:
        >>> write_results({"bbox": {"AP": float("nan")}}, "output/results.json")  # doctest: +SKIP
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        json.dump(_strict(results), f, indent=2, allow_nan=False)
        f.write("\n")
    os.replace(f"{path}.tmp", path)


def _has_datasets(results: dict[str, Any]) -> bool:
    return any(
        isinstance(value, dict) for tasks in results.values() for value in dict(tasks).values()
    )


def _cell(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    number = float(value)  # NumPy scalars and zero-dimensional tensors too
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number
