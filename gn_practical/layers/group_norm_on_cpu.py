"""Group normalization in training on the CPU, where PyTorch's own is inexact or slow.

Its dγ loses digits for means that are large beside the standard deviation, and its backward pass
is scalar code for channels_last with narrow groups. All else is PyTorch's.
"""

import math
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gn_practical.layers.backends import DTYPES, differentiable_grads, memory_format
from gn_practical.layers.torch_internals import batch_norm_backward, transforms_active

SLAB = 2048  # pixels that a thread of the backward pass of channels_last adds up in one go
SMALL = 2**17  # values of an input whose norm takes some 0.1 ms
LARGE_MEAN = 16  # in standard deviations: four bits of a float32 sum are lost


def group_norm_in_training(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norm, and the input that it took: ``x``, or ``x`` less its groups' means.

    The norm of both is the same. PyTorch's dγ = (Σ dy x - mean Σ dy) rstd cancels for a large mean.
    Subtracting it costs a pass, so it is for large means alone, and no memory: the difference is
    stored in place of ``x``. Below ``SMALL`` values even looking at the means would cost more than
    5 %, and few values cancel little.
    """
    if _is_slow(x, num_groups, weight, bias):
        return _ManyGroups.apply(x, weight, bias, num_groups, eps)[0], x
    differentiated = x.requires_grad or (weight is not None and weight.requires_grad)
    if (
        x.numel() < SMALL
        or x.dtype is not torch.float32
        or not differentiated
        or transforms_active()
    ):
        return torch.group_norm(x, num_groups, weight, bias, eps), x
    x = x.contiguous(memory_format=memory_format(x))
    batch, channels = x.shape[:2]
    sizes = (batch, channels, x.numel() // (batch * channels), num_groups)
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
    if _largest_mean(mean, rstd) < LARGE_MEAN:
        return y, x
    mean = mean.detach().repeat_interleave(channels // num_groups, 1)
    x = x - mean.view(batch, channels, *[1] * (x.dim() - 2))
    return torch.native_group_norm(x, weight, bias, *sizes, eps)[0], x


def _largest_mean(mean: Tensor, rstd: Tensor) -> float:
    """Return the largest absolute mean of a group, in its standard deviations."""
    if mean.numel() <= 16:  # three calls of operators would take three times as long
        pairs = zip(chain(*mean.tolist()), chain(*rstd.tolist()), strict=True)
        return max([abs(m * r) for m, r in pairs])
    return torch.linalg.vector_norm(mean.detach() * rstd.detach(), math.inf).item()


def _is_slow(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether PyTorch's backward runs in scalar code: channels_last, groups narrower than a vector.

    It then takes 3 to 40 times as long as with few groups. Samples are done one by one here, so
    there must be few of them for their size.
    """
    return (
        x.shape[1] // num_groups * x.element_size() < 32
        and x.numel() >= x.shape[0] * 2**18
        and memory_format(x) is torch.channels_last
        and x.requires_grad
        and weight is not None
        and bias is not None
        and weight.dtype == bias.dtype == torch.float32
        and x.dtype in DTYPES
    )


class _ManyGroups(torch.autograd.Function):
    """``F.group_norm`` whose backward pass uses the vectorized one of PyTorch's batch norm.

    In its evaluation mode that gives, of one sample, Σ dy x̂ and Σ dy of each channel.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple:
        shape = (x.shape[0], x.shape[1], x[0, 0].numel())
        return torch.native_group_norm(x, weight, bias, *shape, groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(x, weight, bias, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = differentiable_grads(
                lambda *args: F.group_norm(args[0], ctx.groups, *args[1:], ctx.eps),
                (x, weight, bias),
                dy,
            )
            return *grads, None, None
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        samples = zip(dy.split(1), x.split(1), mean, rstd, dx.split(1), strict=True)
        sums = [_sample_backward(d, t, weight, m, r, out) for d, t, m, r, out in samples]
        grad_weight, grad_bias = torch.stack(sums).sum(0)
        return dx, grad_weight, grad_bias, None, None


def _sample_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, out: Tensor
) -> Tensor:
    """Write dx of one sample to ``out`` and return its dγ and dβ, of shape (2, C)."""
    channels, groups = x.shape[1], len(mean)
    mean, rstd = (t.float().repeat_interleave(channels // groups) for t in (mean, rstd))
    # In slabs, because each thread adds up one pixel after the other, inexactly for many.
    slabs = max(1, SLAB * torch.get_num_threads() // x.shape[3])
    parts = [
        batch_norm_backward(
            d, t, weight, mean, rstd.pow(-2), None, None, False, 0.0, [False, True, True]
        )
        for d, t in zip(dy.split(slabs, 2), x.split(slabs, 2), strict=True)
    ]
    sums = torch.stack([torch.stack(part[1:]) for part in parts]).sum(0)  # Σ dy x̂, Σ dy
    means = (sums * weight).view(2, groups, -1).sum(-1) / (x[0].numel() // groups)
    slope, constant = means.repeat_interleave(channels // groups, 1)
    # dx = rstd (weight dy - constant - x̂ slope), as an affine map of x and dy.
    of_x, of_dy = -rstd.square() * slope, weight * rstd
    shift = -rstd * (constant - mean * rstd * slope)
    of_x, of_dy, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in (of_x, of_dy, shift))
    for d, t, o in zip(*(each.split(slabs, 2) for each in (dy, x, out)), strict=True):
        torch.addcmul(shift, t, of_x, out=o).addcmul_(d, of_dy)
    return sums
