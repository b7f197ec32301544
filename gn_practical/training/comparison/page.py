"""The page: everything about the runs in one HTML file, which opens without a network."""

import json
from collections.abc import Sequence
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gn_practical.training.comparison.charts import (
    MOST_IN_DETAIL,
    Chart,
    colors,
    curve_chart,
    groups_chart,
)
from gn_practical.training.comparison.differences import config_differences, group_rows
from gn_practical.training.comparison.pictures import same_pictures
from gn_practical.training.comparison.runs import Run
from gn_practical.training.comparison.settings import Setting, group_by_seed
from gn_practical.training.comparison.tables import class_tables, final_tables


def render(runs: list[Run], baseline: str | None = None, pictures: int = 4) -> str:
    """Return the page of the runs as HTML.

    Args:
        runs: at least one, with names that differ.
        baseline: name of a run or setting that others are compared with; the first if None.
        pictures: most validation pictures that are shown side by side.

    Raises:
        ValueError: if there is no run or setting named ``baseline``.
    """
    settings = group_by_seed(runs)
    first = _baseline(settings, baseline)
    settings.sort(key=lambda setting: setting is not first)  # the baseline leads every table
    runs = [run for setting in settings for run in setting.runs]
    rows = group_rows(runs)
    shown, left_out = same_pictures(runs, pictures)
    main, more = _charts(runs)
    machine = dict.fromkeys(key for run in runs for key in run.machine)
    environment = Environment(
        loader=PackageLoader("gn_practical.training.comparison", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        runs=runs,
        colors=colors(len(runs)),
        settings=settings,
        tables=final_tables(settings, first),
        classes=class_tables(settings, first),
        main_charts=main,
        more_charts=more,
        groups_chart=groups_chart(runs, rows),
        groups=rows,
        config=config_differences(runs),
        machine={key: [run.machine.get(key, "-") for run in runs] for key in machine},
        most_in_detail=MOST_IN_DETAIL,
        pictures=shown,
        pictures_note=left_out,
        library=Markup("\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)),
        as_json=as_json,
    )


def as_json(content: Any) -> Markup:
    """Return JSON for a <script> element, which no text in it can end."""
    return Markup(json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e"))


def _baseline(settings: list[Setting], name: str | None) -> Setting:
    if name is None:
        return settings[0]
    for setting in settings:
        if name == setting.name or name in (run.name for run in setting.runs):
            return setting
    known = dict.fromkeys(
        [*(s.name for s in settings), *(r.name for s in settings for r in s.runs)]
    )
    raise ValueError(
        f"the baseline must be one of {', '.join(known)}, got baseline={name}. Correct the name."
    )


def _charts(runs: Sequence[Run]) -> tuple[list[Chart], list[Chart]]:
    """Draw what the runs wrote: what is looked at first, and the rest."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    losses = [name for name in names if "loss" in name.rpartition("/")[2]]
    metrics: dict[str, list[str]] = {}
    for task, metric in dict.fromkeys(key for run in runs for key in run.results):
        name = f"{task}/{metric}".lstrip("/")
        if name in names:
            metrics.setdefault(task, []).append(name)
    first = ["total_loss", *(of_task[0] for of_task in metrics.values()), "lr"]
    rest = [*losses, *(name for of_task in metrics.values() for name in of_task), "time"]
    rest = [name for name in dict.fromkeys(rest) if name not in first]
    return tuple(
        [c for name in part if (c := curve_chart(name, runs, name, name in losses))]
        for part in (first, rest)
    )
