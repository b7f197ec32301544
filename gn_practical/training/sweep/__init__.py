"""Sweeps: many runs of the tools over settings and seeds, their table and their pictures."""

from gn_practical.training.sweep.pictures import draw_pictures
from gn_practical.training.sweep.plan import Plan, Run, read_plan
from gn_practical.training.sweep.runner import describe, run_all
from gn_practical.training.sweep.summary import summarize, write_tables
from gn_practical.training.sweep.task import is_finished

__all__ = ["Plan", "Run", "describe", "read_plan", "report", "run_all", "summarize"]


def report(plan: Plan, output: str) -> str:
    """Write tables and pictures into the folder of a sweep; return the table and where they are."""
    if not any(is_finished(run) for run in plan.runs):
        return f"No table: none of {len(plan.runs)} runs is finished."
    rows = summarize(plan)
    lines = ["", write_tables(plan, rows, output)]
    lines.append(f"Tables: {output}/results.md, results.csv, results.json")
    return "\n".join([*lines, *draw_pictures(plan, rows, output)])
