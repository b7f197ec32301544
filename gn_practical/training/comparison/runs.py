"""One run as its folder tells it."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from gn_practical.training.comparison.machine import read_machine
from gn_practical.training.evaluation.curves import Series, read_metrics
from gn_practical.training.evaluation.results import flat_results

_LAST = 0.05  # share of the schedule over which the training loss is averaged
_OF_CLASS = re.compile(r"(min\(IoU, B-Iou\)|[^-]+)-(.+)", re.DOTALL)
TRAINING = "training"


@dataclass
class Run:
    """What is known of a run; what its folder does not hold is empty."""

    name: str
    folder: str
    config: dict[str, Any] = field(default_factory=dict)  # dotted key → value
    curves: dict[str, Series] = field(default_factory=dict)
    results: dict[tuple[str, str], Any] = field(default_factory=dict)  # (task, metric) → value
    # (task, metric) → class → value
    classes: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)  # path of a norm → its groups
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what a reader of its numbers must know
    is_finished: bool = True

    @property
    def seed(self) -> int | None:
        """The value of SEED; None where it is not known or random."""
        seed = self.config.get("SEED")
        return seed if isinstance(seed, int) and seed >= 0 else None


def read_run(name: str, folder: str) -> Run:
    """Read a run's folder; a file that is missing or broken becomes a note, not an error."""
    run = Run(name, folder)
    config = _read(run, "config.yaml", lambda text: yaml.load(text, _LOADER))
    run.config = dict(_flat(config)) if isinstance(config, dict) else {}
    _read_curves(run)
    _read_results(run)
    groups = _read(run, "num_groups.json", json.loads)
    rows = groups if isinstance(groups, list) else []
    run.groups = {row["norm"]: row["num_groups"] for row in rows if "norm" in row}
    run.machine = read_machine(os.path.join(folder, "log.txt"))
    return run


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _read(run: Run, file: str, parse: Any) -> Any:
    path = Path(run.folder, file)
    if not path.exists():
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{file} cannot be read: {' '.join(str(error).split())[:200]}")
        return None


def _flat(node: dict[str, Any], prefix: str = "") -> Any:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_curves(run: Run) -> None:
    path = os.path.join(run.folder, "metrics.json")
    try:
        run.curves = read_metrics(path)
    except (ValueError, OSError) as error:
        run.notes.append("no curves: " + str(error).partition(",")[0])
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        wrong = sum(bool(re.search(r'"total_loss": (NaN|-?Infinity)', line)) for line in lines)
    if wrong:
        run.notes.append(f"{wrong} values of total_loss are not finite and left out of the curves")
    _check_end(run)


def _check_end(run: Run) -> None:
    iterations, losses = run.curves.get("total_loss", ([], []))
    if not iterations:
        return
    done, planned = iterations[-1] + 1, run.config.get("SOLVER.MAX_ITER")
    saved = os.path.exists(os.path.join(run.folder, "model_final.pth"))
    if isinstance(planned, int) and done < planned and not saved:
        run.is_finished = False
        run.notes.append(f"stopped after iteration {done} of {planned}")
        return
    begin = np.searchsorted(iterations, iterations[-1] * (1 - _LAST))
    run.results[TRAINING, "total_loss"] = float(np.mean(losses[begin:]))


def _read_results(run: Run) -> None:
    content = _read(run, "results.json", json.loads)
    if not isinstance(content, dict):
        run.notes.append("no evaluation")
        return
    for task, metric, value in flat_results(content, with_classes=True):
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        of_class = _OF_CLASS.fullmatch(metric)
        if of_class and (value is None or isinstance(value, int | float)):
            run.classes.setdefault((task, of_class[1]), {})[of_class[2]] = value
        else:
            run.results[task, metric] = value
    if not run.is_finished:
        names = {f"{task}/{metric}".lstrip("/") for task, metric in run.results}
        last = max((run.curves[n][0][-1] for n in names & run.curves.keys()), default=None)
        where = "an earlier evaluation" if last is None else f"the evaluation at iteration {last}"
        run.notes.append(f"its results are of {where}")
