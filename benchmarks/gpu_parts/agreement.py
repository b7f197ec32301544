"""The kernels against the definition in float64, beside PyTorch's own operators."""

import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gn_practical.layers import standardize_weight
from gn_practical.layers.fused_group_norm import fused_group_norm
from gn_practical.training.processes import end_with_parent
from gpu_parts.record import Record
from gpu_parts.settings import Settings

DTYPES = ("float32", "bfloat16", "float16")
# Small groups and large ones; rows that wide loads take and rows that they do not; short and long.
SIZES = [(1, 64, 7, 7), (3, 96, 16, 20), (2, 64, 25, 42), (2, 256, 50, 84), (2, 64, 199, 301)]
LONG_SIZES = [(1, 2048, 25, 42), (4, 512, 13, 21), (2, 256, 200, 336), (1, 8, 800, 1333)]
DRY_SIZES = [(1, 8, 5, 6), (1, 2, 130, 64)]
WEIGHTS = [(64, 3, 7, 7), (256, 64, 1, 1), (512, 512, 3, 3), (1024, 12544)]
KINDS = [(True, False), (True, True), (False, False)]  # ReLU, residual
HEADERS = ["precision", "cases", "error / allowed", "in", "weight standardization", "not repeated",
           "seconds"]  # fmt: skip
NEAR = 0.05  # of the ReLU's kink, where rounding alone decides whether a gradient passes
Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    """A call of the operator."""

    shape: tuple[int, ...]
    groups: int
    dtype: str
    channels_last: bool
    relu: bool
    residual: bool
    mean: float = 3.0


def run(settings: Settings, record: Record) -> None:
    """Compare in all precisions at once: most of the time goes to compiling."""
    every = settings.choose(5, 1)
    jobs = [(dtype, settings.device, every, *sizes(settings, dtype)) for dtype in DTYPES]
    results: list[dict] = []
    context, number = get_context(settings.start_method), settings.choose(2, len(DTYPES))
    with ProcessPoolExecutor(number, context, initializer=end_with_parent) as pool:
        for job in as_completed([pool.submit(compare, job) for job in jobs]):
            results.append(job.result())
            record.table("Largest errors", HEADERS, list(map(row, results)))
    record.value("errors", max(error for found in results for _, error in found["cases"]))
    record.value("ws errors", max(found["ws"] for found in results))
    record.value("repeats", sum(found["changed"] for found in results))
    record.value("gamma", next(found["gamma"] for found in results if found["gamma"]))
    record.data(cases=[each for found in results for each in found["cases"]])


def row(found: dict) -> list:
    """Lay out what was found in one precision."""
    case, error = max(found["cases"], key=lambda each: each[1])
    return [found["dtype"], len(found["cases"]), error, case, found["ws"], found["changed"],
            found["seconds"]]  # fmt: skip


def sizes(settings: Settings, dtype: str) -> tuple[list, list]:
    """Return the shapes of inputs and of weights."""
    if settings.dry:  # large groups in one precision alone: the interpreter is slow
        return DRY_SIZES[: 2 if dtype == "float32" else 1], WEIGHTS[:1]
    return SIZES + LONG_SIZES * settings.long, WEIGHTS


