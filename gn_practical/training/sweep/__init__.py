"""Sweeps: many runs of the tools over settings and seeds, their table and their pictures."""

from gn_practical.training.sweep.pictures import draw_pictures
from gn_practical.training.sweep.plan import Plan, Run, read_plan
from gn_practical.training.sweep.runner import describe, run_all
from gn_practical.training.sweep.summary import results_markdown, summarize, write_tables
from gn_practical.training.sweep.task import is_finished

__all__ = ["Plan", "Run", "describe", "read_plan", "report", "run_all", "summarize"]


def report(plan: Plan, output: str) -> str:
    """Write tables and pictures into the sweep's folder; return the table and where they are.

    Args:
        plan: from :func:`gn_practical.training.sweep.read_plan`.
        output: the folder of the sweep.
    """
    if not any(is_finished(run) for run in plan.runs):
        return f"No table: none of {len(plan.runs)} runs is finished."
    rows = summarize(plan)
    write_tables(plan, rows, output)
    pictures = draw_pictures(plan, rows, output)
    return f"\n{results_markdown(plan, rows)}\n" + "\n".join(
        [f"Tables: {output}/results.md, results.csv, results.json", *pictures]
    )
