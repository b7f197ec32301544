"""The unit blocks of a model: its group norms and the layers that feed them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from gn_practical.modeling.binding import (
    bound_to,
    find_producers,
    layer_channels,
    producer_paths,
    some,
)
from gn_practical.num_groups import resolve_num_groups


class UnitBlock(NamedTuple):
    """A group norm and the weight layer that feeds it, each with its path in the model.

    ``layer`` is None where it is not known or not one layer, ``in_channels`` where it is not known;
    ``gain_ratio`` is F / B of the activation that the norm was bound for.
    """

    path: str
    norm: nn.GroupNorm
    layer_path: str
    layer: nn.Module | None
    in_channels: int | None
    gain_ratio: float

    def groups(self, choice: str | int) -> int:
        """Return the number of groups that a choice means: "model" as it is, or a resolved one."""
        if choice == "model":
            return self.norm.num_groups
        channels = (self.in_channels or 1, self.norm.num_channels)
        return resolve_num_groups(choice, *channels, self.gain_ratio)


def find_unit_blocks(model: nn.Module) -> list[UnitBlock]:
    """List the group norms of a model, PGN and plain, with the layers that feed them.

    A PGN norm says what it was bound to; what feeds a plain one is what the modules tell.

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
            f"PGN layers must be bound, got {len(unbound)} that are not, at {some(unbound)}. "
            "Call gn_practical.bind_group_norms(model) first."
        )
    modules = dict(model.named_modules())
    told = {id(producer.norm): producer for producer in find_producers(model)}
    blocks = []
    for path, norm in norms.items():
        n_in, feeds = getattr(norm, "in_channels", None), producer_paths(path, norm)
        if not feeds and id(norm) in told:
            feeds = [told[id(norm)].path]
            n_in = n_in or layer_channels(told[id(norm)].layer)[0]
        layer = modules.get(feeds[0]) if len(feeds) == 1 else None
        ratio = bound_to(norm).gain_ratio
        blocks.append(UnitBlock(path, norm, ", ".join(feeds), layer, n_in, ratio))
    return blocks


def choose_groups(choice: str | int, blocks: Sequence[UnitBlock]) -> list[int]:
    """Return the number of groups of each block for a choice, as :func:`audit_isometry` names it.

    Raises:
        ValueError: for an unknown choice, or groups that do not divide; naming the layers.

    Example:
        >>> blocks = find_unit_blocks(nn.Sequential(nn.Linear(64, 32), nn.GroupNorm(4, 32)))
        >>> choose_groups("practical", blocks), choose_groups("instance", blocks)
        ([8], [32])
    """
    groups = [block.groups(choice) for block in blocks]
    if choice not in ("model", "instance") and not str(choice).isdecimal():
        check_in_channels(blocks)
    wrong = [
        f"{b.path} ({b.norm.num_channels})"
        for b, number in zip(blocks, groups, strict=True)
        if b.norm.num_channels % number
    ]
    if wrong:
        raise ValueError(
            f"groups must divide the channels of every norm, got groups={choice} for "
            f"{some(wrong)}. Choose a common divisor, practical, exact or instance."
        )
    return groups


def check_in_channels(blocks: Sequence[UnitBlock]) -> None:
    """Raise ValueError, with their paths, for blocks whose input channels are not known."""
    unknown = [block.path for block in blocks if block.in_channels is None]
    if unknown:
        raise ValueError(
            "every norm must follow a weight layer of its channels, got none that is known for "
            f"{some(unknown)}. Make these PGN layers and give MODEL.PGN.IN_CHANNELS, or "
            "bind_group_norms their in_channels or example_inputs."
        )
