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
    of tensors are multiples of 16 bytes. Numbers are not specialized. Nor are Triton's hooks around
    a launch called, which its profiler sets; those of CUDA see these launches as any other.

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
        self.loaded: dict[tuple, tuple] = {}  # what launches a form: a function and what it takes

    def __call__(
        self, cut: Cut, args: tuple, key: tuple, stream: int, flags: Constants = ()
    ) -> None:
        """Launch with ``args``, the numbers of ``cut``, ``flags``, and the constants of ``cut``.

        ``key`` is made of the types of ``args`` and the device, ``stream`` is its current one.
        """
        if INTERPRETED:
            self.jit[cut.grid](*args, *cut.numbers, *flags, *cut.tile)
            return
        loaded = self.loaded.get((key, flags, cut.tile))
        if loaded is None:
            loaded = self._load(cut, (*args, *cut.numbers, *flags), key, flags)
        run, function, metadata = loaded
        hooks = (None, None, None)
        run(*cut.grid, stream, function, metadata, *hooks, *args, *cut.numbers, *flags, *cut.tile)

    def _load(self, cut: Cut, args: tuple, key: tuple, flags: Constants) -> tuple:
        """Load the form of a tile onto the device, compiled with those of all tiles of ``cut``."""
        wanted = (key, flags, cut.tile)
        if wanted not in self.compiled:
            for tile in cut.tiles:
                self.compiled[key, flags, tile] = self.jit.warmup(*args, *tile, grid=cut.grid)
        form = self.compiled[wanted]
        self.loaded[wanted] = form.run, form.function, form.packed_metadata  # ``run`` loads it
        return self.loaded[wanted]


def current_stream(device: int) -> int:
    """Return the stream of a device on which PyTorch computes now; 0 in the interpreter."""
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_stream(device)


def dense(x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return ``x`` in a layout, at an address that 128-bit loads take."""
    if not x.is_contiguous(memory_format=layout):
        x = x.contiguous(memory_format=layout)
    return x.clone() if x.data_ptr() % 16 else x
