"""Triton kernels that are launched at little cost to the host."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gn_practical.layers.backends import INTERPRETED

Constants = tuple[bool | int, ...]


class Cut(NamedTuple):
    """How a kernel's work is cut into programs."""

    grid: tuple[int, int, int]
    numbers: tuple[int, ...]  # sizes, as the kernel takes them
    tile: Constants
    tiles: tuple[Constants, ...]  # all that ``tile`` can be; the first launch compiles for each


class Kernel:
    """A kernel whose compiled forms are kept by what they depend on.

    Triton's own launch looks at each argument to find the compiled form, at several times the cost.
    What it would see must follow from the key: the types of the arguments, and that the addresses
    of tensors are multiples of 16 bytes. Numbers are not specialized.

    Args:
        function: takes pointers, whose names end with ``_ptr``, numbers, and annotated constants.
    """

    def __init__(self, function: Callable) -> None:
        plain = [
            p for p in inspect.signature(function).parameters.values() if p.annotation is p.empty
        ]
        numbers = [p.name for p in plain if not p.name.endswith("_ptr")]
        self.jit = triton.jit(do_not_specialize=numbers)(function)
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, cut: Cut, args: tuple, key: tuple, flags: Constants = ()) -> None:
        """Launch with ``args``, the numbers of ``cut``, ``flags``, and the constants of ``cut``.

        ``key`` is made of the types of ``args`` and the device.
        """
        args = (*args, *cut.numbers, *flags)
        if INTERPRETED:
            self.jit[cut.grid](*args, *cut.tile)
            return
        compiled = self.compiled.get((key, flags, cut.tile))
        if compiled is None:
            for tile in cut.tiles:
                form = self.jit.warmup(*args, *tile, grid=cut.grid)
                self.compiled[key, flags, tile] = form
            compiled = self.compiled[key, flags, cut.tile]
        compiled[cut.grid](*args, *cut.tile)


def dense(x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return ``x`` in a layout, at an address that 128-bit loads take."""
    if not x.is_contiguous(memory_format=layout):
        x = x.contiguous(memory_format=layout)
    return x.clone() if x.data_ptr() % 16 else x
