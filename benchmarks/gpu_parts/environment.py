"""What the report was made on, and whether the kernels run there at all."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from gn_practical.layers import backends, fused_group_norm, weight_standardization
from gpu_parts.record import Record
from gpu_parts.settings import Settings

PACKAGES = ("gn_practical", "torch", "torchvision", "triton", "detectron2", "sal-detectron2",
            "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")  # fmt: skip
QUERY = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "persistence_mode",
         "mig.mode.current", "utilization.gpu", "memory.used")  # fmt: skip


def run(settings: Settings, record: Record) -> None:
    """Write down versions and device, and try the kernels."""
    found = torch.cuda.is_available() and not settings.dry
    record.data(device=torch.cuda.get_device_name(0) if found else None)
    record.table("Versions", ["package", "version"], list(versions().items()))
    record.table("Device", ["what", "value"], list(device(found).items()))
    if not (found or settings.dry):
        return
    record.note(f"The operator runs {backends.backend(settings.device)}.")
    if settings.dry:
        fused_group_norm.CHECKED = fused_group_norm.CHECKED[:1]  # the interpreter is slow
    start = time.perf_counter()
    agree = kernels_agree(torch.device(settings.device))
    record.value("kernels run", int(all(agree.values())))
    record.note(
        f"Kernels that agree with PyTorch's on small inputs: {agree}. The look took "
        f"{time.perf_counter() - start:.1f} s, with what had to be compiled."
    )
    if not all(agree.values()):
        record.note("Where the kernels do not run, all figures of ours are PyTorch's operators'.")


def kernels_agree(place: torch.device) -> dict[str, bool]:
    """Whether each operator's kernels run on a device, as the first use of it finds out."""
    return {
        "group norm": fused_group_norm._kernels_agree(place),
        "weight standardization": weight_standardization._kernels_agree(place),
    }


def versions() -> dict[str, str]:
    """Return the versions of what is installed."""
    known = {"python": platform.python_version(), "system": f"{platform.system()}, "
             f"{platform.machine()}", "CUDA of torch": str(torch.version.cuda),
             "cuDNN": str(torch.backends.cudnn.version())}  # fmt: skip
    for package in PACKAGES:
        try:
            known[package] = version(package)
        except PackageNotFoundError:
            continue
    return known


def device(found: bool) -> dict[str, str]:
    """Return what is known of device, driver and processor."""
    known = {"processor": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if not found:
        return {"GPU": "none", **known}
    properties = torch.cuda.get_device_properties(0)
    known |= {
        "GPU": properties.name,
        "number": str(torch.cuda.device_count()),
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "free at the start": f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB",
        "TF32 in convolutions": str(torch.backends.cudnn.allow_tf32),
    }
    return known | driver()


def driver() -> dict[str, str]:
    """Return what the driver's own tool says, if it is there."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return {"driver": "not known: no nvidia-smi"}
    known = {}
    for name in QUERY:  # one by one: an old tool does not know them all
        command = [tool, f"--query-gpu={name}", "--format=csv,noheader", "--id=0"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            break
        if answer.returncode == 0:
            known[name.replace("_", " ")] = answer.stdout.strip()
    return known
