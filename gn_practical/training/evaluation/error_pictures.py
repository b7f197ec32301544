"""Pictures of what a detector gets wrong: costs, precision against recall, confused classes."""

import os
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MOST_CLASSES = 40  # of a confusion matrix that can be read
_WITH_NUMBERS = 16  # classes up to which its cells hold their numbers
_WITH_COLOURS = 10  # classes up to which each has a line of its own colour
_LONGEST_NAME = 24  # letters
_RECALLS = np.linspace(0, 1, 101)


def mean_curves(precision: np.ndarray) -> np.ndarray:
    """Average ``(..., classes)`` over the classes that are not NaN; NaN where there is none."""
    known = precision[..., ~np.isnan(precision).all(axis=(0, 1))]
    return known.mean(axis=-1) if known.size else np.full(precision.shape[:-1], np.nan)


def draw_errors(
    errors: dict[str, float], precision: np.ndarray, names: Sequence[str], path: str
) -> None:
    """Draw what each kind of error costs, and the curves at IoU 0.5 and 0.75.

    Args:
        errors: AP50 first, then in percent what each kind takes from it.
        precision: ``(2, 101, classes)``, NaN where a class has no annotations.
        names: of the classes.
        path: of the PNG.
    """
    figure = Figure(figsize=(17, 5), layout="constrained")
    costs, *curves = figure.subplots(1, 3)
    kinds = list(errors)[1:]
    bars = costs.barh(
        [kind.replace("_", " ") for kind in kinds],
        [np.nan_to_num(errors[kind]) for kind in kinds],
        color=["C0"] * (len(kinds) - 2) + ["0.6"] * 2,
    )
    labels = ["-" if np.isnan(errors[kind]) else f"{errors[kind]:.2f}" for kind in kinds]
    costs.bar_label(bars, labels, padding=3)
    costs.margins(x=0.12)
    costs.invert_yaxis()
    costs.set(title=f"AP50 is {errors['AP50']:.1f}; each error costs", xlabel="points of AP50")
    for axes, iou, by_class in zip(curves, ("0.5", "0.75"), precision, strict=True):
        _draw_curves(axes, by_class, names)
        area = 100 * mean_curves(by_class[None]).mean()
        axes.set(title=f"IoU {iou}: AP {area:.1f}", xlabel="recall", ylabel="precision")
    _save(figure, path)


def draw_confusion(matrix: np.ndarray, names: Sequence[str], title: str, path: str) -> None:
    """Draw how often an annotated class (row) is detected as which (column).

    Args:
        matrix: counts; the last row and column are background.
        names: of the classes without it. Of many, those with the most errors are drawn.
        title: what is counted.
        path: of the PNG.
    """
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    shown = np.sort(np.argsort(-wrong[:-1], kind="stable")[:_MOST_CLASSES])
    labels = [_short(names[index]) for index in shown] + ["background"]
    shown = np.append(shown, len(names))
    counts = matrix[np.ix_(shown, shown)]
    shares = counts / np.maximum(matrix[shown].sum(axis=1, keepdims=True), 1)
    side = 3.2 + 0.42 * len(labels)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
    if len(shown) <= len(names):
        title += f"\nthe {_MOST_CLASSES} of {len(names)} classes with the most errors"
    axes.set(title=title, xlabel="detected", ylabel="annotated")
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=90, parse_math=False)
    axes.set_yticks(ticks, labels, parse_math=False)
    if len(labels) <= _WITH_NUMBERS + 1:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color)
    _save(figure, path)


def _draw_curves(axes: Axes, by_class: np.ndarray, names: Sequence[str]) -> None:
    known = [
        (curve, name)
        for curve, name in zip(by_class.T, names, strict=True)
        if not np.isnan(curve).any()
    ]
    style = {} if len(known) <= _WITH_COLOURS else {"color": "0.75"}
    lines = [(axes.plot(_RECALLS, c, linewidth=1, alpha=0.8, **style)[0], n) for c, n in known]
    mean = axes.plot(_RECALLS, mean_curves(by_class[None])[0], color="black", linewidth=2.5)
    if style:
        lines = [(lines[0][0], f"each of {len(lines)} classes")]
    handles, labels = zip((mean[0], "mean of the classes"), *lines, strict=True)
    if len(known) > 1:
        legend = axes.legend(
            handles, map(_short, labels), fontsize="small", ncols=3,
            loc="upper center", bbox_to_anchor=(0.5, -0.13),
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)


def _short(name: str) -> str:
    # A zero-width space in front: a legend leaves out what begins with an underscore.
    short = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return f"\u200b{short}" if short.startswith("_") else short


def _save(figure: Figure, path: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class name in a script that the font lacks
        figure.savefig(path, dpi=100)
