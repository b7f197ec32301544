"""Group normalization, residual sum and ReLU as one operator.

On CUDA it runs the Triton kernels of :mod:`gn_practical.layers.group_norm_kernels`; under
``torch.compile``, or whatever else must see operators, as the custom operator
``gn_practical::group_norm``. Everything else runs PyTorch's own operators: the CPU, float64, empty
batches, double backward, tracing, scripting and export. The numbers are the same;
:func:`gn_practical.layers.backends.backend` says which it is.
"""

from functools import cache
from itertools import product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gn_practical.layers import recomputation
from gn_practical.layers.backends import (
    INTERPRETED,
    agrees,
    differentiable_grads,
    kernels_run,
    memory_format,
    relative_difference,
)
from gn_practical.layers.group_norm_on_cpu import group_norm_in_training
from gn_practical.layers.torch_internals import is_plain

# Small groups and large ones, which run other kernels.
CHECKED = tuple(product((24, 68), (torch.contiguous_format, torch.channels_last)))


def fused_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Normalize groups of channels, add ``residual``, apply ReLU: act(GN(x) + residual).

    Each group of C/G channels of a sample is normalized by its mean and biased variance, eps under
    the root, in float32 at least. The output has the dtype and layout of ``x``, under autocast too,
    and errors are those of ``torch.nn.functional.group_norm``.

    Args:
        x: input, contiguous or channels_last; other layouts are made contiguous.
        num_groups: G, a divisor of C.
        weight: scale of each channel, of shape (C,); float32 beside a half-precision ``x`` is fine.
        bias: shift of each channel, of shape (C,).
        eps: added to the variance.
        residual: of the shape of ``x``, added before the activation.
        relu: apply ReLU last.

    Shape:
        - Input and output: (N, C, *)

    Raises:
        RuntimeError: for groups that do not divide C, or parameters of another size than C.

    Example:
        >>> x = torch.randn(2, 64, 8, 8)
        >>> y = fused_group_norm(x, 64, relu=True)
        >>> torch.allclose(y, F.relu(F.group_norm(x, 64)))
        True
    """
    if torch.jit.is_scripting():
        return _compose(x, num_groups, weight, bias, eps, residual, relu)
    if (x.is_cuda or INTERPRETED) and _kernels_take(x, num_groups, weight, bias, residual):
        weight = x.new_ones(x.shape[1]) if weight is None else weight
        bias = x.new_zeros(x.shape[1]) if bias is None else bias
        inputs = (x, weight, bias, residual, num_groups, eps, relu)
        return _FusedGroupNorm.apply(*inputs) if is_plain(x) else _group_norm(*inputs)[0]
    if not torch.is_autocast_enabled(x.device.type):
        return _run_pytorch(x, num_groups, weight, bias, eps, residual, relu)
    with torch.autocast(x.device.type, enabled=False):  # it would return float32 on CUDA
        return _run_pytorch(x, num_groups, weight, bias, eps, residual, relu)


def _kernels_take(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> bool:
    if not (kernels_run(x, _kernels_agree) and _has_groups(x, num_groups)):
        return False
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return False
    channels, device = x.shape[1:2], x.device
    for parameter in (weight, bias):  # not all(): a generator costs more than what it asks
        if parameter is not None and (parameter.shape != channels or parameter.device != device):
            return False
    return True


def _has_groups(x: Tensor, num_groups: int) -> bool:
    """Whether ``x`` has such groups, of several values each: else PyTorch refuses it, mostly."""
    return (
        x.dim() > 1
        and num_groups > 0
        and x.shape[1] % num_groups == 0
        and x.numel() > x.shape[0] * num_groups > 0
    )


@torch.compiler.assume_constant_result
def _kernels_agree(device: torch.device) -> bool:
    return agrees(_largest_difference, device)


def _largest_difference(device: torch.device) -> float:
    """Compare outputs and gradients of the kernels and of PyTorch on small inputs."""
    return max(_difference(device, size, layout) for size, layout in CHECKED)


def _difference(device: torch.device, size: int, layout: torch.memory_format) -> float:
    x = torch.linspace(0, 99, 16 * size * size, device=device).sin().add(1).view(2, 8, size, size)
    return relative_difference(
        lambda *tensors: _FusedGroupNorm.apply(*tensors, 2, 1e-5, True),
        lambda x, weight, bias, residual: _compose(x, 2, weight, bias, 1e-5, residual, True),
        (x.contiguous(memory_format=layout), x[0, :, 0, 0] + 1, x[1, :, 0, 0], x.flip(0)),
    )


def _compose(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """The definition, in PyTorch's operators; differentiable any number of times."""
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return F.relu(y) if relu else y


