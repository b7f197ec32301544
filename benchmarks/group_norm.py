"""Time the fused operator against PyTorch's and others, and a copy of the same bytes.

    python benchmarks/group_norm.py                  # PFPN's shapes on CUDA, small ones on the CPU
    python benchmarks/group_norm.py --large          # PFPN's shapes on the CPU too
    python benchmarks/group_norm.py --compile        # torch.compile of the pair on the CPU too

All variants of a case run in turns in one process; ratios are of the medians, with the spread
from the 25th to the 75th percentile. In half precision PyTorch runs as its autocast runs it: in
float32 on CUDA, in bfloat16 with float32 parameters on the CPU. Writes a JSON file and a picture
beside the table.
"""

import argparse
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from clock import Timer
from detectron2.layers import FrozenBatchNorm2d
from tabulate import tabulate
from torch import Tensor

from gn_practical.layers.backends import backend
from gn_practical.layers.fused_group_norm import fused_group_norm
from gn_practical.training.evaluation.results import write_results

mpl.use("Agg")
import matplotlib.pyplot as plt

# Channels, height and width of PFPN R-50's norms at 800 × 1333.
LARGE = [(64, 400, 672), (256, 200, 336), (512, 100, 168), (1024, 50, 84), (256, 25, 42)]
SMALL = [(64, 100, 168), (256, 50, 84)]
Variant = Callable[[Tensor, Tensor, Tensor], Tensor]


def variants(channels: int, groups: int, device: str, compiler: str) -> dict[str, Variant]:
    """The normalizations to compare, each a function of x, weight and bias."""
    frozen = FrozenBatchNorm2d(channels).to(device)

    def composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        half = x.dtype is not torch.float32
        with torch.autocast(device, x.dtype if half else None, enabled=half):
            return F.relu(F.group_norm(x, groups, weight, bias))

    found: dict[str, Variant] = {
        "pytorch": composed,
        "fused": lambda x, w, b: fused_group_norm(x, groups, w, b, relu=True),
        "frozen_bn": lambda x, w, b: F.relu_(frozen(x)),
    }
    if compiler:
        torch.compiler.reset()  # after some shapes it would leave the function as it is
        found["compiled"] = torch.compile(composed, backend=compiler)
    return found


def measure(case: dict, device: str, repeats: int, compiler: str = "") -> dict:
    """Time all variants of a case in turns.

    Args:
        case: one of :func:`cases`.
        device: "cuda" or "cpu".
        repeats: turns that are timed, after two of warm-up.
        compiler: backend of ``torch.compile``, or nothing to leave it out.
    """
    seconds = Timer(device)
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
    functions = variants(channels, case["groups"], device, compiler)
    for turn in range(repeats + 2):
        for name, function in functions.items():
            if name == "frozen_bn" and dtype is not torch.float32:
                continue  # it would compute in float32

            def step(function: Variant = function) -> None:
                leaf.grad = weight.grad = bias.grad = None  # else they would be added up
                y = function(leaf, weight, bias)
                y.backward(upstream if y.dtype is upstream.dtype else upstream.to(y.dtype))

            with torch.no_grad():
                function(x, weight, bias)  # what ran before left the cache to neither
                forward = seconds(lambda f=function: f(x, weight, bias))
            step()
            both = seconds(step)
            if turn > 1:  # after the warm-up
                times.setdefault(f"{name} forward", []).append(forward)
                times.setdefault(f"{name} both", []).append(both)
        if turn > 1:
            times.setdefault("copy", []).append(seconds(x.clone))
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


def median(result: dict, name: str) -> float:
    """Return the median time of a variant in seconds; not a number where it did not run."""
    return result["times"].get(name, [math.nan] * 3)[1]


def row(result: dict) -> list:
    """Format a result: medians in ms, with the spread of ours, and ratios."""
    shape = "×".join(map(str, result["shape"]))
    layout = "NHWC" if result["channels_last"] else "NCHW"
    low, ours, high = result["times"]["fused both"]
    others = [median(result, f"{name} both") for name in ("pytorch", "frozen_bn", "compiled")]
    return [
        shape, result["groups"], layout, result["dtype"],
        median(result, "copy") * 1e3, others[0] * 1e3, ours * 1e3, (high - low) * 1e3,
        median(result, "fused forward") / median(result, "pytorch forward"),
        ours / others[0], ours / median(result, "copy"), ours / others[1], ours / others[2],
    ]  # fmt: skip


