"""Runs beside each other on one page that opens without a network."""

import os
from collections.abc import Sequence

from gn_practical.atomic import replace_file

__all__ = ["compare_runs"]


def compare_runs(
    folders: Sequence[str], output: str, baseline: str | None = None, pictures: int = 4
) -> int:
    """Write the page that compares runs; return how many there are.

    Args:
        folders: each the OUTPUT_DIR of a run, or a folder of runs as a sweep makes it.
        output: the page, an .html file; its folder is made.
        baseline: name of the run, as the page has it, that others are compared with.
        pictures: most validation pictures that are shown.

    Raises:
        ValueError: for what is no run, an unknown baseline, or another ending of ``output``.
        ModuleNotFoundError: without the packages of the extra "report".

    Example:
        >>> compare_runs(["output/a", "output/b"], "report.html")  # doctest: +SKIP
        2
    """
    from gn_practical.training.comparison.finding import find_runs
    from gn_practical.training.comparison.page import render
    from gn_practical.training.comparison.runs import read_run

    if not output.endswith(".html"):
        raise ValueError(f"output must end with .html, got output={output}. Name another file.")
    runs = [read_run(name, folder) for name, folder in find_runs(folders).items()]
    page = render(runs, baseline, pictures)
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    with replace_file(output) as path, open(path, "w", encoding="utf-8") as file:
        file.write(page)
    return len(runs)
