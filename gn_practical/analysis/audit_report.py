"""The isometry audit as a table, files and a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gn_practical.analysis import Row, format_rows
from gn_practical.analysis.recorder import BlockAudit

# What the text shows of a block; the files hold everything.
_COLUMNS = {
    "layer": "layer",
    "in_channels": "in",
    "out_channels": "out",
    "num_groups": "G",
    "activation": "act",
    "K": "K",
    "K_paper": "Eq. 31",
    "K_exact": "exact",
    "product": "product",
}
_WIDTH = 100
_COLOURS = ("C0", "C3", "C2", "C4", "C1", "C5")


def save_audit(rows: Sequence[BlockAudit], folder: str | Path, about: dict[str, Any]) -> str:
    """Write audit.txt, audit.json, audit.csv and audit.png; return the text of the table.

    Args:
        rows: from :func:`~gn_practical.analysis.audit.audit_isometry`.
        folder: made if it is not there.
        about: what was run (config_file, weights, batches, seed), kept in the JSON; the first two
            name the picture.

    Example:
        >>> save_audit(rows, "output/audit", {"seed": 0})  # doctest: +SKIP
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = format_audit(rows)
    records = [asdict(row) for row in rows]
    (folder / "audit.txt").write_text(text, encoding="utf-8")
    content = {**about, "blocks": records}
    (folder / "audit.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "audit.csv").write_text(format_rows(records, "csv"), encoding="utf-8")
    model = Path(about.get("config_file", "model")).stem
    weights = about.get("weights") or "random"
    plot_audit(rows, folder / "audit.png", f"{model}, weights: {weights}")
    return text


def format_audit(rows: Sequence[BlockAudit]) -> str:
    """Format a table for each choice of groups, with the geometric mean and range of K.

    Example:
        >>> print(format_audit(rows))  # doctest: +SKIP
    """
    parts = []
    for choice, blocks in _by_choice(rows).items():
        table: list[Row] = [
            {title: getattr(b, name) for name, title in _COLUMNS.items()} for b in blocks
        ]
        parts.append(
            f"groups: {choice}, {len(blocks)} unit blocks\n{format_rows(table, width=_WIDTH)}"
        )
    return "\n".join([*parts, format_summary(rows)])


def format_summary(rows: Sequence[BlockAudit]) -> str:
    """Format one line for each choice of groups: how far K is from 1, measured and predicted.

    Example:
        >>> print(format_summary(rows))  # doctest: +SKIP
    """
    lines: list[Row] = []
    for choice, blocks in _by_choice(rows).items():
        longest = max(blocks, key=lambda b: b.depth)
        values = sorted(b.K for b in blocks if b.K)
        lines.append(
            {
                "groups": choice,
                "blocks": len(blocks),
                "measured": len(values),
                "min K": values[0] if values else None,
                "median K": values[len(values) // 2] if values else None,
                "max K": values[-1] if values else None,
                "longest path": longest.depth,
                "product": longest.product,
                "by Eq. 31": longest.product_paper,
                "exact": longest.product_exact,
            }
        )
    return format_rows(lines, width=_WIDTH)


def plot_audit(rows: Sequence[BlockAudit], path: str | Path, title: str = "") -> None:
    """Draw K of each block, a panel for each choice of groups, and the running products below.

    Blocks stand in the order of the forward pass. The lines of the running products follow the
    longest path; blocks beside it (shortcuts, FPN levels, other heads) are dots.

    Example:
        >>> plot_audit(rows, "audit.png")  # doctest: +SKIP
    """
    choices = _by_choice(rows)
    layers = [b.layer for b in next(iter(choices.values()))]
    places = {layer: index for index, layer in enumerate(layers)}
    heights = [2.4] * len(choices) + [4.2]
    longest_name = max(map(len, layers))
    figure = Figure(
        figsize=(max(9.0, 3 + 0.2 * len(layers)), sum(heights) + 1 + 0.075 * longest_name),
        layout="constrained",
    )
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for index, (choice, blocks) in enumerate(choices.items()):
        axes, colour = panels[index], _COLOURS[index % len(_COLOURS)]
        _draw_ratios(axes, choice, blocks, places, colour)
        _draw_product(panels[-1], choice, blocks, places, colour)
    for axes in panels:
        _finish(axes, layers)
    low, high = zip(*(axes.get_ylim() for axes in panels[:-1]), strict=True)
    for axes in panels[:-1]:  # one scale, so that choices can be compared
        axes.set_ylim(min(low), max(high))
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    panels[-1].set_ylabel("running product of K")
    for style, label in (("-", "measured"), ("--", "exact factor"), (":", "Eq. 31")):
        panels[-1].plot([], [], style, color="black", label=label)
    panels[-1].legend(loc="best", fontsize="small", ncols=2)
    panels[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    what = "K: variance of the gradient, block input over block output"
    figure.suptitle("\n".join(filter(None, (title, what))), x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _by_choice(rows: Sequence[BlockAudit]) -> dict[str, list[BlockAudit]]:
    """Group by choice, every choice in the order of the first."""
    choices: dict[str, list[BlockAudit]] = {}
    for row in rows:
        choices.setdefault(row.choice, []).append(row)
    return choices


def _points(blocks: list[BlockAudit], name: str, places: dict[str, int]) -> tuple[list, list]:
    known = sorted(
        (places[b.layer], value) for b in blocks if (value := getattr(b, name)) is not None
    )
    return [x for x, _ in known], [y for _, y in known]


def _draw_ratios(
    axes: Axes, choice: str, blocks: list[BlockAudit], places: dict[str, int], colour: str
) -> None:
    measured = _points(blocks, "K", places)
    axes.vlines(measured[0], 1, measured[1], color=colour, alpha=0.25, linewidth=3)
    axes.plot(*measured, "o", color=colour, markersize=5, label="measured")
    axes.plot(*_points(blocks, "K_exact", places), "k_", markersize=8, label="exact factor")
    axes.plot(*_points(blocks, "K_paper", places), "kx", markersize=4, alpha=0.5, label="Eq. 31")
    groups = sorted({b.num_groups for b in blocks})
    shown = ", ".join(map(str, groups[:8])) + (" ..." if len(groups) > 8 else "")
    axes.set_title(f"{choice}: G = {shown}", loc="left", fontsize="medium", color=colour)
    axes.set_ylabel("K")


def _draw_product(
    axes: Axes, choice: str, blocks: list[BlockAudit], places: dict[str, int], colour: str
) -> None:
    by_layer = {b.layer: b for b in blocks}
    path = [max(blocks, key=lambda b: b.depth)]
    while path[-1].parent:
        path.append(by_layer[path[-1].parent])
    beside = [b for b in blocks if b not in path and b.depth]
    axes.plot(*_points(beside, "product", places), ".", color=colour, alpha=0.6)
    axes.plot(*_points(path, "product", places), color=colour, label=f"groups: {choice}")
    axes.plot(*_points(path, "product_exact", places), "--", color=colour)
    axes.plot(*_points(path, "product_paper", places), ":", color=colour)


def _finish(axes: Axes, layers: list[str]) -> None:
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.01)
    for index, (before, after) in enumerate(pairwise(layers)):
        if _part(before) != _part(after):
            axes.axvline(index + 0.5, color="grey", linewidth=0.6, linestyle="--")


def _part(layer: str) -> str:
    """Return the part of the model that a layer lies in, such as backbone.bottom_up.res2."""
    names = layer.split(".")
    return ".".join(names[: 3 if names[1:2] == ["bottom_up"] else 1])
