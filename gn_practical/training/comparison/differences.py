"""Means, intervals and differences of settings; what differs between configs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from gn_practical.training.comparison.runs import Run
from gn_practical.training.comparison.settings import Setting

_CONFIDENCE = 0.95
_MISSING = "-"


@dataclass
class Number:
    """A mean over runs, and half of its 95 % interval; NaN where there is none."""

    mean: float
    interval: float = math.nan
    count: int = 0
    how: str = ""  # of a difference: how it was paired


def mean_of(values: Sequence[float]) -> Number:
    """Return the mean with half of its 95 % confidence interval by Student's t.

    Example:
        >>> number = mean_of([1.0, 2.0, 3.0])
        >>> number.mean, round(number.interval, 3), number.count
        (2.0, 2.484, 3)
    """
    if not values:
        return Number(math.nan)
    array = np.asarray(values, dtype=float)
    if len(array) == 1:
        return Number(float(array[0]), count=1)
    half = _quantile(len(array) - 1) * float(array.std(ddof=1)) / len(array) ** 0.5
    return Number(float(array.mean()), half, len(array))


def difference(
    mine: Setting, baseline: Setting, value: Callable[[Run], float | None]
) -> Number | None:
    """Return mine minus baseline: paired where two seeds and more match, else of the means.

    Of means of two runs and more the interval is Welch's; of one run on either side there is none.
    None if a side has no value.
    """
    left, right = ([v for r in s.runs if (v := value(r)) is not None] for s in (mine, baseline))
    if not left or not right:
        return None
    theirs = {run.seed: value(run) for run in baseline.runs if run.seed is not None}
    pairs = [
        own - other
        for run in mine.runs
        if (own := value(run)) is not None and (other := theirs.get(run.seed)) is not None
    ]
    if len(pairs) > 1:
        number = mean_of(pairs)
        number.how = f"paired by {len(pairs)} seeds"
        return number
    return _welch(left, right)


def _welch(left: list[float], right: list[float]) -> Number:
    number = Number(float(np.mean(left) - np.mean(right)), count=min(len(left), len(right)))
    if number.count > 1:
        parts = [(float(np.var(side, ddof=1)) / len(side), len(side) - 1) for side in (left, right)]
        variance = sum(part for part, _ in parts)
        number.interval, number.how = 0.0, "of the means (Welch)"
        if variance > 0:
            degrees = variance**2 / sum(part**2 / n for part, n in parts)
            number.interval = _quantile(degrees) * variance**0.5
    return number


def config_differences(runs: list[Run]) -> dict[str, list[str]]:
    """Return the keys of the configs that differ, with each run's value; "-" where it has none."""
    configs = [run.config for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [_text(config, key) for config in configs] for key in sorted(keys)}
    rows.pop("OUTPUT_DIR", None)  # differs always, and the names of runs say it
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def group_rows(runs: list[Run]) -> dict[str, list[int | None]]:
    """Return the groups of every norm in every run, None where a run has no such norm."""
    norms = dict.fromkeys(norm for run in runs for norm in run.groups)
    return {norm: [run.groups.get(norm) for run in runs] for norm in norms}


def _text(config: dict[str, Any], key: str) -> str:
    return str(config[key]) if key in config else _MISSING


def _quantile(degrees: float) -> float:
    return float(stdtrit(degrees, (1 + _CONFIDENCE) / 2))
