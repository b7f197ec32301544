"""What runs the operators of these layers, Triton's kernels or PyTorch, and what both need."""

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

KERNELS = "Triton kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels take
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, slowly


def backend(device: str | torch.device) -> str:
    """Say what runs for float32 and half precision on a device.

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
    return KERNELS


def kernels_run(x: Tensor, agree: Callable[[torch.device], bool]) -> bool:
    """Whether Triton kernels take ``x``, by device, dtype, what runs here, and ``agree``."""
    if not (x.is_cuda or INTERPRETED) or not HAS_TRITON or x.dtype not in DTYPES or not x.numel():
        return False
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    return not x.is_cuda or agree(x.device)


@cache
def agrees(compare: Callable[[torch.device], float], device: torch.device) -> bool:
    """Whether kernels run on a device and agree with PyTorch there, tried once.

    A driver, a Triton or a GPU that breaks them costs speed and a warning, not the run. ``compare``
    returns their largest relative difference on a device.
    """
    if device.type == "cuda" and backend(device) != KERNELS:
        return False
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


def relative_difference(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> float:
    """Return the largest difference of outputs and gradients, relative to each one's largest."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    outputs = (function(*inputs) for function in (ours, theirs))
    pairs = zip(*((y, *torch.autograd.grad(y.sin().sum(), inputs)) for y in outputs), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the layout in which ``x`` is normalized: its own, or contiguous for any other."""
    if not x.is_contiguous():
        for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dim and x.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format


def differentiable_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Return dL/d(inputs) of ``function``, itself differentiable; None where none is wanted."""
    wanted = [t for t in inputs if t.requires_grad]
    with torch.enable_grad():
        output = function(*inputs)
    grads = iter(torch.autograd.grad(output, wanted, dy, create_graph=True))
    return tuple(next(grads) if t.requires_grad else None for t in inputs)