def summary(results: list[dict]) -> list[list]:
    """List the largest and smallest of the ratios that docs/performance.md names."""

    def key(result: dict) -> tuple:
        return (*result["shape"], result["channels_last"], result["dtype"])

    def bytes_of(result: dict) -> int:
        return math.prod(result["shape"]) * (4 if result["dtype"] == "float32" else 2)

    g32 = {key(r): r for r in results if r["groups"] == 32}
    pairs = [(r, g32[key(r)]) for r in results if r["groups"] == 1 and key(r) in g32]
    ratios = {
        "ours / PyTorch, forward": [
            median(r, "fused forward") / median(r, "pytorch forward") for r in results
        ],
        "ours / PyTorch, forward + backward": [
            median(r, "fused both") / median(r, "pytorch both") for r in results
        ],
        "ours / PyTorch, forward, G = 1": [
            median(r, "fused forward") / median(r, "pytorch forward") for r, _ in pairs
        ],
        "PyTorch's forward, G = 1 / G = 32": [
            median(a, "pytorch forward") / median(b, "pytorch forward") for a, b in pairs
        ],
        "ours, forward + backward, G = 1 / G = 32": [
            median(a, "fused both") / median(b, "fused both") for a, b in pairs
        ],
        "ours / copy, forward + backward, 64 MB and more": [
            median(r, "fused both") / median(r, "copy") for r in results if bytes_of(r) >= 64e6
        ],
        "PyTorch's autocast / ours, forward + backward, G = 32": [
            median(r, "pytorch both") / median(r, "fused both")
            for _, r in pairs if r["dtype"] != "float32"
        ],
    }  # fmt: skip
    return [
        [name, *((min(v), statistics.median(v), max(v)) if v else ["not run"] * 3)]
        for name, v in ratios.items()
    ]


def compilations(
    device: str = "cuda",
    channels: int = 64,
    scale: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> int:
    """Count what Triton compiles for six image sizes, over ``scale``, after a first one."""
    from gn_practical.layers import group_norm_kernels
    from gn_practical.layers.kernel import Kernel

    kernels = [k for k in vars(group_norm_kernels).values() if isinstance(k, Kernel)]
    counts = []
    for size in [(200, 336), (160, 168), (25, 42), (7, 7), (13, 21), (199, 301), (96, 128)]:
        pixels = [-(-side // scale) for side in size]
        x = torch.randn(2, channels, *pixels, device=device).to(dtype, memory_format=layout)
        x.requires_grad_()
        weight = torch.ones(channels, device=device, requires_grad=True)
        groups = channels // 4
        fused_group_norm(x, groups, weight, weight, residual=x, relu=True).sum().backward()
        counts.append(sum(len(kernel.compiled) for kernel in kernels))
    return counts[-1] - counts[0]


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
    parser.add_argument("--compile", action="store_true", help="torch.compile on the CPU too")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(f"{device}: {machine or platform.machine()}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; the operator runs {backend(device)}.")  # fmt: skip
    compiler = "inductor" if args.compile or device == "cuda" else ""
    if device == "cpu":
        left_out = {"torch.compile": compiler, "PFPN's own shapes": args.large}
        print("Not run:", ", ".join(["CUDA", *(k for k, v in left_out.items() if not v)]) + ".")
    results = [measure(case, device, args.repeats, compiler) for case in cases(device, args.large)]
    headers = ("shape", "G", "layout", "dtype", "copy ms", "PyTorch ms", "fused ms", "spread ms",
               "fwd/PyTorch", "both/PyTorch", "both/copy", "both/FrozenBN",
               "both/compiled")  # fmt: skip
    print(tabulate(map(row, results), headers=headers, floatfmt=".2f"))
    print(tabulate(summary(results), headers=("ratio", "least", "median", "most"), floatfmt=".2f"))
    if device == "cuda":
        print(f"Kernels compiled after warm-up, over six image sizes: {compilations()}.")
    write_results(results, str(args.output / "group_norm.json"))
    draw(results, args.output / "group_norm.png")
    print(f"Wrote {args.output / 'group_norm.json'} and {args.output / 'group_norm.png'}.")


if __name__ == "__main__":
    main()
