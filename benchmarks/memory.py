"""Count the bytes that a forward pass leaves for the backward pass, and the peak of a step.

    python benchmarks/memory.py                          # pfpn_pgn_all at 256 × 320, on the CPU
    python benchmarks/memory.py --size 800 1333 --images 2

The count is of live tensors, so it is exact and needs no GPU. PyTorch's GroupNorm runs under
autocast in float32 on CUDA and in bfloat16 on the CPU; "PyTorch as on CUDA" casts as CUDA does.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from live_bytes import counter
from tabulate import tabulate
from torch import Tensor, nn
from train_step import CONFIGS, batch, config

from gn_practical import PracticalGroupNorm, bind_group_norms, build_model
from gn_practical.layers.recomputation import recompute_outputs
from gn_practical.modeling.fusion import fuse_norms
from gn_practical.training.evaluation.results import write_results

RUNS = (  # name, norm, fused, memory mode, cast as CUDA does
    ("PyTorch GN(32)", "GN", False, False, False),
    ("PyTorch GN(32) as on CUDA", "GN", False, False, True),
    ("PGN", "PGN", True, False, False),
    ("PGN, memory mode", "PGN", True, True, False),
)


@contextmanager
def group_norm_as_on_cuda() -> Iterator[None]:
    """Run ``F.group_norm`` as CUDA's autocast does: in float32, with an output in float32."""
    group_norm = F.group_norm

    def in_float32(x: Tensor, *args: object) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return group_norm(x.float(), *args)

    with mock.patch("torch.nn.functional.group_norm", in_float32):
        yield


def chain(norm: str, fused: bool, recompute: bool) -> nn.Sequential:
    """Make 20 times convolution, norm, ReLU."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 1)]
    for _ in range(20):
        layer = PracticalGroupNorm(64) if norm == "PGN" else nn.GroupNorm(32, 64)
        layers += [layer, nn.ReLU(inplace=True), nn.Conv2d(64, 64, 1)]
    model = nn.Sequential(*layers)
    bind_group_norms(model)
    if fused:
        fuse_norms(model)
    if recompute:
        recompute_outputs(model)
    return model


def count(model: nn.Module, loss: Callable[[], Tensor], amp: bool, as_on_cuda: bool) -> list[int]:
    """Return the bytes after the forward pass and the peak of a step with it."""
    torch.manual_seed(0)
    device = next(model.parameters()).device.type
    with EventStorage(), counter(model) as live:
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            if as_on_cuda:
                with group_norm_as_on_cuda():
                    result = loss()
            else:
                result = loss()
        stored = live.now()
        result.backward()
    return [stored, live.peak]


def measure(
    name: str,
    size: tuple[int, int],
    images: int,
    amp: bool,
    device: str = "cpu",
    overrides: Sequence = (),
) -> list[dict]:
    """Count for each run; on CUDA by its allocator, after a step that makes what stays."""
    results = []
    for run, norm, fused, recompute, as_on_cuda in RUNS:
        if as_on_cuda and (not amp or device == "cuda"):
            continue
        torch.manual_seed(0)
        if name == "chain":
            model = chain(norm, fused, recompute).to(device)
            x = torch.randn(images, 3, *size, device=device)
            loss = lambda model=model, x=x: model(x).float().mean()  # noqa: E731
        else:
            variant = {"NORM": norm, "FUSED": fused, "RECOMPUTE": recompute}
            model = build_model(config(name, variant, device, overrides)).train()
            data = batch(*size, images)
            loss = lambda model=model, data=data: sum(model(data).values())  # noqa: E731
        for _ in range(2 if device == "cuda" else 1):
            stored, peak = count(model, loss, amp, as_on_cuda)
            model.zero_grad(set_to_none=True)
        results.append({"model": name, "amp": amp, "run": run, "stored": stored, "peak": peak})
    return results


def rows(results: list[dict]) -> list[list]:
    """Format bytes, and their ratio to what PyTorch stores; under autocast, as on CUDA."""
    reference = next((r for r in results if r["run"].endswith("as on CUDA")), results[0])
    return [
        [
            r["model"], "bfloat16" if r["amp"] else "float32", r["run"], r["stored"] / 2**20,
            r["stored"] / reference["stored"], r["peak"] / 2**20, r["peak"] / reference["peak"],
        ]
        for r in results
    ]  # fmt: skip


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="height and width")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=["chain", *CONFIGS],
                        default=["chain", *CONFIGS])  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    print(f"Live tensors on the CPU, {args.images} image(s) of {tuple(args.size)}, torch "
          f"{torch.__version__}. Not run: the allocator of a GPU.")  # fmt: skip
    headers = ("model", "precision", "run", "stored MiB", "ratio", "peak MiB", "ratio")
    results = []
    for name in args.models:
        for amp in (False, True):
            counted = measure(name, tuple(args.size), args.images, amp)
            print(tabulate(rows(counted), headers=headers, floatfmt=".3f"), flush=True)
            results += counted
    path = args.output / "memory.json"
    write_results(results, str(path))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
