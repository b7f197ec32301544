"""Cost against the number of images, their size, and the depth of the network.

    python benchmarks/scaling.py                     # PFPN's sizes on CUDA, small ones on the CPU

Per element and block, a cost that follows the memory traffic is a flat line. Norm and ReLU run
forward and backward; depth is that of torchvision's ResNets, whole training steps. PyTorch's GN
and ours take turns in one process; the picture shows medians.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
import torchvision
from clock import clock
from tabulate import tabulate
from torch import nn

from gn_practical import PracticalGroupNorm, bind_group_norms
from gn_practical.layers.backends import backend
from gn_practical.layers.fused_group_norm import fused_group_norm
from gn_practical.modeling.fusion import fuse_norms
from gn_practical.training.evaluation.results import write_results

mpl.use("Agg")
import matplotlib.pyplot as plt

DEPTHS = (18, 34, 50, 101)


def turns(functions: dict[str, Callable[[], object]], device: str, repeats: int) -> dict:
    """Return the quartiles of each, run in turns after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    now = clock(device)
    for turn in range(repeats + 2):
        for name, function in functions.items():
            start = now()
            function()
            if turn > 1:
                times[name].append(now() - start)
    return {n: statistics.quantiles(t, n=4, method="inclusive") for n, t in times.items()}


def operator(shape: tuple[int, ...], device: str, repeats: int) -> dict:
    """Time norm and ReLU, forward and backward, with G = 1 and 32."""
    x = torch.randn(shape, device=device, requires_grad=True)
    upstream = torch.randn(shape, device=device)
    weight, bias = (torch.ones(shape[1], device=device, requires_grad=True) for _ in range(2))

    def pytorch(groups: int) -> None:
        F.relu(F.group_norm(x, groups, weight, bias)).backward(upstream)

    def ours(groups: int) -> None:
        fused_group_norm(x, groups, weight, bias, relu=True).backward(upstream)

    functions = {
        f"{name}, G = {groups}": lambda f=f, groups=groups: f(groups)
        for name, f in (("PyTorch", pytorch), ("ours", ours))
        for groups in (1, 32)
    }
    return turns(functions, device, repeats)


def network(depth: int, size: int, device: str, repeats: int) -> dict:
    """Time a training step of a ResNet with PyTorch's GN(32) and with PGN."""
    build = getattr(torchvision.models, f"resnet{depth}")
    models = {"PyTorch, G = 32": build(norm_layer=lambda channels: nn.GroupNorm(32, channels))}
    models["ours, practical G"] = build(norm_layer=PracticalGroupNorm)
    bind_group_norms(models["ours, practical G"])
    fuse_norms(models["ours, practical G"])
    x = torch.randn(2, 3, size, size, device=device)
    models = {name: model.to(device) for name, model in models.items()}
    functions = {name: lambda m=m: m(x).sum().backward() for name, m in models.items()}
    return turns(functions, device, repeats)


def measure(device: str, repeats: int) -> list[dict]:
    """Measure all three; ``work`` is what the time is divided by."""
    large = device == "cuda"
    side, channels = (160, 256) if large else (32, 64)
    results = []
    for images in (1, 2, 4, 8):
        shape = (images, channels, side, side)
        times = operator(shape, device, repeats)
        results.append({"against": "images", "value": images, "work": images, "times": times})
    for factor in (0.25, 0.5, 1, 2):
        pixels = round(side * factor)
        times = operator((2, channels, pixels, pixels), device, repeats)
        results.append(
            {"against": "pixels a side", "value": pixels, "work": pixels**2, "times": times}
        )
    for depth in DEPTHS:
        times = network(depth, 800 if large else 64, device, max(3, repeats // 3))
        results.append({"against": "layers", "value": depth, "work": depth, "times": times})
    return results


def draw(results: list[dict], path: Path) -> None:
    """Draw time over work against each."""
    kinds = list(dict.fromkeys(r["against"] for r in results))
    figure, axes = plt.subplots(1, len(kinds), figsize=(11, 3.2), layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        points = [r for r in results if r["against"] == kind]
        for name in points[0]["times"]:
            times = [r["times"][name][1] / r["work"] for r in points]
            axis.plot([r["value"] for r in points], times, "o-", label=name)
        axis.set(xlabel=kind, ylabel=f"seconds / {kind if kind != 'pixels a side' else 'pixel'}",
                 xscale="log", ylim=(0, None))  # fmt: skip
        axis.set_xticks([r["value"] for r in points], [r["value"] for r in points])
        axis.minorticks_off()
        axis.legend(fontsize="small")
    figure.savefig(path)


def rows(results: list[dict]) -> list[list]:
    """Format medians in ms with the spread, and ours over PyTorch's."""
    table = []
    for r in results:
        pairs = list(r["times"].items())
        half = len(pairs) // 2  # PyTorch's first, then ours in the same order
        for (name, theirs), (other, ours) in zip(pairs[:half], pairs[half:], strict=True):
            spread = (ours[2] - ours[0]) * 1e3
            table.append([r["against"], r["value"], f"{other} / {name}", theirs[1] * 1e3,
                          ours[1] * 1e3, spread, ours[1] / theirs[1]])  # fmt: skip
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; the operator "
          f"runs {backend(device)}.")  # fmt: skip
    if device == "cpu":
        print("Not run: CUDA, PFPN's own sizes.")
    results = measure(device, args.repeats)
    headers = ("against", "value", "which", "PyTorch ms", "ours ms", "spread ms", "ratio")
    print(tabulate(rows(results), headers=headers, floatfmt=".2f"))
    write_results(results, str(args.output / "scaling.json"))
    draw(results, args.output / "scaling.png")
    print(f"Wrote {args.output / 'scaling.json'} and {args.output / 'scaling.png'}.")


if __name__ == "__main__":
    main()
