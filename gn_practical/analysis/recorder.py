"""Measure the gradient around every unit block while a model runs, and predict it.

The values are reduced to sums in hooks; no activation or gradient is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gn_practical.activation_gain import ACTIVATIONS, activation_gain
from gn_practical.analysis.blocks import UnitBlock, find_unit_blocks
from gn_practical.analysis.exact_factor import convolution_factor
from gn_practical.layers import WSConv2d, standardize_weight
from gn_practical.num_groups import gradient_variance_ratio

RATIOS = {"A": "ux", "B": "xy", "C": "yz", "K": "uz"}
ADDITIONS = ("add", "iadd", "radd")
MORE_ACTIVATIONS = ("rrelu", "celu", "hardsigmoid", "logsigmoid", "softshrink", "tanhshrink")


@dataclass(frozen=True)
class BlockAudit:
    """What one unit block did to the gradient, and what was predicted.

    A value is None where it could not be measured or predicted: no gradient reached the block, or
    the layer that feeds the norm is not known.

    Attributes:
        choice: the choice of groups, as it was asked for.
        layer: path of the norm.
        weight_layer: path of the layer that feeds it.
        activation: name of the function that acts on the norm's output; "add" where a residual or
            an FPN level is added first; empty for anything else.
        parent: the block before this one on the longest path of blocks from the input.
        depth: blocks on that path, this one included; 0 for a block that did not run.
        in_channels: n_in.
        out_channels: n_out.
        num_groups: G.
        A: V(u) / V(x), measured.
        B: V(x) / V(y), measured.
        C: V(y) / V(z), measured.
        K: V(u) / V(z), measured.
        K_paper: Eq. 31.
        K_exact: from the exact factor, see :func:`audit_isometry`.
        product: of K over the path from the input through ``parent`` to this block.
        product_paper: the same of K_paper.
        product_exact: the same of K_exact.
        gradient: V(z), the mean square of the gradient at the block's output.
    """

    choice: str
    layer: str
    weight_layer: str
    activation: str
    parent: str
    depth: int
    in_channels: int | None
    out_channels: int
    num_groups: int
    A: float | None
    B: float | None
    C: float | None
    K: float | None
    K_paper: float | None
    K_exact: float | None
    product: float | None
    product_paper: float | None
    product_exact: float | None
    gradient: float | None


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
        self.blocks = find_unit_blocks(model)
        self.strict = strict
        self._meters = [_Meter(block) for block in self.blocks]
        self._order: list[_Meter] = []  # as they first ran
        self._handles = ExitStack()

    def __enter__(self) -> BlockRecorder:
        for meter in self._meters:
            hooks = [
                meter.block.norm.register_forward_pre_hook(partial(self._before_norm, meter)),
                meter.block.norm.register_forward_hook(partial(self._after_norm, meter)),
            ]
            if meter.block.layer is not None:
                layer = meter.block.layer
                hooks.append(layer.register_forward_pre_hook(partial(self._before_layer, meter)))
            for hook in hooks:
                self._handles.callback(hook.remove)
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
        meter = None
        if name in ACTIVATIONS or name in ADDITIONS or name in MORE_ACTIVATIONS:
            meter = _norm_of(args)  # before the call, which may be in place
        result = func(*args, **(kwargs or {}))
        if meter is not None:
            meter.follow("add" if name in ADDITIONS else name, result)
        if isinstance(result, Tensor | tuple | list):
            _inherit(result, args)
        return result

    def ratios(self) -> dict[str, dict[str, float]]:
        """Return what was measured: path of the norm → A, B, C and K, without missing ones."""
        return {
            meter.block.path: {name: value for name in RATIOS if (value := meter.ratio(name))}
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
        if not meter.ran:
            meter.ran, meter.parent = True, getattr(x, "_last_block", (0, ""))[1]
            meter.depth = getattr(x, "_last_block", (0, ""))[0] + 1
            self._order.append(meter)
        meter.add_signal(x.detach(), self.strict)
        if x.requires_grad:
            x.register_hook(partial(meter.add_gradient, "x"))

    def _after_norm(self, meter: _Meter, module: nn.Module, args: tuple, y: Tensor) -> None:
        if not (torch.is_grad_enabled() and y.numel()):
            return
        y._last_block = (meter.depth, meter.block.path)
        y._norm_output = (meter, y._version)
        if y.requires_grad:
            y.register_hook(partial(meter.add_gradient, "y"))

    def _check_gradients(self) -> None:
        for meter in reversed(self._order):  # the order of the backward pass
            for point in "zyxu":
                if not meter.mean(point) < float("inf"):
                    what = {"u": "input", "x": "norm's input", "y": "norm's output"}
                    raise FloatingPointError(
                        f"the gradient must be finite, got NaN or infinity at the "
                        f"{what.get(point, 'output')} of the unit block {meter.block.path}. Check "
                        "the loss, the weights and the ground truth."
                    )


class _Meter:
    """Sums of one unit block: squares of gradients at u, x, y, z and of the norm's input."""

    def __init__(self, block: UnitBlock) -> None:
        self.block = block
        self.ran = False
        self.depth, self.parent = 0, ""
        self.activation = ""
        self.num_groups = block.norm.num_groups
        self.input_size: tuple[int, ...] = ()
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add_gradient(self, point: str, gradient: Tensor) -> None:
        self._add(point, _sum_of_squares(gradient), gradient.numel())

    def add_signal(self, x: Tensor, strict: bool) -> None:
        pixels = x[0, 0].numel()
        squares = _sum_of_squares(x)
        if strict:
            self._check_signal(squares, pixels)
        common = pixels * _sum_of_squares(x.flatten(2).mean(-1)) if pixels > 1 else squares
        self._add("signal", squares, x.numel())
        self._add("common", common, x.numel())
        self._add("samples", 0.0, len(x))
        inside = _inside(self.block.layer, self.input_size, tuple(x.shape[2:]))
        self._add("inside", inside * x.numel(), x.numel())

    def follow(self, name: str, result: Tensor) -> None:
        """Note what acts on the norm's output; an activation's result is the block's output."""
        self.activation = name
        if name != "add" and result.requires_grad:
            result.register_hook(partial(self.add_gradient, "z"))

    def mean(self, point: str) -> float:
        if point == "z" and not self._counts["z"]:
            point = "y"
        return float(self._sums[point]) / max(self._counts[point], 1)

    def count(self, point: str) -> int:
        return self._counts[point]

    def ratio(self, name: str) -> float | None:
        above, below = map(self.mean, RATIOS[name])
        return above / below if above and below else None

    def _add(self, point: str, value: float | Tensor, count: int) -> None:
        self._sums[point] += value
        self._counts[point] += count

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
    deepest = max((arg._last_block for arg in _tensors(args)), default=None)
    if deepest is not None:
        for tensor in [result] if isinstance(result, Tensor) else result:
            if isinstance(tensor, Tensor):
                tensor._last_block = max(deepest, getattr(tensor, "_last_block", deepest))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _tensors(value)
        elif hasattr(value, "_last_block"):
            yield value


