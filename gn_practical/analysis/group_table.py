"""The group table: the groups of every norm of a model and the K they give, by rule and number."""

import re
from collections.abc import Sequence

from torch import nn

from gn_practical.analysis import Row
from gn_practical.analysis.blocks import UnitBlock, check_in_channels, find_unit_blocks
from gn_practical.analysis.exact_factor import exact_factor
from gn_practical.num_groups import gradient_variance_ratio, ideal_num_groups

CHOICES = ("practical", "exact", 32, 1)


def group_table(model: nn.Module, choices: Sequence[str | int] = CHOICES) -> list[Row]:
    """List G and K of every group norm of a model, for several choices of groups.

    A row holds the layer, its channels, G_ideal of Eq. 32 before clipping, and for each choice
    "G", "K" by Eq. 31 and "K exact", with (n_g − 2)/(n_g − 3) in place of 1 + 4/n_g (infinite for
    groups of three values or fewer). Both are those of Linear layers: on a convolution a group
    holds the pixels of its channels too, and K hardly moves with G; the audit predicts it there.

    Args:
        model: any module with group norms, PGN ones bound; may be on the meta device.
        choices: "model" (as they are), or what
            :func:`~gn_practical.num_groups.resolve_num_groups` takes. A number that does not
            divide a layer's channels leaves its cells empty.

    Raises:
        ValueError: for a model without group norms, a norm whose input channels are not known, or
            an unknown choice.

    Example:
        >>> rows = group_table(nn.Sequential(nn.Linear(64, 32), nn.GroupNorm(4, 32)), ["practical"])
        >>> rows[0]["practical G"], rows[0]["practical K"], rows[0]["practical K exact"]
        (8, 1.0, 1.0)
    """
    blocks = find_unit_blocks(model)
    check_in_channels(blocks)
    return [_row(block, choices) for block in blocks]


def reading_columns(rows: Sequence[Row]) -> list[Row]:
    """Keep the columns that fit on a screen: of a choice by number K alone, of others G and K.

    Example:
        >>> reading_columns([{"layer": "1", "G=32 G": 32, "G=32 K": 1.0, "G=32 K exact": 1.1}])
        [{'layer': '1', 'G=32 K': 1.0}]
    """
    left_out = re.compile(r"G=.* G|.* K exact")
    return [{t: v for t, v in row.items() if not left_out.fullmatch(t)} for row in rows]


def _row(block: UnitBlock, choices: Sequence[str | int]) -> Row:
    n_in, n_out, ratio = block.in_channels, block.norm.num_channels, block.gain_ratio
    ideal = float(ideal_num_groups(n_in, n_out, ratio))
    row: Row = {"layer": block.path, "in": n_in, "out": n_out, "G_ideal": ideal}
    for choice in choices:
        groups = block.groups(choice)
        title = f"G={choice}" if str(choice).isdecimal() else choice
        paper = exact = None
        if n_out % groups == 0:
            paper = gradient_variance_ratio(n_in, n_out, groups, ratio)
            if groups < n_out:  # groups of one value pass no gradient
                exact = n_out / n_in * exact_factor(n_out // groups) / ratio
        row[f"{title} G"] = None if paper is None else groups
        row |= {f"{title} K": paper, f"{title} K exact": exact}
    return row
