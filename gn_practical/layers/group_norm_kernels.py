"""Triton kernels of group normalization + residual + ReLU, at the cost of the memory traffic.

A row is one channel of one sample, H * W values. Kernels run over tiles of rows by pixels, so their
parallelism comes from N * C * H * W and never from the number of groups G:

    forward   1. moments    reads x           mean and M2 = Σ (x - mean)² of each row's chunks
              2. combine    tiny              mean and rstd of each group, by Chan's formula
              3. normalize  reads x, writes y
    backward  1. sums       reads x, dy       Σ dz x̂ and Σ dz of each row's chunks
              2. reduce     tiny              of groups: what dx needs; of channels: dγ and dβ
              3. gradient   reads x, dy, writes dx

That is 8 accesses an element, 4 copies of the tensor. A residual adds 3: read forward; y read for
the mask, dz written as its gradient, which step 3 then reads in place of dy, backward.

Where a group of a sample is small, one program has it to itself and finds it in the cache when it
reads it again: one launch forward, and one backward where the other programs of that launch, which
sum dγ and dβ, have few pixels too.

Numerics: float32 throughout; a tile's moments are taken about its own mean and x̂ from x - mean, so
nothing cancels when the mean is large; no atomics, so results repeat bit by bit. The ReLU's mask
is computed again from x. The first call compiles what other image sizes take.
"""

# ruff: noqa: ANN001, ANN202 -- Triton reads annotations of kernels as constexpr or nothing.

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gn_practical.layers.backends import INTERPRETED, memory_format
from gn_practical.layers.kernel import Constants, Cut, Kernel, current_stream, dense

TILE = 4096  # values a program holds in registers: 32 for each of 128 threads
ROW_TILES = (4096, 512, 64)  # pixels of a tile of contiguous rows, for long and short ones
STEPS = 4  # tiles of a chunk in channels_last
MERGE_TILES = ((64, 16), (1, 4096))  # groups and their moments, for few and many moments a group
GROUP_TILES = ((32, 128), (2, 2048))  # groups and their elements, for small and large ones
CHANNELS, PIXELS = tl.constexpr(16), tl.constexpr(256)  # a tile of the sums of channels
LARGEST_GROUP = 2**14  # elements that one program takes, in 8 steps: some 10 µs, as two launches
MOST_PIXELS = 2**12  # of the batch, which the programs of dγ and dβ take in 16 steps


