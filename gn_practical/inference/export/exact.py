"""A model in float64, to tell whose rounding a difference is."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def predict_in_float64(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Return what a model predicts for a picture with all its numbers in float64.

    But for boxes, which are of float32 in Detectron2, the proposals of the second stage as well.

    Args:
        model: a detector in evaluation mode; it stays as it is.
        given: as the model takes it.
    """
    with torch.no_grad(), _NmsInFloat32():
        return copy.deepcopy(model).double()([{**given, "image": given["image"].double()}])[0]


class _NmsInFloat32(TorchFunctionMode):
    """Detectron2 gives boxes of float32 and scores of float64, which torchvision refuses."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.torchvision.nms:
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        return func(*args, **(kwargs or {}))
