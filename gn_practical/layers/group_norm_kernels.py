"""Triton kernels of group normalization + residual + ReLU, at the cost of the memory traffic.

A row is one channel of one sample, H * W values. Every kernel runs over tiles of rows by pixels,
so its parallelism comes from N * C * H * W and never from the number of groups G:

    forward   1. moments    reads x           count, mean, M2 = Σ (x - mean)² of each row's chunks
              2. combine    tiny              mean and rstd of each group, by Chan's formula
              3. normalize  reads x, writes y
    backward  1. sums       reads x, dy       Σ dz x̂ and Σ dz of each row's chunks
              2. (PyTorch)  tiny              of channels: dγ and dβ; of groups: what dx needs
              3. gradient   reads x, dy, writes dx

That is 8 accesses an element, 4 copies of the tensor. A residual adds 4: read forward; y read for
the mask, dz written as its gradient, which step 3 then reads in place of dy, backward.

Numerics: float32 throughout; a tile's moments are taken about its own mean and x̂ from x - mean, so
nothing cancels when the mean is large; no atomics, so results repeat bit by bit. The ReLU's mask
is computed again from x. Integers are not specialized, and the first launch of a kernel compiles
it for the few tiles that other image sizes take: a new size compiles nothing.
"""

# ruff: noqa: ANN001, ANN202 -- Triton reads annotations of kernels as constexpr or nothing.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gn_practical.layers.backends import INTERPRETED, memory_format

TILE = 4096  # values a program holds in registers: 32 for each of 128 threads
ROW_TILES = (4096, 512, 64)  # pixels of a tile of contiguous rows, for long and short ones
MERGE_TILES = ((64, 16), (1, 1024))  # rows and moments of a tile, for few and many moments a row
INTEGERS = ["N", "C", "HW", "G", "chunks", "rows", "K", "span"]


@triton.jit
def _rows(N, C, HW, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's rows, which of them exist, and the offset of their first pixel."""
    block = tl.program_id(0)
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, BLOCK_C)
        n = block // blocks
        c = block % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        return n * C + c, c < C, n.to(tl.int64) * C * HW + c
    row = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, row < N * C, row.to(tl.int64) * HW


@triton.jit
def _pixels(step, C, HW, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr):
    """Return which pixels of this program's chunk exist, their offsets and their number."""
    start = (tl.program_id(1) * STEPS + step) * BLOCK_P
    p = start + tl.arange(0, BLOCK_P)
    count = tl.maximum(tl.minimum(HW - start, BLOCK_P), 0).to(tl.float32)
    return p < HW, p * C if CHANNELS_LAST else p, count


@triton.jit
def _parameters(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, valid, C, G):
    """Load mean, rstd, weight and bias of each row, as columns."""
    group = row // (C // G)  # counted over all samples, since row = n C + c
    mean = tl.load(mean_ptr + group, valid, 0.0)
    rstd = tl.load(rstd_ptr + group, valid, 0.0)
    weight = tl.load(weight_ptr + row % C, valid, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + row % C, valid, 0.0).to(tl.float32)
    return mean[:, None], rstd[:, None], weight[:, None], bias[:, None]


