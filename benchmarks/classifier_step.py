#!/usr/bin/env python
"""Training step of ResNet-56 for CIFAR with PGN against the same network with PyTorch's GN."""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from clock import clock
from torch import nn

from gn_practical import PracticalGroupNorm, build_model
from gn_practical.training.engine import load_cfg

PROJECT = Path(__file__).parents[1] / "projects/classification"
CONFIG = str(PROJECT / "configs/resnet56_cifar10.yaml")
sys.path.append(str(PROJECT))  # where projects are, Python does not look

from gn_classification import Batch, add_classification_config  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of each, in turn (default: 40)")
    parser.add_argument("--batch", type=int, default=32, help="images (default: 32)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    return parser.parse_args()


def make_model(device: str, plain: bool) -> nn.Module:
    """Build the network; plain: with PyTorch's operator, and nothing fused."""
    torch.manual_seed(0)
    model = build_model(
        load_cfg(
            CONFIG,
            ["MODEL.DEVICE", device, "MODEL.PGN.FUSED", str(not plain)],
            add_config=add_classification_config,
        )
    )
    for module in model.modules():
        if plain and type(module) is PracticalGroupNorm:
            module.__class__ = nn.GroupNorm
    return model.train()


def run_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, now: Callable[[], float]
) -> float:
    """Run one step; return its seconds."""
    start = now()
    loss = sum(model(batch).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return now() - start


def main() -> None:
    """Time both in turn and print the ratio of the medians."""
    args = parse_args()
    images = torch.randint(256, (args.batch, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (args.batch,))
    batch = Batch(images.to(args.device), labels.to(args.device), torch.arange(args.batch))
    models = {name: make_model(args.device, name != "PGN") for name in ("PGN", "PyTorch's GN")}
    optimizers = {name: torch.optim.SGD(m.parameters(), 1e-3, 0.9) for name, m in models.items()}
    now = clock(args.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(args.steps + 2):  # the first two warm up
        for name in sorted(models, reverse=bool(step % 2)):
            taken = run_step(models[name], optimizers[name], batch, now)
            if step > 1:
                seconds[name].append(taken)
    for name, values in seconds.items():
        low, _, high = statistics.quantiles(values, n=4)
        middle = statistics.median(values)
        print(f"{name}: {1e3 * middle:.1f} ms (quartiles {1e3 * low:.1f} and {1e3 * high:.1f})")
    ours, theirs = seconds.values()
    print(f"ratio of medians: {statistics.median(ours) / statistics.median(theirs):.3f}")


if __name__ == "__main__":
    main()
