"""Runs that differ by the seed alone, taken together."""

import json
import re
from collections import Counter
from dataclasses import dataclass

from gn_practical.training.comparison.runs import Run

_NOT_A_SETTING = ("SEED", "OUTPUT_DIR")


@dataclass
class Setting:
    """Runs of one config that differ by the seed alone; most often one run."""

    name: str
    runs: list[Run]


def group_by_seed(runs: list[Run]) -> list[Setting]:
    """Take together finished runs whose configs differ by SEED and OUTPUT_DIR alone.

    Not taken together: a run without a config, for it may differ in anything; one that stopped
    early; and a second run of the same seed, for it is the first once more and not another draw.
    """
    grouped: dict[tuple, list[Run]] = {}
    seen: Counter = Counter()
    for number, run in enumerate(runs):
        key: tuple = (number,)
        if run.config and run.is_finished:
            key = (_identity(run),)
            if run.seed is not None:
                repeated = (*key, run.seed)
                seen[repeated] += 1
                key = (*key, seen[repeated])
        grouped.setdefault(key, []).append(run)
    settings = [Setting(_name(members), members) for members in grouped.values()]
    taken = Counter(setting.name for setting in settings)
    for setting in settings:
        if taken[setting.name] > 1:
            setting.name = setting.runs[0].name
    return settings


def _identity(run: Run) -> str:
    config = {key: value for key, value in run.config.items() if key not in _NOT_A_SETTING}
    return json.dumps(config, sort_keys=True, default=str)


def _name(runs: list[Run]) -> str:
    name = runs[0].name
    if len(runs) == 1:
        return name
    return re.sub(r"[/_.-]*\bseed[-_=]?\d+$", "", name) or name
