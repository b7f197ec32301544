"""The costs of a model as a table to read and as lines that say what they leave out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from gn_practical.analysis.cost import Count, ModuleCost, norms_of, standardized_weights

_UNITS = ((10**9, " G"), (10**6, " M"), (10**3, " k"), (1, ""))
_TITLES = {"parameters": "parameters", "flops": "FLOPs", "activations": "activations"}


def format_costs(table: Sequence[ModuleCost], max_depth: int) -> str:
    """Lay out a table of costs: each quantity, and in percent what norms have of it.

    Args:
        table: by :func:`gn_practical.analysis.cost.cost_table`.
        max_depth: levels of modules below the model that are shown.

    Example:
        >>> row = ModuleCost("", "Net", 200_000, 1000, 3e9, 1.5e9)
        >>> print(format_costs([row], 0))
        module    type      parameters  norms      FLOPs  norms
        --------  ------  ------------  -------  -------  -------
        (all)     Net            200 k  0.5 %        3 G  50.0 %
    """
    depths = [f"{row.module}.".count(".") if row.module else 0 for row in table]
    # A norm has its columns already, in the line of the module around it.
    shown = [
        row
        for row, depth in zip(table, depths, strict=True)
        if depth == 0 or (depth <= max_depth and row.parameters_of_norms != row.parameters)
    ]
    columns = [name for name in _TITLES if getattr(table[0], name) is not None]
    lines = []
    for row in shown:
        cells = [row.module or "(all)", row.kind]
        for name in columns:
            value, of_norms = getattr(row, name), getattr(row, f"{name}_of_norms")
            share = f"{100 * of_norms / value:.1f} %" if of_norms else ""
            cells += [readable(value), share]
        lines.append(cells)
    headers = ["module", "type", *(text for name in columns for text in (_TITLES[name], "norms"))]
    align = ("left", "left", *("right", "left") * len(columns))
    return tabulate(lines, headers, "simple", colalign=align, disable_numparse=True)


def readable(number: float) -> str:
    """Write a number with three digits and a unit.

    Example:
        >>> readable(3_225_079_424), readable(999_999), readable(0)
        ('3.23 G', '1 M', '0')
    """
    number = float(f"{number:.3g}")
    size, unit = next((u for u in _UNITS if number >= u[0]), _UNITS[-1])
    return f"{number / size:g}{unit}"


@dataclass
class Total:
    """Mean and spread of a quantity over inputs, all in all and without norms."""

    name: str
    counts: Sequence[Count]

    def __str__(self) -> str:
        totals = [count.total for count in self.counts]
        norms = sum(count.of_norms() for count in self.counts) / len(totals)
        mean = sum(totals) / len(totals)
        spread = (sum((t - mean) ** 2 for t in totals) / len(totals)) ** 0.5
        several = f" ± {readable(spread)} over {len(totals)} images" if len(totals) > 1 else ""
        share = 100 * norms / mean if mean else 0
        return (
            f"{self.name}: {readable(mean)}{several}, of which norms {readable(norms)} "
            f"({share:.2f} %); without them {readable(mean - norms)}."
        )


def norm_lines(model: nn.Module) -> Iterator[str]:
    """Yield what norms and standardized convolutions a model has."""
    kinds = Counter(type(norm).__name__ for _, norm in norms_of(model))
    total = sum(p.numel() for p in model.parameters())
    owned = sum(p.numel() for _, norm in norms_of(model) for p in norm.parameters(recurse=False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield (
        f"Parameters: {readable(total)}, of which trained {readable(trained)}, "
        f"of norms {readable(owned)} ({100 * owned / max(total, 1):.2f} %)."
    )
    names = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) or "none"
    yield f"Norms: {names}."
    convolutions, weights = standardized_weights(model)
    if convolutions:
        yield (
            f"Weight standardization: {convolutions} convolutions with {readable(weights)} weights;"
            " not counted, as the result is kept in evaluation. Training does it once a step."
        )


def omission_lines(count: Count) -> Iterator[str]:
    """Yield what a count of operations leaves out."""
    operators = ", ".join(f"{name} ({n})" for name, n in count.not_counted().most_common())
    if operators:
        yield f"No rule counts these operators (how often they ran): {operators}."
    uncalled = count.uncalled()
    if uncalled:
        yield (
            f"{len(uncalled)} modules with parameters did not run by themselves; what they did, if "
            f"anything, counts for those around them: {', '.join(uncalled)}."
        )
    without = count.norms_without_count()
    if without:
        yield f"{len(without)} norms have no operation that is counted: {', '.join(without)}."
