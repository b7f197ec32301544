"""Each norm gets the channels of the weight layer that feeds it, and from them its groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from gn_practical.layers.protocol import BindableNorm, norm_channels
from gn_practical.num_groups import (
    gradient_variance_ratio,
    ideal_num_groups,
    practical_num_groups,
)

# One (pattern, value) entry of a config key.
PatternValues = Sequence[tuple[str, int]]
# In place of a number of groups: as many as the layer has channels, which is instance norm.
ALL_CHANNELS = -1


@dataclass(frozen=True)
class GroupNormBinding:
    """A norm layer, the weight layer that feeds it, and what follows for its groups.

    Attributes:
        norm: path of the norm in the model.
        producer: path of the weight layer before it; empty where the user gave the channels.
        in_channels: n_in of the weight layer.
        out_channels: n_out of the weight layer, the channels of the norm.
        ideal_num_groups: G_ideal of Eq. 32, before clipping.
        num_groups: G as set.
        gradient_variance_ratio: K(G) of Eq. 31.
    """

    norm: str
    producer: str
    in_channels: int
    out_channels: int
    ideal_num_groups: float
    num_groups: int
    gradient_variance_ratio: float


class Producer(NamedTuple):
    """A norm layer and the weight layer that feeds it, each with its path in the model."""

    norm_path: str
    norm: nn.Module
    path: str
    layer: nn.Module


def bind_group_norms(
    model: nn.Module,
    num_groups: int = 0,
    *,
    rule: str = "paper",
    gain_ratio: float = 1,
    layer_num_groups: PatternValues = (),
    in_channels: PatternValues = (),
) -> list[GroupNormBinding]:
    """Bind every ``PracticalGroupNorm`` of ``model`` to the layer that feeds it, in place.

    A norm belongs to the layer whose attribute it is (``conv.norm``), or else to the nearest
    weight layer before it among its siblings (``conv1, bn1, conv2, bn2``; ``Sequential``). Where
    that layer's output channels differ from the norm's, or two norms claim one layer, nothing is
    guessed.

    Args:
        model: any module; Detectron2's, torchvision's or your own.
        num_groups: 0 for ``rule``, layer by layer; or one number for all layers; -1 for as many
            groups as channels.
        rule: "paper" (Algorithm 1) or "exact", see :func:`practical_num_groups`.
        gain_ratio: F / B of the activation after the norms, 1 for the ReLU family; see
            :func:`gn_practical.activation_gain.gain_ratio`.
        layer_num_groups: (pattern, number of groups) for single norms, by shell-style pattern on
            their path; the last match wins.
        in_channels: (pattern, input channels) for norms whose producer cannot be inferred.

    Returns:
        One entry a norm, in the order of the model.

    Raises:
        ValueError: if a norm's producer cannot be inferred, a number of groups does not divide a
            layer's channels, or a pattern matches no norm; with the paths of the layers.

    Example:
        >>> from gn_practical import PracticalGroupNorm
        >>> from torchvision.models import resnet18
        >>> model = resnet18(norm_layer=PracticalGroupNorm)
        >>> table = bind_group_norms(model)
        >>> len(table), model.bn1
        (20, PracticalGroupNorm(3 -> 64, num_groups=1, eps=1e-05, affine=True))
    """
    norms = {p: m for p, m in model.named_modules() if isinstance(m, BindableNorm)}
    given = _match(in_channels, norms, "in_channels")
    groups = _match(layer_num_groups, norms, "layer_num_groups")
    producers = {p.norm_path: p for p in find_producers(model) if p.norm_path in norms}
    _raise_unbound(model, [p for p in norms if p not in producers and p not in given])
    table = []
    for path, norm in norms.items():
        producer = producers.get(path)
        n_in = given[path] if path in given else layer_channels(producer.layer)[0]
        chosen = groups.get(path, num_groups)
        chosen = norm.num_channels if chosen == ALL_CHANNELS else chosen
        chosen = chosen or practical_num_groups(n_in, norm.num_channels, gain_ratio, rule)
        _bind(norm, path, n_in, chosen)
        table.append(_describe(norm, path, producer.path if producer else "", gain_ratio))
    return table


def find_producers(model: nn.Module) -> list[Producer]:
    """List the norms of a model with the weight layer that feeds each, where that is certain.

    Norms of any kind are listed: batch, group and layer norms, Detectron2's and torch's. A norm
    is left out where the layer before it has other channels, or where another norm claims the
    same layer.

    Args:
        model: any module.
    """
    claims = list(_claims(model))
    claimed = [id(c.layer) for c in claims]
    return [c for c in claims if claimed.count(id(c.layer)) == 1]


def layer_channels(layer: nn.Module) -> tuple[int, int]:
    """Return (in_channels, out_channels) of a convolution or a Linear layer.

    Raises:
        TypeError: for a module that is no weight layer.
    """
    channels = _channels(layer)
    if channels is None:
        raise TypeError(f"a weight layer must have input and output channels, got {layer!r}.")
    return channels


def _channels(layer: nn.Module) -> tuple[int, int] | None:
    """Channels of anything that looks like a convolution (deformable ones too) or a Linear."""
    if not hasattr(layer, "weight"):
        return None
    for n_in, n_out in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if isinstance(getattr(layer, n_in, None), int) and hasattr(layer, n_out):
            return getattr(layer, n_in), getattr(layer, n_out)
    return None


def _claims(model: nn.Module) -> Iterator[Producer]:
    for parent_path, parent in model.named_modules():
        prefix = f"{parent_path}." if parent_path else ""
        last = (parent_path, parent) if _channels(parent) else None
        for name, child in parent.named_children():
            if _channels(child):
                last = (prefix + name, child)
            channels = norm_channels(child)
            if channels and last and _channels(last[1])[1] == channels:
                yield Producer(prefix + name, child, *last)


def _bind(norm: BindableNorm, path: str, in_channels: int, num_groups: int) -> None:
    try:
        norm.bind(in_channels, num_groups)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _describe(norm: BindableNorm, path: str, producer: str, gain_ratio: float) -> GroupNormBinding:
    channels = (norm.in_channels, norm.num_channels)
    return GroupNormBinding(
        norm=path,
        producer=producer,
        in_channels=norm.in_channels,
        out_channels=norm.num_channels,
        ideal_num_groups=float(ideal_num_groups(*channels, gain_ratio)),
        num_groups=norm.num_groups,
        gradient_variance_ratio=gradient_variance_ratio(*channels, norm.num_groups, gain_ratio),
    )


def _match(entries: PatternValues, norms: dict[str, nn.Module], name: str) -> dict[str, int]:
    """Expand patterns to paths; later entries win."""
    matched: dict[str, int] = {}
    for entry in entries:
        if not (isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(
                f"{name} must hold (pattern, number) pairs, got {entry!r}. "
                'Write it like (("backbone.*.norm", 32),).'
            )
        paths = [path for path in norms if fnmatchcase(path, entry[0])]
        if not paths:
            raise ValueError(
                f"{name} must match at least one PGN layer, got pattern {entry[0]!r}. The model "
                f"has {len(norms)} such layers: {_some(list(norms))}."
            )
        matched.update(dict.fromkeys(paths, entry[1]))
    return matched


def _raise_unbound(model: nn.Module, paths: list[str]) -> None:
    if not paths:
        return
    raise ValueError(
        f"every PGN layer must follow a weight layer of its channels, got {len(paths)} in "
        f"{type(model).__name__} whose input cannot be inferred: {_some(paths)}. Give the input "
        "channels of the layer that feeds them: MODEL.PGN.IN_CHANNELS "
        f'((("{paths[0]}", 256),) for example) or bind_group_norms(model, in_channels=...).'
    )


def _some(paths: list[str], most: int = 20) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(paths[:most]) or "none") + more
