"""Group normalization, residual sum and ReLU as one operator.

On CUDA it runs the Triton kernels of :mod:`gn_practical.layers.group_norm_kernels`, as the custom
operator ``gn_practical::group_norm``. Everything else runs PyTorch's own operators: the CPU,
float64, empty batches, double backward, tracing, scripting and export. The numbers are the same;
:func:`backend` says which it is.
"""

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gn_practical.layers import recomputation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
SLAB = 2048  # pixels that the CPU's backward pass adds up in one go
SMALL = 2**17  # values of an input whose norm takes the CPU some 0.1 ms
LARGE_MEAN = 16  # in standard deviations: four bits of a float32 sum are lost
CHECKED_FORMATS = (torch.contiguous_format, torch.channels_last)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, slowly


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
        - x: (N, C, *)
        - Output: as ``x``.

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
        return _group_norm(x, weight, bias, residual, num_groups, eps, relu)[0]
    if not torch.is_autocast_enabled(x.device.type):
        return _run_pytorch(x, num_groups, weight, bias, eps, residual, relu)
    with torch.autocast(x.device.type, enabled=False):  # it would return float32 on CUDA
        return _run_pytorch(x, num_groups, weight, bias, eps, residual, relu)


def backend(device: str | torch.device) -> str:
    """Say what :func:`fused_group_norm` runs for float32 and half precision on a device.

    Example:
        >>> backend("cpu")
        "PyTorch's operators: the device is cpu"
    """
    device = torch.device(device)
    if device.type != "cuda":
        return f"PyTorch's operators: the device is {device.type}"
    if not HAS_TRITON:
        return "PyTorch's operators: Triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"PyTorch's operators: the kernels need compute capability 8.0, not {major}.{minor}"
    return "Triton kernels"


