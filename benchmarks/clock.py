"""The clock of the benchmarks."""

import time
from collections.abc import Callable

import torch


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
