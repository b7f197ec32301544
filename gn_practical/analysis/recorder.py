"""Measure the gradient around every unit block while a model runs, and predict it.

The values are reduced to sums in hooks; no activation or gradient is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gn_practical.activation_gain import ACTIVATIONS, activation_gain
from gn_practical.analysis.blocks import UnitBlock, find_unit_blocks
from gn_practical.analysis.channel_statistics import ChannelStatistics
from gn_practical.analysis.exact_factor import convolution_factor
from gn_practical.layers import WSConv2d, standardize_weight
from gn_practical.modeling.sources import tensors
from gn_practical.num_groups import gradient_variance_ratio

RATIOS = {"A": "ux", "B": "xy", "C": "yz", "K": "uz"}
_PRODUCTS = {"K": "product", "K_paper": "product_paper", "K_exact": "product_exact"}
_POINTS = {"z": "output", "y": "norm's output", "x": "norm's input", "u": "input"}
ADDITIONS = ("add", "iadd", "radd")
MORE_ACTIVATIONS = ("rrelu", "celu", "hardsigmoid", "logsigmoid", "softshrink", "tanhshrink")


@dataclass(frozen=True)
class BlockAudit:
    """What one unit block did to the gradient, and what was predicted.

    A value is None where it could not be measured or predicted: no gradient reached the block, or
    the layer that feeds the norm is not known.
    """

    choice: str  # of groups, as it was asked for
    layer: str  # path of the norm
    weight_layer: str  # path of the layer that feeds it
    activation: str  # of the norm's output; "add" where something is added first; else empty
    parent: str  # the block before this one on the longest path of blocks from the input
    depth: int  # blocks on that path, this one included; 0 for a block that did not run
    in_channels: int | None
    out_channels: int
    num_groups: int
    A: float | None
    B: float | None
    C: float | None
    K: float | None
    K_paper: float | None  # Eq. 31
    K_exact: float | None  # from the exact factor, see audit_isometry
    product: float | None  # of K over the path from the input through parent to this block
    product_paper: float | None
    product_exact: float | None
    gradient: float | None  # V(z), the mean square of the gradient at the block's output
    shared: float | None  # r: part of the norm's input that the pixels of a channel share
    dead: float | None  # share of the channels that a ReLU makes zero everywhere
    always_on: float | None  # share of the channels that it leaves as they are
    effective_rank: float | None  # of the channels of the norm's output, from 1 to out_channels


class BlockRecorder(TorchFunctionMode):
    """Measures unit blocks while a model runs forward and backward inside its context.

    The activation that follows a norm is found by watching torch's functions: the first of the
    known ones that takes the norm's output as it is, be it a module, a function, or in place.

    Args:
        model: any module with group norms.
        strict: raise at the first value that is not finite, and at a group that holds one value.
    """

    def __init__(self, model: nn.Module, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict
        self._meters = [_Meter(block) for block in find_unit_blocks(model)]
        self._order: list[_Meter] = []  # as they first ran
        self._handles = ExitStack()

    def __enter__(self) -> BlockRecorder:
        for meter in self._meters:
            norm, layer = meter.block.norm, meter.block.layer
            # A handle is a context that removes its hook.
            attach = self._handles.enter_context
            attach(norm.register_forward_pre_hook(partial(self._before_norm, meter)))
            attach(norm.register_forward_hook(partial(self._after_norm, meter)))
            if layer is not None:
                attach(layer.register_forward_pre_hook(partial(self._before_layer, meter)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._handles.close()
        if error[0] is None and self.strict:
            self._check_gradients()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run a function of torch; note activations, and on which block its result depends."""
        name = getattr(func, "__name__", "").strip("_")
        known = name in ACTIVATIONS or name in ADDITIONS or name in MORE_ACTIVATIONS
        meter = _norm_of(args) if known else None  # before the call, which may be in place
        result = func(*args, **(kwargs or {}))
        if meter is not None:
            meter.follow("add" if name in ADDITIONS else name, result)
        _inherit(result, args)
        return result

    def ratios(self) -> dict[str, dict[str, float]]:
        """Return what was measured: path of the norm → A, B, C, K and what its channels do.

        Missing ones are left out.
        """
        return {
            meter.block.path: {name: value for name in RATIOS if (value := meter.ratio(name))}
            | {name: v for name, v in meter.diagnosis().items() if v is not None}
            for meter in self._order
        }

    def rows(self, choice: str = "model") -> list[BlockAudit]:
        """Return what was measured and predicted, one row a block."""
        rows: dict[str, BlockAudit] = {}
        for meter in self._order + [m for m in self._meters if m not in self._order]:
            rows[meter.block.path] = _row(choice, meter, rows.get(meter.parent))
        return list(rows.values())

    def _before_layer(self, meter: _Meter, module: nn.Module, args: tuple) -> tuple | None:
        if not (torch.is_grad_enabled() and args and args[0].is_floating_point()):
            return None
        u = args[0]
        # An alias of its own, so that only the gradient through this layer arrives at it. Where
        # nothing before the block is trained, the gradient is asked for all the same.
        u = u.view_as(u) if u.requires_grad else u.detach().requires_grad_()
        _inherit(u, args)
        meter.input_size = tuple(u.shape[2:])
        u.register_hook(partial(meter.add_gradient, "u"))
        return (u, *args[1:])

    def _before_norm(self, meter: _Meter, module: nn.Module, args: tuple) -> None:
        x = args[0]
        if not (torch.is_grad_enabled() and x.numel()):
            return
        if not meter.depth:
            before, meter.parent = getattr(x, "_last_block", (0, ""))
            meter.depth = before + 1
            self._order.append(meter)
        meter.add_signal(x.detach(), self.strict)
        if x.requires_grad:
            x.register_hook(partial(meter.add_gradient, "x"))

    def _after_norm(self, meter: _Meter, module: nn.Module, args: tuple, y: Tensor) -> None:
        if not (torch.is_grad_enabled() and y.numel()):
            return
        y._last_block = (meter.depth, meter.block.path)
        y._norm_output = (meter, y._version)
        meter.channels.add(y)
        if y.requires_grad:
            y.register_hook(partial(meter.add_gradient, "y"))

    def _check_gradients(self) -> None:
        for meter in reversed(self._order):  # the order of the backward pass
            for point in _POINTS:
                if not isfinite(meter.mean(point)):
                    raise FloatingPointError(
                        f"the gradient must be finite, got NaN or infinity at the {_POINTS[point]} "
                        f"of the unit block {meter.block.path}. Check the loss, the weights and "
                        "the ground truth."
                    )