def _row(choice: str, meter: _Meter, parent: BlockAudit | None) -> BlockAudit:
    block = meter.block
    n_out, groups = block.norm.num_channels, meter.num_groups
    measured = {name: meter.ratio(name) for name in RATIOS}
    paper = None
    if block.in_channels:
        paper = gradient_variance_ratio(block.in_channels, n_out, groups, block.gain_ratio)
    exact = _exact_ratio(meter)
    return BlockAudit(
        choice=choice,
        layer=block.path,
        weight_layer=block.layer_path,
        activation=meter.activation,
        parent=meter.parent,
        depth=meter.depth,
        in_channels=block.in_channels,
        out_channels=n_out,
        num_groups=groups,
        **measured,
        K_paper=paper,
        K_exact=exact,
        product=_times(measured["K"], parent and parent.product, parent),
        product_paper=_times(paper, parent and parent.product_paper, parent),
        product_exact=_times(exact, parent and parent.product_exact, parent),
        gradient=meter.mean("z") or None,
    )


def _times(value: float | None, before: float | None, parent: BlockAudit | None) -> float | None:
    if parent is None or value is None:
        return value
    return None if before is None else value * before


def _exact_ratio(meter: _Meter) -> float | None:
    """Predict K as A B C, see :func:`audit_isometry`."""
    layer, norm = meter.block.layer, meter.block.norm
    gain = _backward_gain(meter.activation)
    variance = meter.mean("signal")
    if not (meter.count("u") and meter.count("x") and variance and gain):
        return None
    with torch.no_grad():
        weight = standardize_weight(layer.weight) if isinstance(layer, WSConv2d) else layer.weight
        squares = _sum_of_squares(weight).item()
        scale = norm.weight.double().square().mean().item() if norm.affine else 1.0
    if getattr(layer, "transposed", False):  # every input value reaches a whole filter
        weight_layer = squares / layer.in_channels
    else:  # every output value is reached by one
        weight_layer = squares / norm.num_channels * meter.count("x") / meter.count("u")
        weight_layer *= meter.mean("inside")
    size = norm.num_channels // meter.num_groups
    pixels = round(meter.count("signal") / meter.count("samples") / norm.num_channels)
    shared = min(meter.mean("common") / variance, 1.0)
    factor = convolution_factor(size, pixels, shared, norm.eps / variance)
    return weight_layer * factor * scale / variance * gain


def _inside(layer: nn.Module | None, in_size: tuple[int, ...], out_size: tuple[int, ...]) -> float:
    """Return the share of a convolution's taps that lie inside its input, not in the padding."""
    padding = getattr(layer, "padding", None)
    if not (isinstance(padding, tuple) and len(padding) == len(in_size) == len(out_size)):
        return 1.0
    share = 1.0
    options = (layer.kernel_size, layer.stride, padding, layer.dilation)
    for n_in, n_out, kernel, stride, pad, dilation in zip(in_size, out_size, *options, strict=True):
        count = 0
        for start in range(-pad, kernel * dilation - pad, dilation):  # output o sees start + o s
            first, last = max(0, -(start // stride)), min(n_out - 1, (n_in - 1 - start) // stride)
            count += max(0, last - first + 1)
        share *= count / (kernel * n_out)
    return share


@cache
def _backward_gain(activation: str) -> float | None:
    if activation in ("", "add"):
        return 1.0
    return activation_gain(activation)[1] if activation in ACTIVATIONS else None
