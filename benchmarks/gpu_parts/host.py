"""Launches of a norm and what it costs the host, on a device that takes them."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import host_time
import torch
from torch.profiler import ProfilerActivity, profile

from gn_practical.layers.kernel import Kernel
from gpu_parts.record import Record
from gpu_parts.settings import Settings

CALLS = 40  # of a case between two waits, so that the queue of launches is never full
SIZES = {"small": ((2, 64, 8, 8), 16), "large": ((1, 64, 17, 17), 1)}
DRY_SIZES = {"small": ((1, 8, 4, 4), 2), "large": ((1, 2, 91, 91), 1)}
HEADERS = ["norm", "forward µs", "and backward µs", "on the device", "and backward"]


def run(settings: Settings, record: Record) -> None:
    """Count launches, then time the host, for small groups and large ones."""
    for size, (shape, groups) in settings.choose(DRY_SIZES, SIZES).items():
        norms = host_time.norms(shape, groups, settings.device)
        if settings.dry:
            norms = {name: norms[name] for name in ("fused", "F.group_norm + relu_")}
        forward, both = (launches(case) for case in norms["fused"])
        record.value(f"launches {size} forward", forward)
        record.value(f"launches {size} backward", both - forward)
        times = time_all(norms, settings)
        rows = [
            [name, times[name, 0], times[name, 1], *(on_device(c, settings.device) for c in pair)]
            for name, pair in norms.items()
        ]
        record.table(f"{size} groups, {'×'.join(map(str, shape))}", HEADERS, rows)
        if size == "small":
            record.value("host", times["fused", 1] / times["F.group_norm + relu_", 1])


def time_all(norms: dict, settings: Settings) -> dict[tuple[str, int], float]:
    """Return the median times of the host, by norm and by way, in µs."""
    wait = partial(wait_for, settings.device)
    cases = {(name, i): case for name, pair in norms.items() for i, case in enumerate(pair)}
    rounds, calls = settings.choose(1, 15, 50), settings.choose(1, CALLS)
    found = host_time.microseconds(cases, rounds, calls, wait, time.perf_counter)
    return {name: statistics.median(values) for name, values in found.items()}


def launches(case: Callable[[], object]) -> int:
    """Return the launches of our kernels in a call that is not the first."""
    case()
    with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as ours:
        case()
    return ours.call_count


def on_device(case: Callable[[], object], device: str) -> int | None:
    """Return how many kernels, copies and fills the device ran in a call; None if none is known.

    On the CPU these are PyTorch's operators.
    """
    name = device.upper()
    wait_for(device)
    with profile(activities=[getattr(ProfilerActivity, name)]) as profiler:
        case()
        wait_for(device)
    kind = getattr(torch.autograd.DeviceType, name)
    return sum(event.device_type == kind for event in profiler.events()) or None


def wait_for(device: str) -> None:
    """Let the device finish."""
    if device == "cuda":
        torch.cuda.synchronize()
