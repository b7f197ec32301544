"""What a norm layer must have for the rest of the package, whatever its class.

The channels of any norm, the groups of one that has them, how it is bound to the layer that feeds
it, and how it takes along what follows it. A class that has these is treated as ours are.
"""

import inspect
from functools import cache
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class BindableNorm(Protocol):
    """A norm whose groups follow from the layer that feeds it, as ``bind_group_norms`` sets them.

    While it is unbound ``num_groups`` is 0, and ``in_channels``, of that layer, None.
    """

    num_channels: int
    num_groups: int
    in_channels: int | None

    def bind(self, in_channels: int, num_groups: int) -> None:
        """Set ``in_channels`` and ``num_groups``."""


@runtime_checkable
class OwnActivation(Protocol):
    """A norm whose activation is another one than the ReLU whose place it takes."""

    def take_relu(self) -> None:
        """Prepare for taking the place of the ReLU that follows. A second call changes nothing."""

    def activate(self, y: Tensor) -> Tensor:
        """Apply the activation alone, where a hook must see the norm without it."""


def is_fusable(module: object) -> bool:
    """Whether a module is a norm that adds a residual and applies its activation when told to.

    Its call is ``norm(x, residual=None, relu=False)``.

    Example:
        >>> is_fusable(nn.GroupNorm(2, 8))
        False
    """
    return _takes_relu(type(module))


@cache
def _takes_relu(kind: type) -> bool:
    if not issubclass(kind, nn.Module):
        return False
    return {"residual", "relu"} <= inspect.signature(kind.forward).parameters.keys()


def norm_channels(module: nn.Module) -> int | None:
    """Return the channels of a normalization layer, None for any other module.

    A norm has ``num_channels`` or ``num_features``, ``eps``, and weights of one number a channel
    or none: batch, group and instance norms of torch, Detectron2, timm and this package.

    Example:
        >>> norm_channels(nn.BatchNorm2d(8)), norm_channels(nn.Conv2d(8, 8, 1))
        (8, None)
    """
    channels = getattr(module, "num_channels", getattr(module, "num_features", None))
    if not (isinstance(channels, int) and channels and hasattr(module, "eps")):
        return None
    weight = getattr(module, "weight", None)
    return channels if weight is None or weight.shape == (channels,) else None


def norm_groups(module: nn.Module) -> int | None:
    """Return the number of groups of a group norm, None for any other module.

    Example:
        >>> norm_groups(nn.GroupNorm(2, 8)), norm_groups(nn.BatchNorm2d(8))
        (2, None)
    """
    return getattr(module, "num_groups", None) if norm_channels(module) else None
