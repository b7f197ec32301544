"""Group normalization as exported graphs have it.

PyTorch's own export makes instance norms of reshaped maps, which onnxruntime sums less accurately,
and which it cannot reshape where nothing was found.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FAST, PLAIN, ONNX = "fast", "plain", "onnx"
DOMAIN = "gn_practical"  # of GroupNormalization, until the file is of an opset that has it
# Far below the eps of any norm, so that it can be taken off again.
_TINY = 1e-12


class GroupNormAs(TorchFunctionMode):
    """While it is active, ``F.group_norm`` runs as operators that an ONNX file shall hold.

    "fast": what onnxruntime's CPU kernels do in the fewest passes over a map: the moments of each
    channel from LayerNormalization, and the rest as a convolution of each channel by itself, which
    takes a ReLU along. "plain": means, differences and products, which any runtime has. "onnx": the
    operator GroupNormalization; but norms of the parts of a picture, whose number may be 0, are
    plain.

    Args:
        kind: "fast", "plain" or "onnx".
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
        of_part = id(weight) in self._of_parts
        weight = torch.ones(int(input.shape[1])) if weight is None else weight
        bias = torch.zeros_like(weight) if bias is None else bias
        if self._kind == ONNX and not of_part:
            return _GroupNormalization.apply(input, num_groups, weight, bias, eps)
        if self._kind == FAST and input.dim() == 4:
            run = _by_layer_norm if of_part else _by_convolution
            return run(input, num_groups, weight, bias, eps)
        return _by_means(input, num_groups, weight, bias, eps)


def _by_means(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    centered = x - _group_mean(x, num_groups)
    std = (_group_mean(centered * centered, num_groups) + eps).sqrt()
    return centered * (weight.view(shape) / std) + bias.view(shape)


def _by_convolution(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the maps of one picture."""
    channels = weight.numel()
    mean, rstd = _Moments.apply(x.flatten(2), torch.ones_like(x[0, 0].flatten()))
    mean, variance = mean.view(-1, channels, 1, 1), rstd.view(-1, channels, 1, 1) ** -2 - _TINY
    center = _group_mean(mean, num_groups)
    variance = _group_mean(variance + (mean - center) ** 2, num_groups)
    scale = weight.view(-1, 1, 1) / (variance + eps).sqrt()
    shift = bias.view(-1, 1, 1) - center * scale
    filters = scale.reshape(channels, 1, 1, 1)
    return F.conv2d(x, filters, shift.reshape(channels), groups=channels)


def _by_layer_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize maps of a known size, of any number of parts."""
    shape = tuple(map(int, x.shape[1:]))
    if num_groups == 1:
        weight, bias = (each.view(-1, 1, 1).expand(shape) for each in (weight, bias))
        return F.layer_norm(x, shape, weight, bias, eps)
    size = weight.numel() // num_groups * shape[1] * shape[2]
    normalized = F.layer_norm(x.reshape(-1, num_groups, size), (size,), eps=eps)
    return normalized.reshape(-1, *shape) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


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
    return means.reshape(-1, channels, *[1] * (x.dim() - 2))


class _Moments(torch.autograd.Function):
    """Mean and 1 / standard deviation of each channel, (N, C, 1), as ONNX's layer norm has them."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
        _, mean, rstd = torch.native_layer_norm(flat, flat.shape[2:], ones, None, _TINY)
        return mean, rstd

    @staticmethod
    def symbolic(g: Any, flat: Any, ones: Any) -> tuple[Any, Any]:
        options = {"axis_i": -1, "epsilon_f": _TINY, "outputs": 3}
        _, mean, rstd = g.op("LayerNormalization", flat, ones, **options)
        return mean, rstd


class _GroupNormalization(torch.autograd.Function):
    """The operator of opset 21, which PyTorch's exporter does not reach."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    @staticmethod
    def symbolic(g: Any, x: Any, num_groups: int, weight: Any, bias: Any, eps: float) -> Any:
        options = {"num_groups_i": num_groups, "epsilon_f": eps}
        made = g.op(f"{DOMAIN}::GroupNormalization", x, weight, bias, **options)
        return made.setType(x.type())