class _Meter:
    """Sums of one unit block: squares of gradients at u, x, y, z and of the norm's input."""

    def __init__(self, block: UnitBlock) -> None:
        self.block = block
        self.depth, self.parent = 0, ""
        self.activation = ""
        self.num_groups = block.norm.num_groups
        self.input_size: tuple[int, ...] = ()
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.channels = ChannelStatistics()

    def add_gradient(self, point: str, gradient: Tensor) -> None:
        self._add(point, _sum_of_squares(gradient), gradient.numel())

    def add_signal(self, x: Tensor, strict: bool) -> None:
        pixels = x[0, 0].numel()
        squares = _sum_of_squares(x)
        if strict:
            self._check_signal(squares, pixels)
        common = pixels * _sum_of_squares(x.flatten(2).mean(-1)) if pixels > 1 else squares
        inside = _inside(self.block.layer, self.input_size) * x.numel()
        for point, value in (("signal", squares), ("common", common), ("inside", inside)):
            self._add(point, value, x.numel())
        self.counts["samples"] += len(x)

    def follow(self, name: str, result: Tensor) -> None:
        """Note what acts on the norm's output; an activation's result is the block's output."""
        self.activation = name
        if name != "add" and result.requires_grad:
            result.register_hook(partial(self.add_gradient, "z"))

    def mean(self, point: str) -> float:
        if point == "z" and not self.counts["z"]:
            point = "y"
        return float(self._sums[point]) / max(self.counts[point], 1)

    def ratio(self, name: str) -> float | None:
        above, below = map(self.mean, RATIOS[name])
        return above / below if above and below else None

    def shared(self) -> float | None:
        """Return r, the part of the second moment that the pixels of a channel have in common."""
        variance = self.mean("signal")
        return min(self.mean("common") / variance, 1.0) if variance else None

    def diagnosis(self) -> dict[str, float | None]:
        """Return what the forward pass tells of the channels."""
        relu = self.activation == "relu"
        return {
            "shared": self.shared(),
            "dead": self.channels.dead() if relu else None,
            "always_on": self.channels.always_on() if relu else None,
            "effective_rank": self.channels.effective_rank(),
        }

    def _add(self, point: str, value: float | Tensor, count: int) -> None:
        self._sums[point] += value
        self.counts[point] += count

    def _check_signal(self, squares: Tensor, pixels: int) -> None:
        if not squares.isfinite():
            raise FloatingPointError(
                f"activations must be finite, got NaN or infinity at the input of "
                f"{self.block.path}, which comes from {self.block.layer_path or 'before it'}. "
                "Check that layer's weights and the input."
            )
        norm = self.block.norm
        if norm.num_channels // norm.num_groups * pixels == 1:
            raise ValueError(
                "a group must hold more than one value, or its output is constant and its "
                f"gradient zero, got num_groups={norm.num_groups} for {norm.num_channels} "
                f"channels of one pixel at {self.block.path}. Choose fewer groups."
            )


