"""What Triton compiles, and when."""

import os
import time

import torch
from group_norm import compilations

from gn_practical.layers import group_norm_kernels
from gn_practical.layers.kernel import Kernel
from gpu_parts.record import Record
from gpu_parts.settings import Settings

HEADERS = ["dtype", "layout", "compiled in all", "after warm-up", "seconds"]


def run(settings: Settings, record: Record) -> None:
    """Count over six image sizes, with nothing of Triton's on the disk at the beginning."""
    os.environ["TRITON_CACHE_DIR"] = str(settings.scratch / "triton")
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: settings.choose(1, 2, 3)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            before, start = compiled(), time.perf_counter()
            sizes = settings.choose((4, 40), (64, 1))
            after_warm_up = compilations(settings.device, *sizes, dtype, layout)
            seconds = time.perf_counter() - start
            rows.append([str(dtype), str(layout), compiled() - before, after_warm_up, seconds])
            record.table("Seven image sizes with residual and ReLU", HEADERS, rows)
    record.value("compilations", max(row[3] for row in rows))


def compiled() -> int:
    """Count the compiled kernels of the operator."""
    kernels = [k for k in vars(group_norm_kernels).values() if isinstance(k, Kernel)]
    return sum(len(kernel.compiled) for kernel in kernels)