def _run_pytorch(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """The same as :func:`_compose`, in place where that is safe, and without slow cases."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return _compose(x, num_groups, weight, bias, eps, residual, relu)
    if not x.is_cpu:  # only the CPU's operator takes parameters of another dtype
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if not _has_groups(x, num_groups):  # PyTorch's errors stay as they are
        y = F.group_norm(x, num_groups, weight, bias, eps)
    elif x.is_cpu and torch.is_grad_enabled():
        y, x = group_norm_in_training(x, num_groups, weight, bias, eps)
    else:
        y = torch.group_norm(x, num_groups, weight, bias, eps)
    if residual is not None:
        y.add_(residual)
    if recomputation.is_active():  # before the ReLU, which stores its output
        recomputation.remember(
            y,
            lambda x, w, b, r: fused_group_norm(x, num_groups, w, b, eps, r, relu),
            (x, weight, bias, residual),
            writes=int(relu),
        )
    return F.relu_(y) if relu else y


@torch.library.custom_op("gn_practical::group_norm", mutates_args=())
def _group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    stats = _new_stats(x, num_groups)
    return _kernels().forward(x, weight, bias, residual, stats, eps, relu), stats


@torch.library.custom_op("gn_practical::group_norm_backward", mutates_args=())
def _group_norm_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, stats: Tensor, relu: bool
) -> list[Tensor]:
    return _kernels().backward(dy, x, y, weight, bias, stats, relu)


@cache
def _kernels() -> ModuleType:
    from gn_practical.layers import group_norm_kernels  # not at import: Triton is optional

    return group_norm_kernels


@_group_norm.register_fake
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(x), _new_stats(x, args[3])


@_group_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, y: Tensor | None, *parameters: Any) -> list[Tensor]:
    grads = [_empty_output(x), *(torch.empty_like(t) for t in parameters[:2])]
    return grads if y is None else [*grads, _empty_output(x)]


def _new_stats(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((2, x.shape[0], num_groups), dtype=torch.float32)


def _empty_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, ctx.num_groups, ctx.eps, ctx.relu = inputs
    y, stats = output
    relu = ctx.relu  # a closure over ctx would keep what it saved
    again = lambda *args: _kernels().forward(*args, None, relu)  # noqa: E731
    recomputation.remember(y, again, (*inputs[:4], stats))
    # The mask of the ReLU follows from x alone, unless a residual was added.
    y = y if ctx.relu and residual is not None else None
    ctx.save_for_backward(x, weight, bias, y, stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias, y, stats = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody will differentiate this backward pass
        if ctx.relu:
            with torch.no_grad():
                seen = _compose(x, ctx.num_groups, weight, bias, ctx.eps, None, False)
            dy = dy * ((seen if y is None else y) > 0)
        grads = differentiable_grads(
            lambda *args: F.group_norm(args[0], ctx.num_groups, *args[1:], ctx.eps),
            (x, weight.to(x.dtype), bias.to(x.dtype)),
            dy,
        )
    else:
        run = _kernels().backward if is_plain(dy) else _group_norm_backward
        grads = run(dy, x, y, weight, bias, stats, ctx.relu)
        dy = dy if y is None else grads[3]
    return *grads[:3], dy if ctx.needs_input_grad[3] else None, None, None, None


_group_norm.register_autograd(_differentiate, setup_context=_save)


class _FusedGroupNorm(torch.autograd.Function):
    """The same without the dispatcher, which costs more than all else on the host."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, num_groups, eps, relu = inputs
        stats = _new_stats(inputs[0], num_groups)
        y = _kernels().forward(*tensors, stats, eps, relu)
        _save(ctx, inputs, (y, stats))
        return y

    backward = staticmethod(_differentiate)
