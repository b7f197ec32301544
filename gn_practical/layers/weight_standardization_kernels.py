"""Triton kernels of weight standardization: one launch forward, one backward for a layer.

A program takes one filter, whose numbers it reads again from the cache for each pass over them.
Sums are in float32 and of deviations from the mean.
"""

# ruff: noqa: ANN001, ANN202 -- Triton reads annotations of kernels as constexpr or nothing.

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gn_practical.layers.kernel import Cut, Kernel, current_stream, dense

MAX_BLOCK = 2048


@Kernel
def _standardize(weight_ptr, y_ptr, stats_ptr, eps, K, BLOCK: tl.constexpr):
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
    tl.store(stats_ptr + row, mean)
    tl.store(stats_ptr + tl.num_programs(0) + row, std)


@Kernel
def _gradient(dy_ptr, weight_ptr, dw_ptr, stats_ptr, eps, K, BLOCK: tl.constexpr):
    """Write dW = (dy - mean(dy)) / (std + eps) - y Σ dy y / (std (K - 1))."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * K
    mean, std = tl.load(stats_ptr + row), tl.load(stats_ptr + tl.num_programs(0) + row)
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


def forward(weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the O standardized filters, and mean and unbiased std in float32, of shape (2, O)."""
    weight = dense(weight)
    y, stats = torch.empty_like(weight), weight.new_empty((2, len(weight)), dtype=torch.float32)
    _launch(_standardize, weight, (weight, y, stats), eps)
    return y, stats


def backward(dy: Tensor, weight: Tensor, stats: Tensor, eps: float) -> Tensor:
    """Return dL/d(filters) from that of the standardized ones and what :func:`forward` returned."""
    weight = dense(weight)
    dw = torch.empty_like(weight)
    _launch(_gradient, weight, (dense(dy), weight, dw, stats), eps)
    return dw


def _launch(kernel: Kernel, weight: Tensor, tensors: tuple[Tensor, ...], eps: float) -> None:
    cut, device = _cut(weight.shape), weight.get_device()
    with torch.cuda.device_of(weight):
        kernel(cut, (*tensors, eps), (weight.dtype, device), current_stream(device))


@lru_cache(2**12)
def _cut(shape: torch.Size) -> Cut:
    size = shape[1:].numel()
    tile = (min(triton.next_power_of_2(size), MAX_BLOCK),)
    return Cut((shape[0], 1, 1), (size,), tile, (tile,))
