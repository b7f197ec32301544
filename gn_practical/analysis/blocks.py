"""The unit blocks of a model: its group norms and the layers that feed them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from gn_practical.modeling.binding import find_producers, layer_channels
from gn_practical.num_groups import practical_num_groups


class UnitBlock(NamedTuple):
    """A group norm and the weight layer that feeds it, each with its path in the model.

    ``layer`` is None where it cannot be inferred; ``in_channels`` too, unless the norm was told.
    """

    path: str
    norm: nn.GroupNorm
    layer_path: str
    layer: nn.Module | None
    in_channels: int | None


def find_unit_blocks(model: nn.Module) -> list[UnitBlock]:
    """List the group norms of a model, PGN and plain, with the layers that feed them.

    Raises:
        ValueError: for a model without group norms, or with PGN norms that are not bound.

    Example:
        >>> find_unit_blocks(nn.Sequential(nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4)))[0].layer_path
        '0'
    """
    norms = {path: m for path, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    if not norms:
        raise ValueError(
            f"the model must have group norms, got none in {type(model).__name__}. Set its norm "
            'keys (MODEL.RESNETS.NORM, MODEL.FPN.NORM, ...) to "PGN" or "GN".'
        )
    unbound = [path for path, norm in norms.items() if not norm.num_groups]
    if unbound:
        raise ValueError(
            f"PGN layers must be bound, got {len(unbound)} that are not: {', '.join(unbound[:8])}. "
            "Call gn_practical.bind_group_norms(model) first."
        )
    producers = {p.norm_path: p for p in find_producers(model)}
    return [_unit_block(path, norm, producers.get(path)) for path, norm in norms.items()]


def choose_groups(choice: str | int, blocks: Sequence[UnitBlock]) -> list[int]:
    """Return the number of groups of each block for a choice, as :func:`audit_isometry` names it.

    Raises:
        ValueError: for an unknown choice, or groups that do not divide; naming the layers.

    Example:
        >>> blocks = find_unit_blocks(nn.Sequential(nn.Linear(64, 32), nn.GroupNorm(4, 32)))
        >>> choose_groups("practical", blocks), choose_groups("instance", blocks)
        ([8], [32])
    """
    if str(choice).isdecimal() and int(choice) > 0:
        _check_divides(int(choice), blocks)
        return [int(choice)] * len(blocks)
    if choice == "model":
        return [block.norm.num_groups for block in blocks]
    if choice == "instance":
        return [block.norm.num_channels for block in blocks]
    if choice not in ("practical", "exact"):
        raise ValueError(
            "groups must be model, practical, exact, instance or a positive number, got "
            f"groups={choice!r}. Choose among these."
        )
    unknown = [block.path for block in blocks if block.in_channels is None]
    if unknown:
        raise ValueError(
            f"groups={choice} must know the input channels of every norm, got none for "
            f"{', '.join(unknown[:8])}. Make these PGN layers and give MODEL.PGN.IN_CHANNELS."
        )
    rule = "paper" if choice == "practical" else "exact"
    return [practical_num_groups(b.in_channels, b.norm.num_channels, rule=rule) for b in blocks]


def _unit_block(path: str, norm: nn.GroupNorm, producer: Any) -> UnitBlock:
    told = getattr(norm, "in_channels", None)
    if producer is None:
        return UnitBlock(path, norm, "", None, told)
    n_in = told or layer_channels(producer.layer)[0]
    return UnitBlock(path, norm, producer.path, producer.layer, n_in)


def _check_divides(number: int, blocks: Sequence[UnitBlock]) -> None:
    wrong = [f"{b.path} ({b.norm.num_channels})" for b in blocks if b.norm.num_channels % number]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"groups must divide the channels of every norm, got groups={number} for "
            f"{', '.join(wrong[:8])}{more}. Choose a common divisor, practical, exact or instance."
        )
