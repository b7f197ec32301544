"""The plan of a sweep: a YAML file, expanded into runs."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from gn_practical.training.config.node import override_pairs

_REQUIRED = ("tool", "config", "axes", "seeds", "metrics")
_OPTIONAL: dict[str, Any] = {"overrides": {}, "baseline": {}, "pictures": [], "labels": {}}


@dataclass(frozen=True)
class Run:
    """One training run of a sweep."""

    setting: dict[str, str]  # axis → label of its value
    seed: int  # the value of SEED
    overrides: tuple[str, ...]  # KEY, VALUE in turn, without SEED and OUTPUT_DIR
    folder: str  # its OUTPUT_DIR

    @property
    def name(self) -> str:
        """The setting and the seed, for people."""
        return f"{', '.join(f'{k} {v}' for k, v in self.setting.items())}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A sweep as its file describes it; :func:`read_plan` makes it."""

    path: str
    tool: str
    config: str
    axes: dict[str, list[str]]
    seeds: list[int]
    metrics: list[str]
    baseline: dict[str, str]
    pictures: list[dict[str, str]]
    labels: dict[str, str]
    runs: list[Run]

    def only(self, words: Sequence[str]) -> "Plan":
        """Return the plan with those runs alone whose settings are named by "axis=label".

        Several labels of one axis are all taken, an axis that none names is taken whole.

        Raises:
            ValueError: for an axis or a label that there is not.
        """
        chosen: dict[str, set[str]] = {}
        for word in words:
            axis, _, label = word.partition("=")
            self.check("--only", axis, label)
            chosen.setdefault(axis, set()).add(label)
        runs = [run for run in self.runs if all(run.setting[a] in chosen[a] for a in chosen)]
        return replace(self, runs=runs)

    def check(self, what: str, axis: str, label: str | None = None) -> None:
        """Raise a ValueError that names what is wrong, if there is no such axis or label of it."""
        if axis not in self.axes:
            raise ValueError(f"{what} must name an axis of {list(self.axes)}, got {axis}.")
        if label is not None and label not in self.axes[axis]:
            labels = self.axes[axis]
            raise ValueError(f"{what} must be a label of axis {axis}, {labels}, got {label}.")


def read_plan(path: str, output: str, opts: Sequence[str] = (), seeds: Sequence[int] = ()) -> Plan:
    """Read a sweep's file and expand it into every combination of its axes and seeds.

    Args:
        path: a YAML file with the keys

            - ``tool``: the script of every run, relative to the file;
            - ``config``: the config of every run, relative to the file;
            - ``overrides``: {KEY: value} of every run (optional);
            - ``axes``: {axis: {label: {KEY: value}}}, or {axis: {key: KEY, values: [...]}};
            - ``seeds``: [1, 2, 3];
            - ``metrics``: names in a run's ``results.json``, as "bbox/AP", or "train_loss";
            - ``baseline``: {axis: label}, the settings that others are compared with (optional);
            - ``pictures``: [{x: axis, y: metric}], a line for each setting of the other axes
              (optional);
            - ``labels``: {axis or metric: text at the axes of pictures, with its unit} (optional).
        output: the folder of the sweep; each run has its own below it.
        opts: ``KEY``, ``VALUE`` in turn for every run, after those of the file.
        seeds: in place of the file's.

    Raises:
        ValueError: naming what is wrong in the file, and what would be right.

    Example:
        >>> plan = read_plan("configs/sweeps/quickstart.yaml", "output/sweep")
        >>> len(plan.runs) == 4 * len(plan.seeds)
        True
    """
    content = _load(path)
    axes = {name: _values(path, name, axis) for name, axis in content.pop("axes").items()}
    common = {**content.pop("overrides"), **override_pairs(opts)}
    for key in ("tool", "config"):
        content[key] = os.path.normpath(os.path.join(os.path.dirname(path), content[key]))
    content["seeds"] = list(seeds) or content["seeds"]
    content["baseline"] = {axis: str(label) for axis, label in content["baseline"].items()}
    runs = []
    for seed in content["seeds"]:  # seed by seed: every setting has a result early on
        for choice in itertools.product(*(axis.items() for axis in axes.values())):
            setting = dict(zip(axes, (label for label, _ in choice), strict=True))
            overrides = {**common, **dict(itertools.chain(*(o.items() for _, o in choice)))}
            runs.append(_run(setting, seed, overrides, output))
    labels = {name: list(axis) for name, axis in axes.items()}
    plan = Plan(path=path, axes=labels, runs=runs, **content)
    _check(plan)
    return plan


def _load(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"a sweep must be a readable YAML file, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"a sweep must be a YAML file of keys and values, got {path}.")
    unknown = sorted(set(content) - {*_REQUIRED, *_OPTIONAL})
    missing = [key for key in _REQUIRED if not content.get(key)]
    if unknown or missing:
        raise ValueError(
            f"a sweep must have the keys {', '.join(_REQUIRED)} and may have "
            f"{', '.join(_OPTIONAL)}, got {path} without {missing} and with unknown {unknown}."
        )
    return {**_OPTIONAL, **content}


def _values(path: str, name: str, axis: Any) -> dict[str, dict[str, Any]]:
    """Return label → overrides of one axis."""
    if isinstance(axis, dict) and set(axis) == {"key", "values"}:
        return {str(value): {axis["key"]: value} for value in axis["values"]}
    if not isinstance(axis, dict) or not all(isinstance(v, dict) for v in axis.values()):
        raise ValueError(
            f"an axis must be {{label: {{KEY: value}}}} or {{key: KEY, values: [...]}}, got axis "
            f"{name} = {axis} in {path}."
        )
    return {str(label): overrides for label, overrides in axis.items()}


def _run(setting: dict[str, str], seed: int, overrides: dict[str, Any], output: str) -> Run:
    pairs = itertools.chain(*overrides.items())
    words = tuple(word if isinstance(word, str) else repr(word) for word in pairs)
    parts = [re.sub(r"[^\w.=-]+", "_", f"{axis}-{label}") for axis, label in setting.items()]
    return Run(setting, seed, words, os.path.join(output, "runs", *parts, f"seed-{seed}"))


def _check(plan: Plan) -> None:
    for key, file in (("tool", plan.tool), ("config", plan.config)):
        if not os.path.isfile(file):
            raise ValueError(
                f"{key} must be a file, relative to {plan.path}, got {file}. Correct the path."
            )
    if not all(isinstance(seed, int) and seed >= 0 for seed in plan.seeds):
        raise ValueError(f"seeds must be numbers from 0 on, got {plan.seeds}. Correct them.")
    for picture in plan.pictures:
        if set(picture) != {"x", "y"}:
            raise ValueError(f"a picture must be {{x: axis, y: metric}}, got {picture}.")
        if picture["y"] not in plan.metrics:
            raise ValueError(f"y must be one of metrics {plan.metrics}, got {picture['y']}.")
        plan.check("x", picture["x"])
    for axis, label in plan.baseline.items():
        plan.check("baseline", axis, label)
    for name in set(plan.labels) - set(plan.metrics):
        plan.check("a label", name)
    if len({run.folder for run in plan.runs}) < len(plan.runs):
        raise ValueError(
            f"labels and seeds must differ in letters and digits, got {plan.path} with two runs of "
            "one folder. Rename a label or drop a seed."
        )