def _sum_of_squares(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()


def _norm_of(args: tuple) -> _Meter | None:
    """Return the meter of the norm whose output, not modified since, is among the arguments."""
    for arg in args[:2]:
        meter, version = getattr(arg, "_norm_output", (None, 0))
        if meter is not None and arg._version == version:
            return meter
    return None


def _inherit(result: Any, args: tuple) -> None:
    """Hand the deepest block that the arguments depend on over to the results."""
    known = [arg._last_block for arg in tensors(args) if hasattr(arg, "_last_block")]
    for tensor in tensors(result) if known else ():
        tensor._last_block = max(*known, getattr(tensor, "_last_block", known[0]))


def _row(choice: str, meter: _Meter, parent: BlockAudit | None) -> BlockAudit:
    block, groups = meter.block, meter.num_groups
    channels = block.in_channels, block.norm.num_channels
    values = {name: meter.ratio(name) for name in RATIOS}
    known = block.in_channels is not None
    paper = gradient_variance_ratio(*channels, groups, block.gain_ratio) if known else None
    values |= {"K_paper": paper, "K_exact": _exact_ratio(meter)}
    for name, product in _PRODUCTS.items():
        factors = values[name], getattr(parent, product, 1.0)
        values[product] = None if None in factors else prod(factors)
    return BlockAudit(
        *(choice, block.path, block.layer_path, meter.activation, meter.parent, meter.depth),
        *(*channels, groups),
        **values,
        gradient=meter.mean("z") or None,
        **meter.diagnosis(),
    )


def _exact_ratio(meter: _Meter) -> float | None:
    """Predict K as A B C, see :func:`audit_isometry`."""
    layer, norm = meter.block.layer, meter.block.norm
    gain = _backward_gain(meter.activation)
    variance = meter.mean("signal")
    if not (meter.counts["u"] and meter.counts["x"] and variance and gain):
        return None
    with torch.no_grad():
        weight = standardize_weight(layer.weight) if isinstance(layer, WSConv2d) else layer.weight
        squares = _sum_of_squares(weight).item()
        scale = norm.weight.double().square().mean().item() if norm.affine else 1.0
    if getattr(layer, "transposed", False):  # every input value reaches a whole filter
        weight_layer = squares / layer.in_channels
    else:  # every output value is reached by one
        weight_layer = squares / norm.num_channels * meter.counts["x"] / meter.counts["u"]
        weight_layer *= meter.mean("inside")
    size = norm.num_channels // meter.num_groups
    pixels = round(meter.counts["signal"] / meter.counts["samples"] / norm.num_channels)
    factor = convolution_factor(size, pixels, meter.shared(), norm.eps / variance)
    return weight_layer * factor * scale / variance * gain


def _inside(layer: nn.Module | None, in_size: tuple[int, ...]) -> float:
    """Return the share of a convolution's taps that lie inside its input, not in the padding."""
    padding = getattr(layer, "padding", None)
    transposed = getattr(layer, "transposed", False)
    if transposed or not (isinstance(padding, tuple) and len(padding) == len(in_size)):
        return 1.0
    share = 1.0
    axes = zip(in_size, layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
    for size, kernel, *options in axes:
        ones = torch.ones(1, 1, size).double(), torch.ones(1, 1, kernel).double()
        share *= nn.functional.conv1d(*ones, None, *options).mean().item() / kernel
    return share


@cache
def _backward_gain(activation: str) -> float | None:
    if activation in ("", "add"):
        return 1.0
    return activation_gain(activation)[1] if activation in ACTIVATIONS else None
