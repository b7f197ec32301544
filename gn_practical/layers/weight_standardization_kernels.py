"""Triton kernels of weight standardization: one launch forward, one backward for a layer.

A program takes one filter, whose numbers it reads again from the cache for each pass over them.
Sums are in float32 and of deviations from the mean.
"""

# ruff: noqa: ANN001, ANN202 -- Triton reads annotations of kernels as constexpr or nothing.

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048
INTEGERS = ["K"]


@triton.jit(do_not_specialize=INTEGERS)
def _standardize(weight_ptr, y_ptr, mean_ptr, std_ptr, K, eps, BLOCK: tl.constexpr):
    """Write y = (W - mean) / (std + eps), mean and std of a filter of K numbers."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * K
    # About its first number, so that a large mean does not cost digits.
    shift = tl.load(weight_ptr + first).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + first + k, k < K, 0.0).to(tl.float32)
        total += tl.where(k < K, w - shift, 0.0)
    mean = shift + tl.sum(total, 0) / K
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + first + k, k < K, 0.0).to(tl.float32)
        squares += tl.where(k < K, (w - mean) * (w - mean), 0.0)
    std = tl.sqrt(tl.sum(squares, 0) / (K - 1))
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(weight_ptr + first + k, k < K, 0.0).to(tl.float32)
        tl.store(y_ptr + first + k, (w - mean) / (std + eps), k < K)
    tl.store(mean_ptr + row, mean)
    tl.store(std_ptr + row, std)


@triton.jit(do_not_specialize=INTEGERS)
def _gradient(dy_ptr, weight_ptr, dw_ptr, mean_ptr, std_ptr, K, eps, BLOCK: tl.constexpr):
    """Write dW = (dy - mean(dy)) / (std + eps) - y Σ dy y / (std (K - 1))."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * K
    mean, std = tl.load(mean_ptr + row), tl.load(std_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + first + k, k < K, 0.0).to(tl.float32)
        w = tl.load(weight_ptr + first + k, k < K, 0.0).to(tl.float32)
        total += dy
        product += dy * (w - mean)  # dy is zero outside the mask
    constant = tl.sum(total, 0) / K
    # Of a constant filter std has no gradient, as in PyTorch.
    slope = tl.where(std > 0.0, tl.sum(product, 0) / (std * (std + eps) * (K - 1)), 0.0)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_ptr + first + k, k < K, 0.0).to(tl.float32)
        w = tl.load(weight_ptr + first + k, k < K, 0.0).to(tl.float32)
        tl.store(dw_ptr + first + k, (dy - constant - (w - mean) * slope) / (std + eps), k < K)


def forward(flat: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the standardized filters, and mean and unbiased std of each in float32.

    Args:
        flat: filters of shape (O, K), contiguous; float32, bfloat16 or float16.
        eps: added to the standard deviation.
    """
    rows, size = flat.shape
    mean, std = (flat.new_empty(rows, dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(flat)
    with torch.cuda.device_of(flat):
        _standardize[(rows,)](flat, y, mean, std, size, eps, BLOCK=_block(size))
    return y, mean, std


def backward(dy: Tensor, flat: Tensor, mean: Tensor, std: Tensor, eps: float) -> Tensor:
    """Return dL/d(filters).

    Args:
        dy: gradient of the standardized filters.
        flat: as in :func:`forward`.
        mean: from :func:`forward`.
        std: from :func:`forward`.
        eps: as in :func:`forward`.
    """
    rows, size = flat.shape
    dw = torch.empty_like(flat)
    with torch.cuda.device_of(flat):
        _gradient[(rows,)](dy.contiguous(), flat, dw, mean, std, size, eps, BLOCK=_block(size))
    return dw


def _block(size: int) -> int:
    return min(triton.next_power_of_2(size), MAX_BLOCK)
