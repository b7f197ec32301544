"""Rows of a table saved to a file."""

from collections.abc import Sequence
from pathlib import Path

from gn_practical.analysis import Row, format_rows

SUFFIXES = (".md", ".csv", ".json", ".txt")


def save_rows(rows: Sequence[Row], path: str | Path) -> None:
    """Save rows to a file whose ending says how: .md, .csv, .json or .txt.

    Raises:
        ValueError: for another ending.

    Example:
        >>> save_rows([{"G": 1}], "groups.csv")  # doctest: +SKIP
    """
    check_output(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    style = path.suffix[1:]
    path.write_text(format_rows(rows, "text" if style == "txt" else style), encoding="utf-8")


def check_output(path: str | Path) -> None:
    """Raise ValueError unless the file's ending is one that :func:`save_rows` knows.

    To be called before the work whose result is to be saved.

    Example:
        >>> check_output("table.md")
    """
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(
            f"output must end with one of {', '.join(SUFFIXES)}, got output={path}. "
            "The ending chooses the format."
        )
