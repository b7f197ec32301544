"""The isometry audit as a table, files and a picture."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import cycle, groupby, pairwise
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gn_practical.analysis import Row, format_rows
from gn_practical.analysis.recorder import BlockAudit

# What the text shows of a block, by title; the files hold everything.
_COLUMNS = {
    **{"layer": "layer", "in": "in_channels", "out": "out_channels", "G": "num_groups"},
    **{"act": "activation", "K": "K", "Eq. 31": "K_paper", "exact": "K_exact"},
    "product": "product",
}
_DIAGNOSES = {"r": "shared", "dead": "dead", "on": "always_on", "rank": "effective_rank"}
_WIDTH = 120
_STYLES = ("-", "--", ":")
# The lower panels: label → what its lines are called → their values.
_LOWER: dict[str, dict[str, Callable[[BlockAudit], float | None]]] = {
    "running product of K": {
        "measured": attrgetter("product"),
        "exact factor": attrgetter("product_exact"),
        "Eq. 31": attrgetter("product_paper"),
    },
    "r, shared by all pixels": {"measured": attrgetter("shared")},
    "ReLU: share of channels": {
        "always on": attrgetter("always_on"),
        "dead": attrgetter("dead"),
    },
    "effective rank / channels": {
        "measured": lambda b: b.effective_rank and b.effective_rank / b.out_channels,
    },
}
_COLOURS = ("C0", "C3", "C2", "C4", "C1", "C5")


def save_audit(rows: Sequence[BlockAudit], folder: str | Path, about: dict[str, Any]) -> str:
    """Write audit.txt, audit.json, audit.csv and audit.png; return the text of the table.

    ``about`` says what was run (config_file, weights, batches, seed) and is kept in the JSON; the
    first two name the picture.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) for row in rows]
    files = {
        "audit.txt": format_audit(rows),
        "audit.json": json.dumps({**about, "blocks": records}, indent=1),
        "audit.csv": format_rows(records, "csv"),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    model = Path(about.get("config_file", "model")).stem
    weights = about.get("weights") or "random"
    plot_audit(rows, folder / "audit.png", f"{model}, weights: {weights}")
    return files["audit.txt"]


def format_audit(rows: Sequence[BlockAudit]) -> str:
    """Format a table for each choice of groups, and one of how far K is from 1."""
    parts = []
    for choice, blocks in _by_choice(rows).items():
        table = [
            {t: getattr(b, name) for t, name in (_COLUMNS | _DIAGNOSES).items()} for b in blocks
        ]
        text = format_rows(table, width=_WIDTH)
        parts.append(f"groups: {choice}, {len(blocks)} unit blocks\n{text}")
    summary = [_summary(choice, blocks) for choice, blocks in _by_choice(rows).items()]
    return "\n".join([*parts, format_rows(summary, width=_WIDTH)])


def _summary(choice: str, blocks: list[BlockAudit]) -> Row:
    longest = max(blocks, key=lambda b: b.depth)
    values = sorted(b.K for b in blocks if b.K) or [None]
    return {
        "groups": choice,
        "blocks": len(blocks),
        "measured": len([b for b in blocks if b.K]),
        "min K": values[0],
        "median K": values[len(values) // 2],
        "max K": values[-1],
        "longest path": longest.depth,
        "product": longest.product,
        "by Eq. 31": longest.product_paper,
        "exact": longest.product_exact,
        **{f"median {title}": _median(blocks, name) for title, name in _DIAGNOSES.items()},
    }


def _median(blocks: list[BlockAudit], name: str) -> float | None:
    values = [value for b in blocks if (value := getattr(b, name)) is not None]
    return median(values) if values else None


def plot_audit(rows: Sequence[BlockAudit], path: str | Path, title: str = "") -> None:
    """Draw K of each block, a panel for each choice of groups, and what goes with it below.

    Blocks stand in the order of the forward pass. The lines of the lower panels (running products
    of K, and what the forward pass tells of the channels) follow the longest path; blocks beside it
    (shortcuts, FPN levels, other heads) are dots.
    """
    choices = _by_choice(rows)
    layers = [b.layer for b in next(iter(choices.values()))]
    heights = [2.4] * len(choices) + [4.2] + [2.4] * (len(_LOWER) - 1)
    height = sum(heights) + 1 + 0.075 * max(map(len, layers))
    figure = Figure(figsize=(max(9.0, 3 + 0.2 * len(layers)), height), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    ratios, lower = panels[: len(choices)], panels[len(choices) :]
    for axes in ratios[1:]:  # one scale, so that choices can be compared
        axes.sharey(ratios[0])
    for axes, colour, blocks in zip(ratios, cycle(_COLOURS), choices.values(), strict=False):
        _draw_ratios(axes, blocks, layers, colour)
        _draw_lower(lower, blocks, layers, colour)
    for axes in panels:
        _finish(axes, layers)
    for axes in (*ratios, lower[0]):
        axes.set_yscale("log")
        axes.axhline(1, color="black", linewidth=0.8)
    ratios[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    panels[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    what = "K: variance of the gradient, block input over block output"
    figure.suptitle("\n".join(filter(None, (title, what))), x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _by_choice(rows: Sequence[BlockAudit]) -> dict[str, list[BlockAudit]]:
    return {choice: list(blocks) for choice, blocks in groupby(rows, lambda row: row.choice)}


def _points(
    blocks: list[BlockAudit], value: Callable[[BlockAudit], Any], layers: list[str]
) -> tuple[list, list]:
    """Return the places on the x axis and the values, where there are any, in that order."""
    values = {layers.index(b.layer): value(b) for b in blocks}
    known = sorted(place for place, value in values.items() if value is not None)
    return known, [values[place] for place in known]


def _draw_ratios(axes: Axes, blocks: list[BlockAudit], layers: list[str], colour: str) -> None:
    places, measured = _points(blocks, attrgetter("K"), layers)
    axes.vlines(places, 1, measured, color=colour, alpha=0.25, linewidth=3)
    axes.plot(places, measured, "o", color=colour, markersize=5, label="measured")
    axes.plot(
        *_points(blocks, attrgetter("K_exact"), layers), "k_", markersize=8, label="exact factor"
    )
    axes.plot(
        *_points(blocks, attrgetter("K_paper"), layers),
        "kx",
        markersize=4,
        alpha=0.5,
        label="Eq. 31",
    )
    groups = sorted({b.num_groups for b in blocks})
    shown = ", ".join(map(str, groups[:8])) + (" ..." if len(groups) > 8 else "")
    title = f"{blocks[0].choice}: G = {shown}"
    axes.set_title(title, loc="left", fontsize="medium", color=colour)
    axes.set_ylabel("K")


def _draw_lower(
    panels: Sequence[Axes], blocks: list[BlockAudit], layers: list[str], colour: str
) -> None:
    """Draw the running products of a choice, and the diagnoses of its channels."""
    by_layer = {b.layer: b for b in blocks}
    path = [max(blocks, key=lambda b: b.depth)]
    while path[-1].parent:
        path.append(by_layer[path[-1].parent])
    beside = [b for b in blocks if b not in path and b.depth]
    for axes, (label, lines) in zip(panels, _LOWER.items(), strict=True):
        axes.set_ylabel(label)
        for value, style in zip(lines.values(), _STYLES, strict=False):
            text = f"groups: {blocks[0].choice}" if style == "-" else None
            axes.plot(*_points(path, value, layers), style, color=colour, label=text)
            if style == "-":
                axes.plot(*_points(beside, value, layers), ".", color=colour, alpha=0.6)
        _name_styles(axes, list(lines))
        axes.legend(loc="best", fontsize="small", ncols=2)


def _name_styles(axes: Axes, names: list[str]) -> None:
    shown = {line.get_label() for line in axes.lines}
    for name, style in zip(names if len(names) > 1 else (), _STYLES, strict=False):
        if name not in shown:
            axes.plot([], [], style, color="black", label=name)


def _finish(axes: Axes, layers: list[str]) -> None:
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.01)
    for index, (before, after) in enumerate(pairwise(layers)):
        if _part(before) != _part(after):
            axes.axvline(index + 0.5, color="grey", linewidth=0.6, linestyle="--")


def _part(layer: str) -> str:
    """Return the part of the model that a layer lies in, such as backbone.bottom_up.res2."""
    names = layer.split(".")
    return ".".join(names[: 3 if names[1:2] == ["bottom_up"] else 1])
