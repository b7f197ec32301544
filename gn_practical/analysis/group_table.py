"""The group table: the groups of every norm of a model and the K they give, by rule and number."""

from collections.abc import Sequence

from torch import nn

from gn_practical.analysis import Row
from gn_practical.analysis.blocks import UnitBlock, find_unit_blocks
from gn_practical.analysis.exact_factor import exact_factor
from gn_practical.num_groups import (
    gradient_variance_ratio,
    ideal_num_groups,
    practical_num_groups,
)

CHOICES = ("practical", "exact", 32, 1)


def group_table(model: nn.Module, choices: Sequence[str | int] = CHOICES) -> list[Row]:
    """List G and K of every group norm of a model, for several choices of groups.

    A row holds the layer, its channels, G_ideal of Eq. 32 before clipping, and for each choice
    "G", "K" by Eq. 31 and "K exact", with (n_g − 2)/(n_g − 3) in place of 1 + 4/n_g (infinite for
    groups of three values or fewer). Both are those of Linear layers: on a convolution a group
    holds the pixels of its channels too, and K hardly moves with G; the audit predicts it there.

    Args:
        model: any module with group norms, PGN ones bound; may be on the meta device.
        choices: "practical" (Algorithm 1), "exact" (the exact rule), "model" (as they are), or a
            number. A number that does not divide a layer's channels leaves its cells empty.

    Raises:
        ValueError: for a model without group norms, a norm whose input channels are not known, or
            an unknown choice.

    Example:
        >>> rows = group_table(nn.Sequential(nn.Linear(64, 32), nn.GroupNorm(4, 32)), ["practical"])
        >>> rows[0]["practical G"], rows[0]["practical K"], rows[0]["practical K exact"]
        (8, 1.0, 1.0)
    """
    blocks = find_unit_blocks(model)
    unknown = [block.path for block in blocks if block.in_channels is None]
    if unknown:
        raise ValueError(
            "every norm must follow a weight layer of its channels, got none for "
            f"{', '.join(unknown[:8])}. Make these PGN layers and give MODEL.PGN.IN_CHANNELS."
        )
    return [_row(block, choices) for block in blocks]


def _row(block: UnitBlock, choices: Sequence[str | int]) -> Row:
    n_in, n_out = block.in_channels, block.norm.num_channels
    row: Row = {
        "layer": block.path,
        "in": n_in,
        "out": n_out,
        "G_ideal": float(ideal_num_groups(n_in, n_out)),
    }
    for choice in choices:
        groups = _groups(choice, block)
        divides = n_out % groups == 0
        title = f"G={choice}" if str(choice).isdecimal() else choice
        row[f"{title} G"] = groups if divides else None
        row[f"{title} K"] = gradient_variance_ratio(n_in, n_out, groups) if divides else None
        row[f"{title} K exact"] = _exact_ratio(n_in, n_out, groups) if divides else None
    return row


def _groups(choice: str | int, block: UnitBlock) -> int:
    if str(choice).isdecimal() and int(choice) > 0:
        return int(choice)
    if choice == "model":
        return block.norm.num_groups
    if choice not in ("practical", "exact"):
        raise ValueError(
            "groups must be practical, exact, model or a positive number, got "
            f"groups={choice!r}. Choose among these."
        )
    rule = "paper" if choice == "practical" else "exact"
    return practical_num_groups(block.in_channels, block.norm.num_channels, rule=rule)


def _exact_ratio(in_channels: int, out_channels: int, num_groups: int) -> float | None:
    """Return Eq. 31 with the exact factor; None for groups of one value, which pass no gradient."""
    size = out_channels // num_groups
    return out_channels / in_channels * exact_factor(size) if size > 1 else None
