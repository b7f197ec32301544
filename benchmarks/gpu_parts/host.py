"""Launches of a norm and what it costs the host, on a device that takes them."""

import statistics
from collections.abc import Callable
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
HEADERS = ["norm", "forward µs", "and backward µs", "on the GPU", "and backward"]


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
            [name, times[name, 0], times[name, 1], *map(on_device, pair)]
            for name, pair in norms.items()
        ]
        record.table(f"{size} groups, {'×'.join(map(str, shape))}", HEADERS, rows)
        if size == "small":
            record.value("host", times["fused", 1] / times["F.group_norm + relu_", 1])


def time_all(norms: dict, settings: Settings) -> dict[tuple[str, int], float]:
    """Return the median times of the host, by norm and by way, in µs."""
    wait = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    cases = {(name, i): case for name, pair in norms.items() for i, case in enumerate(pair)}
    rounds, calls = settings.choose(1, 15, 50), settings.choose(1, CALLS)
    found = host_time.microseconds(cases, rounds, calls, wait)
    return {name: statistics.median(values) for name, values in found.items()}


def launches(case: Callable[[], object]) -> int:
    """Return the launches of our kernels in a call that is not the first."""
    case()
    with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as ours:
        case()
    return ours.call_count


def on_device(case: Callable[[], object]) -> int | None:
    """Return how many kernels, copies and fills the GPU ran in a call; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        case()
        torch.cuda.synchronize()
    return sum(e.device_type is torch.autograd.DeviceType.CUDA for e in profiler.events())
