"""Weight standardization taken out of a model that is exported."""

import torch
from detectron2.layers import Conv2d
from torch import nn

from gn_practical.layers import WSConv2d, standardize_weight
from gn_practical.modeling.fusion import FusedConv2d, FusedWSConv2d

_PLAIN = {WSConv2d: Conv2d, FusedWSConv2d: FusedConv2d}


def fold_standardization(model: nn.Module) -> int:
    """Replace weights by what their convolutions compute with; exact.

    The model is changed in place, and should be a copy: its checkpoints would standardize twice.

    Returns:
        How many convolutions had it.

    Raises:
        ValueError: for a subclass of ``WSConv2d`` that is not known here.

    Example:
        >>> model, x = WSConv2d(3, 8, 3), torch.randn(1, 3, 8, 8)
        >>> before = model(x)
        >>> fold_standardization(model), type(model).__name__, torch.equal(model(x), before)
        (1, 'Conv2d', True)
    """
    convs = [each for each in model.modules() if isinstance(each, WSConv2d)]
    for conv in convs:
        if type(conv) not in _PLAIN:
            raise ValueError(
                "standardization can be folded into WSConv2d, got a convolution of the class "
                f"{type(conv).__name__}. Export the model without it."
            )
        with torch.no_grad():
            conv.weight.copy_(standardize_weight(conv.weight))
        conv.__class__ = _PLAIN[type(conv)]
    return len(convs)
