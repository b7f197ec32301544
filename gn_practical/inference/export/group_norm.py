"""Group normalization as exported graphs have it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PLAIN, ONNX = "plain", "onnx"
DOMAIN = "gn_practical"  # of GroupNormalization, until the file is of an opset that has it


class GroupNormAs(TorchFunctionMode):
    """While it is active, ``F.group_norm`` runs as operators that an ONNX file shall hold.

    "plain": means, differences and products. PyTorch's own export makes instance norms of
    reshaped maps instead, which onnxruntime sums less accurately, one channel at a time, and cannot
    reshape where nothing was found. "onnx": the operator GroupNormalization, but for norms of the
    parts of a picture, whose number may be 0.

    Args:
        kind: "plain" or "onnx".
        model: whose norms they are.
    """

    def __init__(self, kind: str, model: nn.Module) -> None:
        super().__init__()
        heads = getattr(model, "roi_heads", nn.Identity())
        self._of_parts = {id(each) for each in heads.parameters()}
        self._kind = kind

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or what stands for it."""
        if func in (F.group_norm, torch.group_norm):
            return self._normalize(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _normalize(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> Tensor:
        if self._kind == ONNX and id(weight) not in self._of_parts:
            return _GroupNormalization.apply(input, num_groups, weight, bias, eps)
        shape = (-1, *[1] * (input.dim() - 2))
        weight, bias = (None if each is None else each.view(shape) for each in (weight, bias))
        centered = input - _group_mean(input, num_groups)
        std = (_group_mean(centered * centered, num_groups) + eps).sqrt()
        normalized = centered * (1 / std if weight is None else weight / std)
        return normalized if bias is None else normalized + bias


def _group_mean(x: Tensor, num_groups: int) -> Tensor:
    """Return the mean of each channel's group, (N, C or 1, 1, ...).

    By rows, columns and channels in turn: sums of few numbers lose little, and no map of unknown
    size is reshaped.
    """
    for axis in range(x.dim() - 1, 1, -1):
        x = x.mean(axis, keepdim=True)
    channels = int(x.shape[1])
    if num_groups in (1, channels):
        return x.mean(1, keepdim=True) if num_groups == 1 else x
    size = channels // num_groups
    means = x.view(-1, num_groups, size).mean(2, keepdim=True).expand(-1, -1, size)
    return means.reshape(-1, channels, *x.shape[2:])


class _GroupNormalization(torch.autograd.Function):
    """The operator of opset 21, which PyTorch's exporter does not reach, in a domain of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    @staticmethod
    def symbolic(g: Any, x: Any, num_groups: int, weight: Any, bias: Any, eps: float) -> Any:
        made = g.op(
            f"{DOMAIN}::GroupNormalization", x, weight, bias, num_groups_i=num_groups, epsilon_f=eps
        )
        return made.setType(x.type())
