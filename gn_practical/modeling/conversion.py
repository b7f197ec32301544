"""Weight standardization for the convolutions of a model that has been built."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from detectron2 import layers
from torch import nn

from gn_practical.layers import WSConv2d
from gn_practical.modeling.binding import find_producers


def convert_to_ws(model: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Turn every convolution that a norm follows into a :class:`WSConv2d`, in place.

    Modules and parameters stay the same objects, so optimizers, hooks and frozen stages see no
    difference; a second call changes nothing. Convolutions whose paths match a shell-style pattern
    of ``exclude`` keep plain weights. Returns the paths of the others, in the order of the model.

    Raises:
        ValueError: if a pattern matches nothing, or a layer that a norm follows cannot be
            standardized (a deformable convolution, filters of a single number); with the paths.

    Example:
        >>> from torchvision.models import resnet18
        >>> len(convert_to_ws(resnet18()))
        20
    """
    producers = [p for p in find_producers(model) if not isinstance(p.layer, nn.Linear)]
    for pattern in exclude:
        if not any(fnmatchcase(p.path, pattern) for p in producers):
            raise ValueError(
                f"MODEL.WS.EXCLUDE must match convolutions that a norm follows, got {pattern!r}, "
                f"which matches none of the {len(producers)}. Correct or remove the pattern."
            )
    chosen = [p for p in producers if not any(fnmatchcase(p.path, x) for x in exclude)]
    others = [f"{p.path} ({_reason(p.layer)})" for p in chosen if _reason(p.layer)]
    if others:
        raise ValueError(
            "weight standardization must meet plain convolutions with filters of at least two "
            f"numbers, got {', '.join(others)}. List them in MODEL.WS.EXCLUDE, or in "
            "convert_to_ws(model, exclude=...)."
        )
    for conv in (producer.layer for producer in chosen):
        if type(conv) is nn.Conv2d:
            conv.norm = conv.activation = None  # what detectron2.layers.Conv2d has besides
        if not isinstance(conv, WSConv2d):
            conv.__class__ = WSConv2d
    return [producer.path for producer in chosen]


def _reason(layer: nn.Module) -> str:
    """Why a layer cannot be standardized: its type, or its filters; empty where it can."""
    if type(layer) not in (nn.Conv2d, layers.Conv2d) and not isinstance(layer, WSConv2d):
        return f"a {type(layer).__name__}"
    return "" if layer.weight[0].numel() > 1 else "filters of a single number"