def _kernels_take(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> bool:
    if not kernels_run(x):
        return False
    channels = x.shape[1] if x.dim() > 1 else 0
    if x.numel() == 0 or num_groups < 1 or channels % num_groups:
        return False
    if x.is_cuda and not _kernels_agree(str(x.device)):
        return False
    parameters = [t for t in (weight, bias) if t is not None]
    same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    return (
        same
        and all(t.shape == (channels,) and t.device == x.device for t in parameters)
        and x.numel() > x.shape[0] * num_groups  # else PyTorch refuses some, and nothing is gained
    )


def kernels_run(x: Tensor) -> bool:
    """Whether Triton kernels can take ``x``, by device and dtype, and in what runs here."""
    if not (x.is_cuda or INTERPRETED) or not HAS_TRITON or x.dtype not in DTYPES:
        return False
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    return not (x.is_cuda and torch.version.hip is None and _compute_capability(x) < 8)


@torch.compiler.assume_constant_result
@cache
def _kernels_agree(device: str) -> bool:
    """Whether the kernels give PyTorch's numbers on this device, tried once on a small input.

    A driver, a Triton or a GPU that breaks them costs speed and a warning, not the run.
    """
    return agrees(_largest_difference, device)


def agrees(compare: Callable[[str], float], device: str) -> bool:
    """Whether ``compare`` finds kernels and PyTorch alike; warns where it does not.

    Args:
        compare: returns the largest relative difference on a device.
        device: where.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            difference = compare(device)
    except Exception as error:  # of the compiler, the driver or the launch: of many kinds
        reason = f"{type(error).__name__}: {error}"
    else:
        if difference < 1e-3:
            return True
        reason = f"they differ by {difference:.3g}"
    logging.getLogger(__name__).warning(
        "PyTorch's operators run in place of the Triton kernels on %s: %s", device, reason
    )
    return False


def _largest_difference(device: str) -> float:
    """Compare outputs and gradients of the kernels and of PyTorch on small inputs."""
    return max(_difference(device, layout) for layout in CHECKED_FORMATS)


def _difference(device: str, layout: torch.memory_format) -> float:
    x = torch.linspace(0, 99, 2 * 8 * 24 * 24, device=device).sin().add(1).view(2, 8, 24, 24)
    inputs = [x.contiguous(memory_format=layout), x[0, :, 0, 0] + 1, x[1, :, 0, 0], x.flip(0)]
    inputs = [t.clone().requires_grad_() for t in inputs]
    x, weight, bias, residual = inputs
    outputs = (
        _group_norm(x, weight, bias, residual, 2, 1e-5, True)[0],
        _compose(x, 2, weight, bias, 1e-5, residual, True),
    )
    ours, pytorch = ((y, *torch.autograd.grad(y.square().sum(), inputs)) for y in outputs)
    return relative_difference(ours, pytorch)


def relative_difference(ours: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference of two lists of tensors, relative to each one's largest."""
    pairs = zip(ours, others, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _compute_capability(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).major


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
    ordinary = (
        x.dim() > 1
        and num_groups > 0
        and x.shape[1] % num_groups == 0
        and x.numel() > x.shape[0] * num_groups > 0
    )
    if not ordinary:  # PyTorch's errors stay as they are
        y = F.group_norm(x, num_groups, weight, bias, eps)
    elif x.is_cpu and torch.is_grad_enabled():
        y, x = _group_norm_in_training(x, num_groups, weight, bias, eps)
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


# --- CPU: training -------------------------------------------------------------------------------


def _group_norm_in_training(
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
        or torch._C._are_functorch_transforms_active()
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


# --- CUDA: the custom operator -------------------------------------------------------------------


@torch.library.custom_op("gn_practical::group_norm", mutates_args=())
def _group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from gn_practical.layers import group_norm_kernels  # not at import: Triton is optional

    return group_norm_kernels.forward(x, weight, bias, residual, num_groups, eps, relu)


@torch.library.custom_op("gn_practical::group_norm_backward", mutates_args=())
def _group_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from gn_practical.layers import group_norm_kernels

    return group_norm_kernels.backward(dy, x, y, weight, bias, mean, rstd, relu)


@_group_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], num_groups, dtype=torch.float32)
    return _empty_output(x), mean, torch.empty_like(mean)


@_group_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = x.new_empty(0) if y is None else _empty_output(x)
    grad_weight = x.new_empty(x.shape[1], dtype=torch.float32)
    return _empty_output(x), grad_weight, torch.empty_like(grad_weight), dz


def _empty_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout in which ``x`` is normalized: its own, or contiguous for any other."""
    if not x.is_contiguous():
        for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dim and x.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, ctx.num_groups, ctx.eps, ctx.relu = inputs
    y, mean, rstd = output
    recomputation.remember(y, partial(_normalize, ctx.relu), (*inputs[:4], mean, rstd))
    # The mask of the ReLU follows from x alone, unless a residual was added.
    y = y if ctx.relu and residual is not None else None
    ctx.save_for_backward(x, weight, bias, y, mean, rstd)
    ctx.set_materialize_grads(False)


def _normalize(
    relu: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor:
    from gn_practical.layers import group_norm_kernels

    return group_norm_kernels.normalize(x, weight, bias, residual, mean, rstd, relu)


def _differentiate(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias, y, mean, rstd = ctx.saved_tensors
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
        return *grads, dy if ctx.needs_input_grad[3] else None, None, None, None
    dx, grad_weight, grad_bias, dz = _group_norm_backward(
        dy, x, y, weight, bias, mean, rstd, ctx.relu
    )
    residual_grad = dy if y is None else dz
    return (
        dx,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        residual_grad if ctx.needs_input_grad[3] else None,
        None,
        None,
        None,
    )


_group_norm.register_autograd(_differentiate, setup_context=_save)


def differentiable_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Return dL/d(inputs) of ``function``, itself differentiable; None where none is wanted.

    Args:
        function: made of PyTorch's operators.
        inputs: its arguments.
        dy: gradient of its output.
    """
    wanted = [t for t in inputs if t.requires_grad]
    with torch.enable_grad():
        output = function(*inputs)
    grads = iter(torch.autograd.grad(output, wanted, dy, create_graph=True))
    return tuple(next(grads) if t.requires_grad else None for t in inputs)


# --- CPU: channels_last with many groups ---------------------------------------------------------


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

    In its evaluation mode that gives, of one sample, Σ dy x̂ and Σ dy of each channel and
    dy weight rstd, from which only the group's two means are missing.
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
    # In slabs, because it adds up one pixel after the other, which is inexact for many.
    slabs = max(1, SLAB // x.shape[3])
    parts = [
        torch.ops.aten.native_batch_norm_backward(
            d, t, weight, mean, rstd.pow(-2), None, None, False, 0.0, [True, True, True]
        )
        for d, t in zip(dy.split(slabs, 2), x.split(slabs, 2), strict=True)
    ]
    sums = torch.stack([torch.stack(part[1:]) for part in parts]).sum(0)  # Σ dy x̂, Σ dy
    means = (sums * weight).view(2, groups, -1).sum(-1) / (x[0].numel() // groups)
    slope, constant = means.repeat_interleave(channels // groups, 1)
    # dx -= rstd (constant + x̂ slope), as an affine map of x.
    factor = (-rstd.square() * slope).to(x.dtype).view(1, -1, 1, 1)
    shift = (-rstd * (constant - mean * rstd * slope)).to(x.dtype).view(1, -1, 1, 1)
    pieces = zip(parts, x.split(slabs, 2), out.split(slabs, 2), strict=True)
    for (dx, *_), piece, out_piece in pieces:
        torch.addcmul(dx, piece, factor, out=out_piece).add_(shift)
    return sums
