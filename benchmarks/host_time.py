"""Time what the fused operator costs the host around its kernels, without a GPU.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py

Triton gets a driver that compiles for sm_90 and launches nothing, so all that Python does is
timed, on small CPU tensors, and the driver's own some 2 µs a launch are not. PyTorch's norm, which
does its computation, and an empty ``autograd.Function`` stand beside it. All cases take turns;
medians and least times over the rounds, in µs of processor time a call. The first run compiles.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
from tabulate import tabulate
from torch import Tensor
from triton.backends.compiler import GPUTarget

from gn_practical.layers import backends, fused_group_norm, group_norm_kernels, standardize_weight

CALLS = 100  # of a case in a round
LAYERS = 10  # in a row
Case = Callable[[], object]


class NoDevice:
    """Triton's driver of an H100 that takes every launch and does nothing."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self

    def get_current_device(self) -> int:
        """Return the only one."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Return the default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what Triton asks for."""
        return {"max_shared_mem": 232448}

    def load_binary(self, *_: object) -> tuple[int, ...]:
        """Return a module, a function, registers, spills and threads."""
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        """Do nothing."""

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        """Return what launches a kernel."""
        return self.launch

    def launch(self, *_: object) -> None:
        """Count."""
        self.launches += 1


class Empty(torch.autograd.Function):
    """Allocates what the norm does."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *tensors: Tensor) -> Tensor:
        """Allocate the output."""
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor, ...]:
        """Allocate the gradients."""
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def norms(shape: tuple[int, ...], groups: int, device: str = "cpu") -> dict[str, tuple[Case, Case]]:
    """Return forward pass, and forward and backward, of the norms to compare."""
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = (torch.ones(shape[1], device=device, requires_grad=True) for _ in range(2))
    fused, operator = fused_group_norm.fused_group_norm, torch.ops.gn_practical.group_norm
    forwards = {
        "fused": lambda: fused(x, groups, weight, bias, relu=True),
        "fused, as the custom operator": lambda: operator(
            x, weight, bias, None, groups, 1e-5, True
        )[0],
        "F.group_norm + relu_": lambda: F.relu_(F.group_norm(x, groups, weight, bias)),
        "empty autograd.Function": lambda: Empty.apply(x, weight, bias),
    }
    return {name: (f, both(f, x, weight, bias)) for name, f in forwards.items()}


def both(forward: Case, *inputs: Tensor) -> Case:
    """Add the backward pass."""
    upstream = torch.randn_like(inputs[0])

    def run() -> None:
        forward().backward(upstream)
        for each in inputs:
            each.grad = None

    return run


def chain(shape: tuple[int, ...], groups: int) -> dict[str, tuple[Case, Case]]:
    """Return the same for ``LAYERS`` layers in a row, as a model has them.

    That is without what PyTorch's engine takes to start, which a single backward pass pays too.
    """
    x, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
    layers = [[torch.ones(shape[1], requires_grad=True) for _ in "wb"] for _ in range(LAYERS)]
    leaves = [x, *(tensor for layer in layers for tensor in layer)]
    one_layer = {
        "fused": lambda x, w, b: fused_group_norm.fused_group_norm(x, groups, w, b, relu=True),
        "F.group_norm + relu_": lambda x, w, b: F.relu_(F.group_norm(x, groups, w, b)),
        "empty autograd.Function": Empty.apply,
    }

    def cases(layer: Callable[..., Tensor]) -> tuple[Case, Case]:
        forward = lambda: functools.reduce(lambda y, each: layer(y, *each), layers, x)  # noqa: E731
        return forward, lambda: torch.autograd.grad(forward(), leaves, upstream)

    return {name: cases(layer) for name, layer in one_layer.items()}


def parts(shape: tuple[int, ...], groups: int) -> dict[str, Case]:
    """Return what a forward pass consists of, each by itself."""
    x, weight = torch.randn(shape), torch.ones(shape[1])
    key = (x.dtype, weight.dtype, weight.dtype, x.get_device())
    prepared = (x, torch.contiguous_format, key, groups, (True, False), False)
    plan, _ = group_norm_kernels._prepare(*prepared)
    kernel, args = group_norm_kernels._normalize, (x, None, x, weight, weight, weight)
    through_triton = (*args, *plan.rows.numbers, True, False, *plan.rows.tile)
    return {
        "checks of the input": lambda: fused_group_norm._kernels_take(
            x, groups, weight, weight, None
        ),
        "plan and key": lambda: group_norm_kernels._prepare(*prepared),
        "allocation": lambda: (
            torch.empty_like(x), x.new_empty((2, shape[0], groups), dtype=torch.float32)
        ),
        "a launch": lambda: kernel(plan.rows, args, key, 0, (True, False)),
        "a launch by Triton's dispatcher": lambda: kernel.jit[plan.rows.grid](*through_triton),
    }  # fmt: skip


def microseconds(
    cases: dict[Any, Case],
    rounds: int,
    calls: int = CALLS,
    wait: Case = lambda: None,
    now: Callable[[], float] = time.thread_time,
) -> dict[Any, list[float]]:
    """Return the times of a call in each round.

    Args:
        cases: run in turns.
        rounds: that are counted, after one that compiles.
        calls: of a case in a round.
        wait: lets a device finish what is queued, before each case.
        now: the clock; not the thread's on a GPU, where another one runs backward passes.
    """
    times: dict[Any, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            wait()
            start = now()
            for _ in range(calls):
                case()
            times[name].append((now() - start) / calls * 1e6)
    return {name: values[1:] for name, values in times.items()}  # the first round compiles


def measure(cases: dict[Any, Case], rounds: int) -> dict[Any, str]:
    """Time all cases in turns."""
    times = microseconds(cases, rounds)
    return {name: f"{statistics.median(v):.1f} ({min(v):.1f})" for name, v in times.items()}


def launches(driver: NoDevice, case: Case) -> int:
    """Count those of a call that is not the first."""
    case()
    before = driver.launches
    case()
    return driver.launches - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    driver = NoDevice()
    triton.runtime.driver.set_active(driver)
    backends.INTERPRETED = fused_group_norm.INTERPRETED = True  # CPU tensors are taken
    print(f"torch {torch.__version__}, triton {triton.__version__}; µs a call: median (least)")
    filters = torch.randn(64, 64, 3, 3, requires_grad=True)
    standardize = lambda: standardize_weight(filters)  # noqa: E731
    tables = {
        "small groups, 2×64×8×8": norms((2, 64, 8, 8), 16),
        "large groups, 1×64×17×17": norms((1, 64, 17, 17), 1),
        f"{LAYERS} layers of small groups": chain((2, 64, 8, 8), 16),
        f"{LAYERS} layers of large groups": chain((1, 64, 17, 17), 1),
        "a weight of 64×64×3×3": {"standardize_weight": (standardize, both(standardize, filters))},
    }
    for title, pairs in tables.items():
        counts = [[launches(driver, case) for case in pair] for pair in pairs.values()]
        flat = {(name, i): case for name, pair in pairs.items() for i, case in enumerate(pair)}
        found = measure(flat, rounds)
        rows = [
            [name, found[name, 0], found[name, 1], *count]
            for name, count in zip(pairs, counts, strict=True)
        ]
        headers = (title, "forward", "and backward", "launches", "and backward")
        print(tabulate(rows, headers=headers))
    found = measure(parts((1, 64, 17, 17), 1), rounds)
    print(tabulate(found.items(), headers=("part of a forward pass", "time")))


if __name__ == "__main__":
    main()
