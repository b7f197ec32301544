"""The report as json and as Markdown; needs no PyTorch."""

from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gpu_parts.goals import GOALS, HOLDS, NOT_RUN, SHORT
from gpu_parts.record import as_json, without_places, write_whole
from gpu_parts.sections import Section

NOT_YET = "not run: its turn has not come"
SEND = (
    "To send it in: open an issue with report.md as its text and report.json attached, and say "
    "what else used the GPU meanwhile. There are no names of machines or folders in them."
)


def assemble(sections: list[Section], found: dict[str, dict], form: str, dry: bool) -> dict:
    """Put the findings together.

    Args:
        sections: all of the report, in order.
        found: by name, what :func:`gpu_parts.processes.run_section` returned; a section without
            findings has a "status" alone.
        form: of the report, in words.
        dry: whether it ran without a device.
    """
    parts = [
        {"name": s.name, "title": s.title, "status": NOT_YET, **found.get(s.name, {})}
        for s in sections
    ]
    status = {part["name"]: part["status"] for part in parts}
    values = {key: v for part in parts for key, v in part.get("values", {}).items()}
    goals = [
        goal.judge(values.get(goal.key), status[goal.section], dry)
        for goal in GOALS
        if goal.section in status
    ]
    counts = Counter(goal["verdict"] for goal in goals)
    failed = [part["name"] for part in parts if part["status"].startswith("failed")]
    return without_places(
        {"form": form, "counts": dict(counts), "failed": failed, "goals": goals, "sections": parts}
    )


def write(report: dict, folder: Path) -> None:
    """Write report.json and report.md."""
    write_whole(folder / "report.json", as_json(report))
    write_whole(folder / "report.md", markdown(report))


def summary(report: dict) -> str:
    """Say in a line how it stands."""
    counts = (f"{report['counts'].get(v, 0)} {v}" for v in (HOLDS, SHORT, NOT_RUN))
    failed = ", ".join(report["failed"]) or "none"
    return f"Goals: {', '.join(counts)}. Failed sections: {failed}."


def markdown(report: dict) -> str:
    """Lay out the report."""
    parts = [f"# Report of a GPU\n\n{report['form']}\n\n{summary(report)}\n\n{SEND}\n\n## Goals"]
    parts.append(_table(["what", "goal", "measured", ""], map(_goal_row, report["goals"])))
    parts += map(_section, report["sections"])
    return "\n\n".join(parts)


def _goal_row(goal: dict[str, Any]) -> list[str]:
    value = "-"
    if goal["value"] is not None and goal["verdict"] != NOT_RUN:
        value = f"{goal['value']:.{goal['digits'] + 1 if goal['digits'] else 0}f}"
    verdict = f"**{goal['verdict']}**" if goal["verdict"] == SHORT else goal["verdict"]
    reason = f": {_short(goal['reason'])}" if goal["reason"] else ""
    return [goal["text"], goal["goal"], value, verdict + reason]


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _section(part: dict[str, Any]) -> str:
    took = f", {part['seconds']:.0f} s" if "seconds" in part else ""
    lines = [f"## {part['title']}", f"`{part['name']}`: {part['status']}{took}."]
    if part.get("last_lines"):
        lines.append("```\n" + "\n".join(part["last_lines"]) + "\n```")
    lines += part.get("notes", [])
    for title, table in part.get("tables", {}).items():
        lines.append(f"### {title}")
        lines.append(_table(table["headers"], table["rows"]))
    lines += [f"![{name}]({name})" for name in part.get("pictures", [])]
    return "\n\n".join(lines)


def _table(headers: list[str], rows: Any) -> str:
    cells = [[_cell(value) for value in row] for row in rows]
    return tabulate(cells, headers, "pipe", disable_numparse=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
