"""The clocks of the benchmarks."""

import time
from collections.abc import Callable
from typing import Any

import torch

BUFFER = 2**26  # numbers, 256 MB: no GPU's cache holds them
WRITES = 8  # of the buffer: half a millisecond on an H200, more than the host takes for a norm


def clock(device: str) -> Callable[[], float]:
    """Return a clock in seconds.

    With one thread on the CPU it is the processor's time, which other work on the machine disturbs
    less than the wall's.

    Args:
        device: "cuda", after which it waits for the GPU, or "cpu".
    """
    if device == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


class Timer:
    """Times single calls, each with a cold cache.

    On CUDA the GPU's own events are the clock. Before each call a buffer larger than its cache is
    written several times: what the call reads comes from memory, and the host, which queues the
    call meanwhile, is ahead of the GPU, so that small kernels are not timed as waiting for it.

    Example:
        >>> Timer("cpu")(lambda: torch.ones(8)) > 0  # doctest: +SKIP
        True
    """

    def __init__(self, device: str) -> None:
        self._cuda, self._now = device == "cuda", clock(device)
        self._buffer = torch.empty(BUFFER if self._cuda else 1, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        """Return the seconds of one call."""
        for _ in range(WRITES):
            self._buffer.zero_()
        start = self._mark()
        function()
        return self._between(start, self._mark())

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000
