"""The empirical side of the paper: its tables, measured, beside theory.

Every table is a list of rows, dicts with the same keys; this file formats them.
"""

import csv
import io
import json
from collections.abc import Sequence

from tabulate import tabulate

Row = dict[str, object]


def format_rows(rows: Sequence[Row], style: str = "text", width: int = 0) -> str:
    """Render rows as "text", "md" (markdown), "csv" or "json".

    Where text has a ``width`` in characters, numbers have three digits, titles break at spaces,
    and the first column loses the beginning of what is too long.

    Example:
        >>> print(format_rows([{"G": 1, "K": 0.53125}], "csv"), end="")
        G,K
        1,0.53125
    """
    if style == "json":
        return json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
    if style == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    if style == "text" and width:
        return _fit(rows, width)
    kind = "github" if style == "md" else "simple"
    return tabulate(rows, headers="keys", tablefmt=kind, floatfmt=".5g", missingval="-") + "\n"


def _fit(rows: Sequence[Row], width: int) -> str:
    titles = [title.split() for title in rows[0]]
    high = max(map(len, titles))
    table = [[([""] * high + title)[-high:][line] for title in titles] for line in range(high)]
    table += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = min(widths[0], width - sum(wide + 2 for wide in widths[1:]))
    for row in table:
        row[0] = row[0] if len(row[0]) <= room else f"…{row[0][1 - room :]}"
    table.insert(high, ["-" * wide for wide in (room, *widths[1:])])
    alignment = ("left", *["right"] * len(widths[1:]))
    return tabulate(table, tablefmt="plain", colalign=alignment, disable_numparse=True) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