@triton.jit
def _rows(N, C, HW, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's rows, which of them exist, where they begin, and the true C and HW."""
    block = tl.program_id(0)
    # The compiler learns here that the inner dimension is a multiple of a 128-bit load.
    if CHANNELS_LAST:
        C *= VECTOR
        blocks = tl.cdiv(C, BLOCK_C)
        n = block // blocks
        c = block % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        return n * C + c, c < C, n.to(tl.int64) * C * HW + c, C, HW
    HW *= VECTOR
    row = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, row < N * C, row.to(tl.int64) * HW, C, HW


@triton.jit
def _pixels(
    step, first, valid, C, HW,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Return offsets of a tile of this program's chunk, which exist, and how many pixels do."""
    start = (tl.program_id(1) * STEPS + step) * BLOCK_P
    p = start + tl.arange(0, BLOCK_P)
    offset = p * C if CHANNELS_LAST else p
    count = tl.maximum(tl.minimum(HW - start, BLOCK_P), 0).to(tl.float32)
    return first[:, None] + offset[None, :], valid[:, None] & (p < HW)[None, :], count


@triton.jit
def _add_tile(x, mask, n, count, mean, m2):
    """Combine the moments of ``count`` values and of a tile of ``n`` more, by Chan's formula."""
    tile_mean = tl.sum(x, 1) / tl.maximum(n, 1.0)
    centred = tl.where(mask, x - tile_mean[:, None], 0.0)
    delta = tile_mean - mean
    share = n / tl.maximum(count + n, 1.0)
    mean += delta * share
    m2 += tl.sum(centred * centred, 1) + delta * delta * count * share
    return mean, m2


@triton.jit
def _parameters(stats_ptr, weight_ptr, bias_ptr, row, valid, N, C, G):
    """Load mean, rstd, weight and bias of each row, as columns."""
    group = row // (C // G)  # counted over all samples, since row = n C + c
    mean = tl.load(stats_ptr + group, valid, 0.0)
    rstd = tl.load(stats_ptr + N * G + group, valid, 0.0)
    weight = tl.load(weight_ptr + row % C, valid, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + row % C, valid, 0.0).to(tl.float32)
    return mean[:, None], rstd[:, None], weight[:, None], bias[:, None]


@triton.jit
def _store_output(
    x, residual_ptr, y_ptr, at, mask, mean, rstd, weight, bias,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Write y = act((x - mean) rstd weight + bias + residual)."""
    y = (x - mean) * rstd * weight + bias
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # a NaN stays, as in PyTorch
    tl.store(y_ptr + at, y, mask)


@triton.jit
def _load_dz(
    dy_ptr, x_ptr, y_ptr, at, mask, mean, rstd, weight, bias,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Return dz = dL/d(input of the activation), zero outside the mask, and x̂."""
    dz = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    normalized = (tl.load(x_ptr + at, mask, 0.0).to(tl.float32) - mean) * rstd
    if RESIDUAL:  # with ReLU: its mask is read off the output
        dz = tl.where(tl.load(y_ptr + at, mask, 0.0).to(tl.float32) <= 0.0, 0.0, dz)
    elif RELU:
        dz = tl.where(normalized * weight + bias <= 0.0, 0.0, dz)
    return dz, normalized


@Kernel
def _moments(
    x_ptr, moments_ptr, N, C, HW, G,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and Σ (x - mean)² of each row's chunk, tile after tile."""
    row, valid, first, C, HW = _rows(N, C, HW, CHANNELS_LAST, VECTOR, BLOCK_C)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for step in tl.static_range(STEPS):
        at, mask, n = _pixels(step, first, valid, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        mean, m2 = _add_tile(x, mask, n, count, mean, m2)
        count += n
    chunks = tl.num_programs(1)
    out = moments_ptr + row * chunks + tl.program_id(1)
    tl.store(out, mean, valid)
    tl.store(out + N * C * chunks, m2, valid)


@Kernel
def _combine(
    moments_ptr, stats_ptr, eps, rows, K, chunks, span, HW,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Combine the K moments of each of ``rows`` groups to its mean and rstd.

    Moment k holds ``span`` values, the last of every ``chunks`` fewer, so that these hold HW.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    size = (K // chunks).to(tl.float32) * HW
    at = moments_ptr + row[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    mean = tl.load(moments_ptr + row * K, row < rows, 0.0)[:, None]
    for squares in tl.static_range(2):
        total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = (row < rows)[:, None] & (k < K)[None, :]
            count = tl.minimum(HW - k % chunks * span, span).to(tl.float32)[None, :]
            delta = tl.load(at + start, mask, 0.0) - mean
            if squares:
                part = tl.load(at + start + rows * K, mask, 0.0)
                total += tl.where(mask, part + count * delta * delta, 0.0)
            else:
                total += tl.where(mask, count * delta, 0.0)
        if squares:
            rstd = 1.0 / tl.sqrt(tl.sum(total, 1) / size + eps)
            tl.store(stats_ptr + rows + row, rstd, row < rows)
        else:
            mean += (tl.sum(total, 1) / size)[:, None]
            tl.store(stats_ptr + row[:, None], mean, (row < rows)[:, None])


@Kernel
def _normalize(
    x_ptr, residual_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, N, C, HW, G,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write y from the statistics."""
    row, valid, first, C, HW = _rows(N, C, HW, CHANNELS_LAST, VECTOR, BLOCK_C)
    mean, rstd, weight, bias = _parameters(stats_ptr, weight_ptr, bias_ptr, row, valid, N, C, G)
    for step in tl.static_range(STEPS):
        at, mask, _ = _pixels(step, first, valid, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        _store_output(x, residual_ptr, y_ptr, at, mask, mean, rstd, weight, bias, RELU, RESIDUAL)


@Kernel
def _sums(
    dy_ptr, x_ptr, y_ptr, dz_ptr, sums_ptr, stats_ptr, weight_ptr, bias_ptr, N, C, HW, G,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Σ dz x̂ and Σ dz of each row's chunk; with a residual, dz is kept."""
    row, valid, first, C, HW = _rows(N, C, HW, CHANNELS_LAST, VECTOR, BLOCK_C)
    mean, rstd, weight, bias = _parameters(stats_ptr, weight_ptr, bias_ptr, row, valid, N, C, G)
    for_weight = tl.zeros([BLOCK_C], tl.float32)
    for_bias = tl.zeros([BLOCK_C], tl.float32)
    for step in tl.static_range(STEPS):
        at, mask, _ = _pixels(step, first, valid, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        dz, normalized = _load_dz(
            dy_ptr, x_ptr, y_ptr, at, mask, mean, rstd, weight, bias, RELU, RESIDUAL
        )
        if RESIDUAL:
            tl.store(dz_ptr + at, dz, mask)
        for_weight += tl.sum(dz * normalized, 1)
        for_bias += tl.sum(dz, 1)
    chunks = tl.num_programs(1)
    out = sums_ptr + row * chunks + tl.program_id(1)
    tl.store(out, for_weight, valid)
    tl.store(out + N * C * chunks, for_bias, valid)


@Kernel
def _reduce(
    sums_ptr, means_ptr, grad_weight_ptr, grad_bias_ptr, weight_ptr, N, C, HW, G, chunks,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Means of (weight dz x̂) and (weight dz) of the groups; sums of the channels, dγ and dβ."""
    blocks = tl.cdiv(N * G, BLOCK_R)
    block = tl.program_id(0)
    apart = N * C * chunks  # of the two sums of a chunk
    if block < blocks:
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        size = C // G * chunks
        slope = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        constant = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for start in range(0, size, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = (row < N * G)[:, None] & (k < size)[None, :]
            channel = (row % G * (C // G))[:, None] + (k // chunks)[None, :]
            weight = tl.load(weight_ptr + channel, mask, 0.0).to(tl.float32)
            at = sums_ptr + (row * size)[:, None] + k[None, :]
            slope += tl.load(at, mask, 0.0) * weight
            constant += tl.load(at + apart, mask, 0.0) * weight
        values = (C // G).to(tl.float32) * HW
        tl.store(means_ptr + row, tl.sum(slope, 1) / values, row < N * G)
        tl.store(means_ptr + N * G + row, tl.sum(constant, 1) / values, row < N * G)
    else:
        c = (block - blocks) * CHANNELS + tl.arange(0, CHANNELS)
        for_weight = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for_bias = tl.zeros([CHANNELS, PIXELS], tl.float32)
        for first in range(0, N * chunks, PIXELS):
            n = first + tl.arange(0, PIXELS)
            exists = (c < C)[:, None] & (n < N * chunks)[None, :]
            chunk = ((n // chunks * C)[None, :] + c[:, None]) * chunks + (n % chunks)[None, :]
            for_weight += tl.load(sums_ptr + chunk, exists, 0.0)
            for_bias += tl.load(sums_ptr + chunk + apart, exists, 0.0)
        tl.store(grad_weight_ptr + c, tl.sum(for_weight, 1), c < C)
        tl.store(grad_bias_ptr + c, tl.sum(for_bias, 1), c < C)


@Kernel
def _gradient(
    dz_ptr, x_ptr, dx_ptr, means_ptr, stats_ptr, weight_ptr, bias_ptr, N, C, HW, G,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write dx = rstd (weight dz - its group mean - x̂ · group mean of (weight dz x̂))."""
    row, valid, first, C, HW = _rows(N, C, HW, CHANNELS_LAST, VECTOR, BLOCK_C)
    mean, rstd, weight, bias = _parameters(stats_ptr, weight_ptr, bias_ptr, row, valid, N, C, G)
    group = row // (C // G)
    slope = tl.load(means_ptr + group, valid, 0.0)[:, None]
    constant = tl.load(means_ptr + N * G + group, valid, 0.0)[:, None]
    for step in tl.static_range(STEPS):
        at, mask, _ = _pixels(step, first, valid, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        dz, normalized = _load_dz(
            dz_ptr, x_ptr, None, at, mask, mean, rstd, weight, bias, RELU, False
        )
        tl.store(dx_ptr + at, rstd * (weight * dz - constant - normalized * slope), mask)


@triton.jit
def _groups(
    block, N, G, HW, inner,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return a program's groups, which exist, where they begin; numbers and channels of each.

    ``inner`` numbers lie side by side in memory, all of a group or, in channels_last, of a pixel.
    """
    inner *= VECTOR
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    if CHANNELS_LAST:
        first = (row // G).to(tl.int64) * HW * G * inner + row % G * inner
        return row, row < N * G, first, inner * HW, inner
    return row, row < N * G, row.to(tl.int64) * inner, inner, inner // HW


@triton.jit
def _elements(
    start, row, valid, first, size, channels, G, HW, weight_ptr, bias_ptr,
    CHANNELS_LAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return offsets of a tile of groups' elements, which exist, and their weight and bias."""
    k = start + tl.arange(0, BLOCK_K)
    if CHANNELS_LAST:
        offset = k // channels * (G * channels) + k % channels
        c = k % channels
    else:
        offset = k
        c = k // HW
    mask = valid[:, None] & (k < size)[None, :]
    c = (row % G * channels)[:, None] + c[None, :]
    weight = tl.load(weight_ptr + c, mask, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask, 0.0).to(tl.float32)
    return first[:, None] + offset[None, :], mask, weight, bias


@Kernel
def _forward_groups(
    x_ptr, residual_ptr, y_ptr, stats_ptr, weight_ptr, bias_ptr, eps, N, G, HW, inner,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The forward pass of whole groups."""
    row, valid, first, size, channels = _groups(
        tl.program_id(0), N, G, HW, inner, CHANNELS_LAST, VECTOR, BLOCK_R
    )
    mean = tl.zeros([BLOCK_R], tl.float32)
    m2 = tl.zeros([BLOCK_R], tl.float32)
    for write in tl.static_range(2):
        rstd = 1.0 / tl.sqrt(m2 / size + eps)
        for start in range(0, size, BLOCK_K):
            at, mask, weight, bias = _elements(
                start, row, valid, first, size, channels, G, HW, weight_ptr, bias_ptr,
                CHANNELS_LAST, BLOCK_K,
            )  # fmt: skip
            x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
            if write:
                _store_output(
                    x, residual_ptr, y_ptr, at, mask, mean[:, None], rstd[:, None], weight, bias,
                    RELU, RESIDUAL,
                )  # fmt: skip
            else:
                n = tl.minimum(size - start, BLOCK_K).to(tl.float32)
                count = tl.minimum(size, start).to(tl.float32)
                mean, m2 = _add_tile(x, mask, n, count, mean, m2)
    tl.store(stats_ptr + row, mean, valid)
    tl.store(stats_ptr + N * G + row, rstd, valid)


@Kernel
def _backward_groups(
    dy_ptr, x_ptr, y_ptr, dz_ptr, dx_ptr, grad_weight_ptr, grad_bias_ptr, stats_ptr, weight_ptr,
    bias_ptr, N, G, HW, inner,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The backward pass of whole groups, and in the programs after them dγ and dβ."""
    blocks = tl.cdiv(N * G, BLOCK_R)
    block = tl.program_id(0)
    if block < blocks:
        row, valid, first, size, channels = _groups(
            block, N, G, HW, inner, CHANNELS_LAST, VECTOR, BLOCK_R
        )
        mean = tl.load(stats_ptr + row, valid, 0.0)[:, None]
        rstd = tl.load(stats_ptr + N * G + row, valid, 0.0)[:, None]
        slope = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        constant = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for write in tl.static_range(2):
            slope_mean = tl.sum(slope, 1)[:, None] / size
            constant_mean = tl.sum(constant, 1)[:, None] / size
            for start in range(0, size, BLOCK_K):
                at, mask, weight, bias = _elements(
                    start, row, valid, first, size, channels, G, HW, weight_ptr, bias_ptr,
                    CHANNELS_LAST, BLOCK_K,
                )  # fmt: skip
                dz, normalized = _load_dz(
                    dy_ptr, x_ptr, y_ptr, at, mask, mean, rstd, weight, bias, RELU, RESIDUAL
                )
                if write:
                    dx = rstd * (weight * dz - constant_mean - normalized * slope_mean)
                    tl.store(dx_ptr + at, dx, mask)
                    if RESIDUAL:
                        tl.store(dz_ptr + at, dz, mask)
                else:
                    slope += weight * dz * normalized
                    constant += weight * dz
    else:
        _gradient_of_channels(
            block - blocks, dy_ptr, x_ptr, y_ptr, grad_weight_ptr, grad_bias_ptr, stats_ptr,
            weight_ptr, bias_ptr, N, G, HW, inner, RELU, RESIDUAL, CHANNELS_LAST, VECTOR,
        )  # fmt: skip


@triton.jit
def _gradient_of_channels(
    block, dy_ptr, x_ptr, y_ptr, grad_weight_ptr, grad_bias_ptr, stats_ptr, weight_ptr, bias_ptr,
    N, G, HW, inner,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    channels = inner * VECTOR if CHANNELS_LAST else inner * VECTOR // HW
    C = G * channels
    c = (block * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)
    for_weight = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for_bias = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for start in range(0, N * HW, PIXELS):
        k = (start + tl.arange(0, PIXELS))[None, :]
        mask = (c < C) & (k < N * HW)
        if CHANNELS_LAST:
            at = k.to(tl.int64) * C + c
        else:
            at = ((k // HW).to(tl.int64) * C + c) * HW + k % HW
        group = k // HW * G + c // channels
        mean = tl.load(stats_ptr + group, mask, 0.0)
        rstd = tl.load(stats_ptr + N * G + group, mask, 0.0)
        dz, normalized = _load_dz(
            dy_ptr, x_ptr, y_ptr, at, mask, mean, rstd, weight, bias, RELU, RESIDUAL
        )
        for_weight += dz * normalized
        for_bias += dz
    tl.store(grad_weight_ptr + c, tl.sum(for_weight, 1)[:, None], c < C)
    tl.store(grad_bias_ptr + c, tl.sum(for_bias, 1)[:, None], c < C)


class Plan(NamedTuple):
    """How the passes over a tensor are cut into programs."""

    rows: Cut
    combine: Cut  # of the rows' moments to groups
    reduce: Cut  # of the rows' sums to groups and channels
    groups: Cut
    groups_backward: Cut
    buffer: int  # numbers of all chunks' moments, or sums
    small: tuple[bool, bool]  # whether a program shall take a whole group, forward and backward


@lru_cache(2**14)
def _plan(shape: torch.Size, itemsize: int, last: bool, num_groups: int) -> Plan:
    """Cut a tensor of shape (N, C, *), channels_last or not."""
    batch, channels = shape[:2]
    pixels, vector = shape[2:].numel(), 16 // itemsize
    rows = _cut_rows(batch, channels, pixels, num_groups, vector, last)
    chunks, span = rows.grid[1], rows.tile[3] * rows.tile[4]
    width, groups = channels // num_groups, batch * num_groups
    channel_blocks = triton.cdiv(channels, CHANNELS.value)

    merge = MERGE_TILES[width * chunks > 64]
    blocks = triton.cdiv(groups, merge[0])
    numbers = (groups, width * chunks, chunks, span, pixels)
    combine = Cut((blocks, 1, 1), numbers, merge, MERGE_TILES)
    numbers = (batch, channels, pixels, num_groups, chunks)
    reduce = Cut((blocks + channel_blocks, 1, 1), numbers, merge, MERGE_TILES)

    side_by_side = width if last else width * pixels
    wide = vector if side_by_side % vector == 0 else 1
    tile = (last, wide, *GROUP_TILES[width * pixels > 512])
    tiles = tuple((last, v, *t) for v in ((wide,) if last else (1, vector)) for t in GROUP_TILES)
    blocks = triton.cdiv(groups, tile[2])
    forward = Cut((blocks, 1, 1), (batch, num_groups, pixels, side_by_side // wide), tile, tiles)
    backward = forward._replace(grid=(blocks + channel_blocks, 1, 1))
    small = width * pixels <= LARGEST_GROUP
    ways = (small, small and batch * pixels <= MOST_PIXELS)
    return Plan(rows, combine, reduce, forward, backward, 2 * batch * channels * chunks, ways)


def _cut_rows(
    batch: int, channels: int, pixels: int, num_groups: int, vector: int, last: bool
) -> Cut:
    """Cut rows by pixels; numbers are N, C, HW and G, the inner one of C and HW in vectors."""
    wide = vector if (channels if last else pixels) % vector == 0 else 1
    if last:
        block_c = min(triton.next_power_of_2(channels), 64)
        tile = (True, wide, block_c, TILE // block_c, STEPS)
        tiles = (tile,)  # of the image's size nothing depends
        blocks = batch * triton.cdiv(channels, block_c)
        numbers = (batch, channels // wide, pixels, num_groups)
    else:
        block_p = ROW_TILES[0 if pixels >= 4096 else 1 if pixels > 256 else 2]
        tile = (False, wide, TILE // block_p, block_p, 1)
        tiles = tuple((False, v, TILE // p, p, 1) for v in (1, vector) for p in ROW_TILES)
        blocks = triton.cdiv(batch * channels, TILE // block_p)
        numbers = (batch, channels, pixels // wide, num_groups)
    return Cut((blocks, triton.cdiv(pixels, tile[3] * tile[4]), 1), numbers, tile, tiles)


_compiled: set[tuple] = set()


def _prepare(
    x: Tensor,
    layout: torch.memory_format,
    key: tuple,
    num_groups: int,
    flags: Constants,
    backward: bool,
) -> tuple[Plan, tuple[bool, ...]]:
    """Return the plan, and whether to run whole groups.

    At first both ways are run, so that other image sizes compile nothing.
    """
    last = layout is not torch.contiguous_format
    plan = _plan(x.shape, x.element_size(), last, num_groups)
    small = plan.small[backward]
    first = (key, flags, backward, plan.rows.tiles[0], plan.groups.tiles[0])
    if first in _compiled or INTERPRETED:
        return plan, (small,)
    _compiled.add(first)
    return plan, (not small, small)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    eps: float | None,
    relu: bool,
) -> Tensor:
    """Return y = act((x - mean) rstd weight + bias + residual), for x of shape (N, C, *).

    Mean and rstd, ``stats`` of shape (2, N, G) in float32, are written, unless ``eps`` is None.
    """
    layout = memory_format(x)
    x, weight, bias = dense(x, layout), dense(weight), dense(bias)
    residual = None if residual is None else dense(residual, layout)
    flags = (relu, residual is not None)
    device = x.get_device()
    key = (x.dtype, weight.dtype, bias.dtype, device)
    plan, ways = _prepare(x, layout, key, stats.shape[2], flags, False)
    y = torch.empty_like(x)
    tensors = (x, residual, y, stats, weight, bias)
    with torch.cuda.device_of(x):
        stream = current_stream(device)
        for small in ways:
            if small and eps is not None:
                _forward_groups(plan.groups, (*tensors, eps), key, stream, flags)
                continue
            if eps is not None:
                moments = stats.new_empty(plan.buffer)
                _moments(plan.rows, (x, moments), key, stream)
                _combine(plan.combine, (moments, stats, eps), key, stream)
            _normalize(plan.rows, tensors, key, stream, flags)
    return y


def backward(
    dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, stats: Tensor, relu: bool
) -> list[Tensor]:
    """Return dx, dγ, dβ, and where y is given dz = dL/d(input of the activation).

    It is given where the ReLU acted on a sum with a residual.
    """
    layout = memory_format(x)
    dy, x, weight, bias = dense(dy, layout), dense(x, layout), dense(weight), dense(bias)
    y, stats = None if y is None else dense(y, layout), dense(stats)
    flags = (relu, y is not None)
    device = x.get_device()
    key = (x.dtype, weight.dtype, bias.dtype, device)
    plan, ways = _prepare(x, layout, key, stats.shape[2], flags, True)
    dz = None if y is None else torch.empty_like(x)
    dx, *grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    parameters = (stats, weight, bias)
    with torch.cuda.device_of(x):
        stream = current_stream(device)
        for small in ways:
            if small:
                tensors = (dy, x, y, dz, dx, *grads, *parameters)
                _backward_groups(plan.groups_backward, tensors, key, stream, flags)
                continue
            sums, means = stats.new_empty(plan.buffer), torch.empty_like(stats)
            _sums(plan.rows, (dy, x, y, dz, sums, *parameters), key, stream, flags)
            _reduce(plan.reduce, (sums, means, *grads, weight), key, stream)
            tensors = (dy if y is None else dz, x, dx, means, *parameters)
            _gradient(plan.rows, tensors, key, stream, (relu and y is None,))
    return [dx, *grads] if dz is None else [dx, *grads, dz]