@triton.jit(do_not_specialize=INTEGERS)
def _moments(
    x_ptr, mean_ptr, m2_ptr, N, C, HW,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and Σ (x - mean)² of each row's chunk, tile after tile by Chan's formula."""
    # The compiler learns here that the inner dimension is a multiple of a 128-bit load.
    if CHANNELS_LAST:
        C *= VECTOR
    else:
        HW *= VECTOR
    row, valid, first = _rows(N, C, HW, CHANNELS_LAST, BLOCK_C)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for step in tl.static_range(STEPS):
        inside, offset, n = _pixels(step, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        mask = valid[:, None] & inside[None, :]
        x = tl.load(x_ptr + first[:, None] + offset[None, :], mask, 0.0).to(tl.float32)
        tile_mean = tl.sum(x, 1) / tl.maximum(n, 1.0)
        centred = tl.where(mask, x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        share = n / tl.maximum(count + n, 1.0)
        mean += delta * share
        m2 += tl.sum(centred * centred, 1) + delta * delta * count * share
        count += n
    out = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(mean_ptr + out, mean, valid)
    tl.store(m2_ptr + out, m2, valid)


@triton.jit(do_not_specialize=INTEGERS)
def _combine(
    mean_ptr, m2_ptr, out_mean_ptr, out_ptr, rows, K, chunks, span, HW, eps,
    FINAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Combine K moments into one, for each of ``rows``; M2 becomes rstd where FINAL.

    Moment k holds ``span`` values, the last of every ``chunks`` fewer, so that these hold HW.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    size = (K // chunks).to(tl.float32) * HW
    shift = tl.load(mean_ptr + row * K, row < rows, 0.0)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (row < rows)[:, None] & (k < K)[None, :]
        count = tl.minimum(HW - k % chunks * span, span).to(tl.float32)
        mean = tl.load(mean_ptr + row[:, None] * K + k[None, :], mask, 0.0)
        total += tl.sum(tl.where(mask, (mean - shift[:, None]) * count[None, :], 0.0), 1)
    centre = shift + total / size
    m2 = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (row < rows)[:, None] & (k < K)[None, :]
        count = tl.minimum(HW - k % chunks * span, span).to(tl.float32)
        delta = tl.load(mean_ptr + row[:, None] * K + k[None, :], mask, 0.0) - centre[:, None]
        part = tl.load(m2_ptr + row[:, None] * K + k[None, :], mask, 0.0)
        m2 += tl.sum(tl.where(mask, part + count[None, :] * delta * delta, 0.0), 1)
    tl.store(out_mean_ptr + row, centre, row < rows)
    out = 1.0 / tl.sqrt(m2 / size + eps) if FINAL else m2
    tl.store(out_ptr + row, out, row < rows)


@triton.jit(do_not_specialize=INTEGERS)
def _normalize(
    x_ptr, residual_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, N, C, HW, G,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write y = act((x - mean) rstd weight + bias + residual)."""
    if CHANNELS_LAST:
        C *= VECTOR
    else:
        HW *= VECTOR
    row, valid, first = _rows(N, C, HW, CHANNELS_LAST, BLOCK_C)
    mean, rstd, weight, bias = _parameters(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, valid, C, G
    )
    for step in tl.static_range(STEPS):
        inside, offset, _ = _pixels(step, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        mask = valid[:, None] & inside[None, :]
        at = first[:, None] + offset[None, :]
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        y = (x - mean) * rstd * weight + bias
        if RESIDUAL:
            y += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # a NaN stays, as in PyTorch
        tl.store(y_ptr + at, y, mask)


@triton.jit(do_not_specialize=INTEGERS)
def _sums(
    dy_ptr, x_ptr, y_ptr, dz_ptr, sums_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, N, C, HW, G,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Σ dz x̂ and Σ dz of each row's chunk, where dz = dL/d(input of the activation)."""
    if CHANNELS_LAST:
        C *= VECTOR
    else:
        HW *= VECTOR
    row, valid, first = _rows(N, C, HW, CHANNELS_LAST, BLOCK_C)
    mean, rstd, weight, bias = _parameters(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, valid, C, G
    )
    for_weight = tl.zeros([BLOCK_C], tl.float32)
    for_bias = tl.zeros([BLOCK_C], tl.float32)
    for step in tl.static_range(STEPS):
        inside, offset, _ = _pixels(step, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        mask = valid[:, None] & inside[None, :]
        at = first[:, None] + offset[None, :]
        dz = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
        normalized = (tl.load(x_ptr + at, mask, 0.0).to(tl.float32) - mean) * rstd
        if RESIDUAL:  # with ReLU: its mask is read off the output, and dz kept
            dz = tl.where(tl.load(y_ptr + at, mask, 0.0).to(tl.float32) <= 0.0, 0.0, dz)
            tl.store(dz_ptr + at, dz, mask)
        elif RELU:
            dz = tl.where(normalized * weight + bias <= 0.0, 0.0, dz)
        # dz is zero outside the mask.
        for_weight += tl.sum(dz * normalized, 1)
        for_bias += tl.sum(dz, 1)
    chunks = tl.num_programs(1)
    out = row * chunks + tl.program_id(1)
    tl.store(sums_ptr + out, for_weight, valid)
    tl.store(sums_ptr + out + N * C * chunks, for_bias, valid)


@triton.jit(do_not_specialize=INTEGERS)
def _gradient(
    dy_ptr, x_ptr, dx_ptr, groups_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, N, C, HW, G,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Write dx = rstd (weight dz - its group mean - x̂ · group mean of (weight dz x̂))."""
    if CHANNELS_LAST:
        C *= VECTOR
    else:
        HW *= VECTOR
    row, valid, first = _rows(N, C, HW, CHANNELS_LAST, BLOCK_C)
    mean, rstd, weight, bias = _parameters(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, row, valid, C, G
    )
    group = row // (C // G)
    size = (C // G).to(tl.float32) * HW
    slope = (tl.load(groups_ptr + group, valid, 0.0) / size)[:, None]
    constant = (tl.load(groups_ptr + group + N * G, valid, 0.0) / size)[:, None]
    for step in tl.static_range(STEPS):
        inside, offset, _ = _pixels(step, C, HW, CHANNELS_LAST, BLOCK_P, STEPS)
        mask = valid[:, None] & inside[None, :]
        at = first[:, None] + offset[None, :]
        dz = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
        normalized = (tl.load(x_ptr + at, mask, 0.0).to(tl.float32) - mean) * rstd
        if RELU:
            dz = tl.where(normalized * weight + bias <= 0.0, 0.0, dz)
        tl.store(dx_ptr + at, rstd * (weight * dz - constant - normalized * slope), mask)


class Tiling(NamedTuple):
    """How a tensor is cut into programs.

    Attributes:
        grid: blocks of rows, chunks of pixels.
        sizes: N, C, HW as the kernels take them: the inner one of C and HW in units of VECTOR.
        constants: the kernels' compile-time arguments.
        others: those that the same layer takes for other image sizes.
    """

    grid: tuple[int, int]
    sizes: tuple[int, int, int]
    constants: dict[str, Any]
    others: list[dict[str, Any]]

    @property
    def span(self) -> int:
        """Pixels of a chunk."""
        return self.constants["BLOCK_P"] * self.constants["STEPS"]


def tile(x: Tensor) -> Tiling:
    """Cut a tensor of shape (N, C, *) that has the layout :func:`memory_format`."""
    channels_last = memory_format(x) is not torch.contiguous_format
    batch, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    vector = 16 // x.element_size()
    wide = vector if (channels if channels_last else pixels) % vector == 0 else 1
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), 64)
        constants = _constants(True, wide, TILE // block_c, 4)
        others = []  # of the image's size nothing depends
        row_blocks = batch * triton.cdiv(channels, block_c)
        sizes = (batch, channels // wide, pixels)
    else:
        block_p = ROW_TILES[0 if pixels >= 4096 else 1 if pixels > 256 else 2]
        constants = _constants(False, wide, block_p, 1)
        others = [_constants(False, v, p, 1) for v in (1, vector) for p in ROW_TILES]
        row_blocks = triton.cdiv(batch * channels, constants["BLOCK_C"])
        sizes = (batch, channels, pixels // wide)
    chunks = triton.cdiv(pixels, constants["BLOCK_P"] * constants["STEPS"])
    return Tiling((row_blocks, chunks), sizes, constants, others)


def _constants(channels_last: bool, vector: int, block_p: int, steps: int) -> dict[str, Any]:
    return {"CHANNELS_LAST": channels_last, "VECTOR": vector, "BLOCK_C": TILE // block_p,
            "BLOCK_P": block_p, "STEPS": steps}  # fmt: skip


_compiled: set[tuple] = set()


def _launch(
    kernel: Any, grid: tuple[int, ...], others: list[dict], *args: Any, **constants: Any
) -> None:
    """Launch a kernel; the first time, compile it with the ``others`` of its constants too."""
    if others and not INTERPRETED:
        types = (getattr(a, "dtype", None) for a in args)
        key = (kernel, *types, *(v for k, v in constants.items() if k not in others[0]))
        if key not in _compiled:
            _compiled.add(key)
            for other in others:
                kernel.warmup(*args, grid=grid, **{**constants, **other})
    kernel[grid](*args, **constants)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and mean and rstd of shape (N, G) in float32.

    Args:
        x: of shape (N, C, *), not empty; float32, bfloat16 or float16.
        weight: of shape (C,).
        bias: of shape (C,).
        residual: None, or as ``x``.
        num_groups: G, which divides C.
        eps: added to the variance under the root.
        relu: apply ReLU last.
    """
    x = x.contiguous(memory_format=memory_format(x))
    with torch.cuda.device_of(x):
        mean, rstd = _statistics(x, tile(x), num_groups, eps)
    return normalize(x, weight, bias, residual, mean, rstd, relu), mean, rstd


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
) -> Tensor:
    """Return y from the statistics: the last step of :func:`forward`, with its arguments."""
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    tiling = tile(x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _launch(
            _normalize, tiling.grid, tiling.others,
            x, residual, y, mean, rstd, weight, bias, *tiling.sizes, mean.shape[1],
            RELU=relu, RESIDUAL=residual is not None, **tiling.constants,
        )  # fmt: skip
    return y


def _statistics(x: Tensor, tiling: Tiling, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    pixels, chunks = x[0, 0].numel(), tiling.grid[1]
    means, m2 = (x.new_empty(batch * channels, chunks, dtype=torch.float32) for _ in range(2))
    args = (x, means, m2, *tiling.sizes)
    _launch(_moments, tiling.grid, tiling.others, *args, **tiling.constants)
    if chunks > 1:
        means, m2 = _merge(means, m2, batch * channels, chunks, tiling.span, pixels)
    mean, rstd = _merge(means, m2, batch * num_groups, 1, pixels, pixels, eps)
    return mean.view(batch, num_groups), rstd.view(batch, num_groups)


def _merge(
    means: Tensor, m2: Tensor, rows: int, chunks: int, span: int, pixels: int, eps: float = -1.0
) -> tuple[Tensor, Tensor]:
    """Combine to ``rows`` moments; with ``eps``, to means and rstd."""
    size = means.numel() // rows
    mean, out = means.new_empty(rows), means.new_empty(rows)  # outputs must not share memory
    tiles = [{"BLOCK_R": block_r, "BLOCK_K": block_k} for block_r, block_k in MERGE_TILES]
    constants = tiles[0 if size <= 64 else 1]
    others = [{"FINAL": final, **sizes} for final in (False, True) for sizes in tiles]
    _launch(
        _combine, (triton.cdiv(rows, constants["BLOCK_R"]),), others,
        means, m2, mean, out, rows, size, chunks, span, pixels, eps, FINAL=eps >= 0, **constants,
    )  # fmt: skip
    return mean, out


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dγ and dβ in float32, and dz = dL/d(input of the activation) where y is given.

    Args:
        dy: gradient of the output.
        x: the input.
        y: the output, where the ReLU acted on a sum with a residual; else None.
        weight: of shape (C,).
        bias: of shape (C,).
        mean: of shape (N, G), from :func:`forward`.
        rstd: of shape (N, G).
        relu: whether ReLU was applied.
    """
    layout = memory_format(x)
    x, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    batch, channels = x.shape[:2]
    num_groups = mean.shape[1]
    tiling = tile(x)
    parameters = (mean, rstd, weight, bias, *tiling.sizes, num_groups)
    dx = torch.empty_like(x)
    dz = x.new_empty(0) if y is None else torch.empty_like(x)
    with torch.cuda.device_of(x):
        sums = x.new_empty(2, batch * channels, tiling.grid[1], dtype=torch.float32)
        _launch(
            _sums, tiling.grid, tiling.others, dy, x, y, dz, sums, *parameters,
            RELU=relu, RESIDUAL=y is not None, **tiling.constants,
        )  # fmt: skip
        sums = sums.sum(-1).view(2, batch, channels)
        groups = (sums * weight).view(2, batch, num_groups, -1).sum(-1)
        _launch(
            _gradient, tiling.grid, tiling.others,
            dy if y is None else dz, x, dx, groups, *parameters,
            RELU=relu and y is None, **tiling.constants,
        )  # fmt: skip
    return dx, sums[0].sum(0), sums[1].sum(0), dz
