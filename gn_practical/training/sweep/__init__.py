"""Sweeps: many runs of the tools over settings and seeds, their table and their pictures."""

from gn_practical.training.comparison import compare_runs
from gn_practical.training.sweep.pictures import draw_pictures
from gn_practical.training.sweep.plan import Plan, Run, read_plan
from gn_practical.training.sweep.runner import describe, run_all
from gn_practical.training.sweep.summary import summarize, write_tables
from gn_practical.training.sweep.task import is_finished

_MOST_ON_A_PAGE = 60

__all__ = ["Plan", "Run", "describe", "read_plan", "report", "run_all", "summarize"]


def report(plan: Plan, output: str) -> str:
    """Write tables and pictures into the folder of a sweep; return the table and where they are."""
    if not any(is_finished(run) for run in plan.runs):
        return f"No table: none of {len(plan.runs)} runs is finished."
    rows = summarize(plan)
    lines = ["", write_tables(plan, rows, output)]
    lines.append(f"Tables: {output}/results.md, results.csv, results.json")
    return "\n".join([*lines, *draw_pictures(plan, rows, output), _write_page(plan, output)])


def _write_page(plan: Plan, output: str) -> str:
    """Write the page that compares the finished runs; return where it is, or why there is none."""
    folders = [run.folder for run in plan.runs if is_finished(run)]
    if len(folders) > _MOST_ON_A_PAGE:
        return f"Page: none of {len(folders)} runs; tools/compare_runs.py takes a part of them"
    settings = [run for run in plan.runs if plan.baseline.items() <= run.setting.items()]
    first = [run.folder for run in settings if run.folder in folders]
    page = f"{output}/report.html"
    try:
        compare_runs([*first, *folders], page)
    except ModuleNotFoundError as error:
        return f"Page: none without {error.name}: pip install 'gn_practical[report]'"
    return f"Page: {page}"
