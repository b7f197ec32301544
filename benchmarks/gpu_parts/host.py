"""Launches of a norm and what it costs the host, on a device that takes them."""

import statistics
from collections.abc import Callable
from unittest import mock

import host_time
import torch
from gpu_parts.record import Record
from gpu_parts.settings import Settings
from torch.profiler import ProfilerActivity, profile

from gn_practical.layers.kernel import Kernel

CALLS = 40  # of a case between two waits, so that the queue of launches is never full
SIZES = {"small": ((2, 64, 8, 8), 16), "large": ((1, 64, 17, 17), 1)}
HEADERS = ["norm", "forward µs", "and backward µs", "launches of ours", "and backward",
           "all kernels", "and backward"]  # fmt: skip


def run(settings: Settings, record: Record) -> None:
    """Count launches, then time the host, for small groups and large ones."""
    wait = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    for size, (shape, groups) in SIZES.items():
        norms = host_time.norms(shape, groups, settings.device)
        counts = {name: [count(case) for case in pair] for name, pair in norms.items()}
        forward, both = counts["fused"]
        record.value(f"launches {size} forward", forward[0])
        record.value(f"launches {size} backward", both[0] - forward[0])
        cases = {(name, i): case for name, pair in norms.items() for i, case in enumerate(pair)}
        rounds, calls = settings.choose(1, 15, 50), settings.choose(1, CALLS)
        times = {
            name: statistics.median(found)
            for name, found in host_time.microseconds(cases, rounds, calls, wait).items()
        }
        rows = [
            [name, times[name, 0], times[name, 1], found[0][0], found[1][0], found[0][1],
             found[1][1]]
            for name, found in counts.items()
        ]  # fmt: skip
        record.table(f"{size} groups, {'×'.join(map(str, shape))}", HEADERS, rows)
        if size == "small":
            record.value("host", times["fused", 1] / times["F.group_norm + relu_", 1])


def count(case: Callable[[], object]) -> list[int | None]:
    """Return the launches of our kernels in a call, and all that the GPU ran; None without one."""
    case()  # the first one compiles
    with mock.patch.object(Kernel, "__call__", autospec=True, side_effect=Kernel.__call__) as ours:
        case()
    if not torch.cuda.is_available():
        return [ours.call_count, None]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        case()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type is torch.autograd.DeviceType.CUDA]
    return [ours.call_count, len(on_device)]