def compare(job: tuple[str, str, int, list, list]) -> dict:
    """Compare in one precision, in a process of its own, ``every`` so many cases."""
    dtype, device, every, shapes, weights = job
    start = time.perf_counter()
    cases = all_cases(dtype, shapes)[::every]
    found = [(str(tuple(case)), error_of(case, device)) for case in cases]
    return {
        "dtype": dtype,
        "cases": found,
        "ws": max(error_of_weights(shape, dtype, device) for shape in weights),
        "changed": sum(changes(case, device) for case in cases[::6]),
        "gamma": gain_of_gamma(shapes[-1], device) if dtype == "float32" else None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def all_cases(dtype: str, shapes: list) -> list[Case]:
    """List layouts, numbers of groups and kinds of each shape."""
    return [
        Case(shape, groups, dtype, last, *kind)
        for shape, last in product(shapes, (False, True))
        for groups, kind in zip(some_groups(shape[1]), KINDS, strict=True)
    ] + [Case(shapes[0], 1, dtype, last, *kind) for last in (False, True) for kind in KINDS[1:]]


def some_groups(channels: int) -> list[int]:
    """Return 1, the number of channels, and what lies between."""
    return [1, channels, max(1, channels // 4)]


def make(case: Case, device: str) -> tuple[list[Tensor], Tensor]:
    """Return inputs, the parameters in float32 with values that half precision has, and dL/dy."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    x = draw(case.shape) * 2 + case.mean
    inputs = [x.contiguous(memory_format=layout)]
    inputs += [draw(case.shape[1:2]).float() for _ in range(2)]
    if case.residual:
        inputs.append(draw(case.shape).contiguous(memory_format=layout))
    upstream = draw(case.shape).contiguous(memory_format=layout)
    return [each.requires_grad_() for each in inputs], upstream


def ours(case: Case, inputs: list[Tensor], upstream: Tensor) -> Tensors:
    """Return output and gradients of the operator."""
    residual = inputs[3] if case.residual else None
    y = fused_group_norm(inputs[0], case.groups, *inputs[1:3], 1e-5, residual, case.relu)
    assert y.dtype is inputs[0].dtype, f"{case} gave {y.dtype}"
    assert y.stride() == inputs[0].stride(), f"{case} changed the layout"
    return y, *torch.autograd.grad(y, inputs, upstream)


def composed(case: Case, inputs: list[Tensor], upstream: Tensor, dtype: torch.dtype) -> Tensors:
    """Return output and gradients of PyTorch's operators, all in one precision."""
    inputs = [each.detach().to(dtype).requires_grad_() for each in inputs]
    y = F.group_norm(inputs[0], case.groups, *inputs[1:3], 1e-5)
    y = y + inputs[3] if case.residual else y
    y = F.relu(y) if case.relu else y
    return y, *torch.autograd.grad(y, inputs, upstream.to(dtype))


def errors(results: Tensors, wanted: Tensors) -> list[float]:
    """Return the largest error of each, relative to the largest value."""
    return [
        ((a.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)).item()
        for a, w in zip(results, wanted, strict=True)
    ]


def error_of(case: Case, device: str) -> float:
    """Return the largest error over what is allowed: twice PyTorch's, at least 4 roundings."""
    inputs, upstream = make(case, device)
    before, *_ = composed(case._replace(relu=False), inputs, upstream, torch.float64)
    upstream = upstream * (before.abs() > NEAR)
    wanted = composed(case, inputs, upstream, torch.float64)
    own = errors(ours(case, inputs, upstream), wanted)
    theirs = errors(composed(case, inputs, upstream, inputs[0].dtype), wanted)
    least = 4 * torch.finfo(inputs[0].dtype).eps
    return max(a / max(2 * b, least) for a, b in zip(own, theirs, strict=True))


def changes(case: Case, device: str) -> int:
    """Count what differs between two calls on the same input."""
    inputs, upstream = make(case, device)
    pairs = zip(*(ours(case, inputs, upstream) for _ in range(2)), strict=True)
    return sum(not torch.equal(a, b) for a, b in pairs)


def gain_of_gamma(shape: tuple[int, ...], device: str) -> float:
    """Return PyTorch's error of dγ over ours, at mean/std = 25."""
    case = Case(shape, 1, "float32", False, False, False, mean=50.0)
    inputs, upstream = make(case, device)
    wanted = composed(case, inputs, upstream, torch.float64)[2:3]
    theirs = errors(composed(case, inputs, upstream, torch.float32)[2:3], wanted)[0]
    return theirs / max(errors(ours(case, inputs, upstream)[2:3], wanted)[0], 1e-12)


def error_of_weights(shape: tuple[int, ...], dtype: str, device: str) -> float:
    """Return the error of weight standardization over what is allowed, as :func:`error_of`."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(kind).to(device) for _ in range(2)]

    def results(function: object, to: torch.dtype) -> Tensors:
        weight = drawn[0].to(to).requires_grad_()
        y = function(weight)
        return y, *torch.autograd.grad(y, weight, drawn[1].to(to))

    def composed_in(weight: Tensor) -> Tensor:
        std, mean = torch.std_mean(weight.flatten(1), 1, keepdim=True)
        return ((weight.flatten(1) - mean) / (std + 1e-5)).view_as(weight)

    wanted = results(composed_in, torch.float64)
    own = errors(results(standardize_weight, kind), wanted)
    theirs = errors(results(composed_in, kind), wanted)
    least = 4 * torch.finfo(kind).eps
    return max(a / max(2 * b, least) for a, b in zip(own, theirs, strict=True))
