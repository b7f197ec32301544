"""Triton kernels that are launched at little cost to the host."""

import inspect
from collections.abc import Callable
from typing import Any

import triton

from gn_practical.layers.backends import INTERPRETED

Constants = tuple[bool | int, ...]


class Kernel:
    """A kernel whose compiled forms are kept by what they depend on.

    Triton's own launch looks at each argument to find the compiled form, at several times the cost.
    What it would see must follow from the key: the types of the arguments, and that the addresses
    of tensors are multiples of 16 bytes. Numbers are not specialized.

    Args:
        function: takes pointers, whose names end with ``_ptr``, numbers, and annotated constants.
    """

    def __init__(self, function: Callable) -> None:
        plain = [p for p in inspect.signature(function).parameters.values() if p.annotation is p.empty]
        numbers = [p.name for p in plain if not p.name.endswith("_ptr")]
        self.jit = triton.jit(do_not_specialize=numbers)(function)
        self._compiled: dict[tuple, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        args: tuple,
        key: tuple,
        flags: Constants = (),
        tile: Constants = (),
        tiles: tuple[Constants, ...] = (),
    ) -> None:
        """Launch.

        Args:
            grid: programs.
            args: pointers and numbers.
            key: the types of ``args``, and the device.
            flags: the first constants.
            tile: the last constants.
            tiles: all that ``tile`` can be; the first launch compiles for each.
        """
        constants = (*flags, *tile)
        if INTERPRETED:
            self.jit[grid](*args, *constants)
            return
        compiled = self._compiled.get((key, constants))
        if compiled is None:
            for each in tiles or (tile,):
                form = self.jit.warmup(*args, *flags, *each, grid=grid)
                self._compiled[key, (*flags, *each)] = form
            compiled = self._compiled[key, constants]
        compiled[grid](*args, *constants)
