"""Time the fused operator against PyTorch's and others, and a copy of the same bytes.

    python benchmarks/group_norm.py                  # PFPN's shapes on CUDA, small ones on the CPU
    python benchmarks/group_norm.py --large          # PFPN's shapes on the CPU too

All variants of a case run in turns in one process; ratios are of the medians, with the spread
from the 25th to the 75th percentile. Writes a JSON file and a picture beside the table.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from tabulate import tabulate
from torch import Tensor

from gn_practical.layers.fused_group_norm import backend, fused_group_norm

mpl.use("Agg")
import matplotlib.pyplot as plt

# Channels, height and width of PFPN R-50's norms at 800 × 1333.
LARGE = [(64, 400, 672), (256, 200, 336), (512, 100, 168), (1024, 50, 84), (256, 25, 42)]
SMALL = [(64, 100, 168), (256, 50, 84)]
Variant = Callable[[Tensor, Tensor, Tensor], Tensor]


def variants(channels: int, groups: int, device: str) -> dict[str, Variant]:
    """The normalizations to compare, each a function of x, weight and bias."""
    frozen = FrozenBatchNorm2d(channels).to(device)

    def composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype)))

    found: dict[str, Variant] = {
        "pytorch": composed,
        "fused": lambda x, w, b: fused_group_norm(x, groups, w, b, relu=True),
        "frozen_bn": lambda x, w, b: F.relu_(frozen(x)),
    }
    if device == "cuda":
        found["compiled"] = torch.compile(composed)
    return found


def seconds(function: Callable[[], object], device: str) -> float:
    """Time one call."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def measure(case: dict, device: str, repeats: int) -> dict:
    """Time all variants of a case in turns."""
    layout = torch.channels_last if case["channels_last"] else torch.contiguous_format
    dtype = getattr(torch, case["dtype"])
    x, upstream = (
        torch.randn(case["shape"], device=device).to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    channels = case["shape"][1]
    weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
    leaf = x.detach().requires_grad_()
    times: dict[str, list[float]] = {}
    for turn in range(repeats + 2):
        for name, function in variants(channels, case["groups"], device).items():
            if name == "frozen_bn" and dtype is not torch.float32:
                continue  # it would compute in float32

            def step(function: Variant = function) -> None:
                function(leaf, weight, bias).backward(upstream)

            with torch.no_grad():
                forward = seconds(lambda f=function: f(x, weight, bias), device)
            both = seconds(step, device)
            leaf.grad = None
            if turn > 1:  # after the warm-up
                times.setdefault(f"{name} forward", []).append(forward)
                times.setdefault(f"{name} both", []).append(both)
        if turn > 1:
            times.setdefault("copy", []).append(seconds(x.clone, device))
    return {**case, "times": {name: quartiles(values) for name, values in times.items()}}


def quartiles(values: list[float]) -> list[float]:
    """Return the 25th, 50th and 75th percentile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def cases(device: str, large: bool) -> list[dict]:
    """List what is measured."""
    sizes = LARGE if large or device == "cuda" else SMALL
    batches = (1, 2, 4) if device == "cuda" else (2,)
    return [
        {"shape": [n, *size], "groups": g, "channels_last": last, "dtype": dtype}
        for size in sizes
        for n in batches
        for g in (1, 32, size[0])
        for last in (False, True)
        for dtype in ("float32", "bfloat16")
    ]


def row(result: dict) -> list:
    """Format a result: medians in ms and ratios."""
    t = {name: values[1] for name, values in result["times"].items()}
    shape = "×".join(map(str, result["shape"]))
    layout = "NHWC" if result["channels_last"] else "NCHW"
    frozen = t.get("frozen_bn both")
    return [
        shape, result["groups"], layout, result["dtype"],
        t["copy"] * 1e3, t["pytorch both"] * 1e3, t["fused both"] * 1e3,
        t["fused forward"] / t["pytorch forward"], t["fused both"] / t["pytorch both"],
        t["fused both"] / t["copy"], t["fused both"] / frozen if frozen else None,
    ]  # fmt: skip


def draw(results: list[dict], path: Path) -> None:
    """Draw forward and backward in copies of the tensor, PyTorch's and ours."""
    labels = [" ".join(map(str, row(r)[:4])) for r in results]
    figure, axes = plt.subplots(figsize=(8, 0.25 * len(results) + 1.5), layout="constrained")
    for name, marker in (("pytorch", "o"), ("fused", "s")):
        copies = [r["times"][f"{name} both"][1] / r["times"]["copy"][1] for r in results]
        axes.plot(copies, labels, marker, label=name)
    axes.axvline(4, color="gray", linestyle=":", label="limit of the bytes")
    axes.set(xscale="log", xlabel="forward + backward, in copies of the tensor")
    axes.legend()
    axes.invert_yaxis()
    figure.savefig(path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="PFPN's shapes on the CPU too")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"{device}: {machine or platform.machine()}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; the operator runs {backend(device)}.")  # fmt: skip
    if device == "cpu":
        print("Not run: CUDA, torch.compile" + ("." if args.large else ", PFPN's own shapes."))
    results = [measure(case, device, args.repeats) for case in cases(device, args.large)]
    headers = ("shape", "G", "layout", "dtype", "copy ms", "PyTorch ms", "fused ms",
               "fwd/PyTorch", "both/PyTorch", "both/copy", "both/FrozenBN")  # fmt: skip
    print(tabulate(map(row, results), headers=headers, floatfmt=".2f"))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "group_norm.json").write_text(json.dumps(results, indent=1))
    draw(results, args.output / "group_norm.png")
    print(f"Wrote {args.output / 'group_norm.json'} and {args.output / 'group_norm.png'}.")


if __name__ == "__main__":
    main()
