"""Model the time of a training step on GPUs that are not at hand: bytes, flops, launches, host.

    python benchmarks/time_model.py

A model, not a measurement. Forward and backward pass of a detector run at full size on PyTorch's
meta device, which computes nothing, and every operator is noted. A kernel takes the longest of its
bytes at the GPU's bandwidth, its flops at its peak, and the shortest time that a kernel takes; the
host takes a time for each operator and each launch. In each part of a step, at whose end the host
waits or the parts turn around, the slower of the two decides. All that is assumed stands in
docs/performance.md, at the top of this file and of kernel_costs.py.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.utils.events import EventStorage
from host_time import NoDevice
from kernel_costs import GPUS, SHORTEST, Gpu, Trace, Work, bytes_of
from tabulate import tabulate
from torch import Tensor, nn
from train_step import FOLDER, batch, config

from gn_practical import PracticalGroupNorm, build_model
from gn_practical.layers import backends, fused_group_norm
from gn_practical.training.engine import load_cfg
from gn_practical.training.evaluation.results import write_results

# The host, in s: what it takes for the same part of a narrow model with images of 64 pixels, on one
# core of this machine without a GPU, and for each launch; 1 to 3 µs are published for CUDA 12.
LAUNCH = 2.5e-6
WAIT = 10e-6  # from the end of a kernel until the host that waited has launched another: assumed
STEP = 1.5e-3  # of the optimizer, the scheduler and the hooks: assumed
ZOO = {"pfpn_pgn_all": 304, "faster_rcnn_gn_ws_pgn": 210}  # ms
SIZE, IMAGES = (800, 1344), 2  # of a step of a GPU; Detectron2 pads 800 × 1333 to multiples of 32
NARROW = (64, 64)
NORMS = {
    "ours": {"NORM": "PGN"},
    "GN(32)": {"NORM": "GN"},
    "GN(1)": {"NORM": "GN", "groups": 1},
    "FrozenBN of the zoo": {"NORM": "FrozenBN"},
}
MODELS = ("pfpn_pgn_all", "faster_rcnn_gn_ws_pgn")
WAITS = ("_local_scalar_dense", "nonzero", "nms")
Watch = Callable[[str], AbstractContextManager]


def as_on_gpu() -> AbstractContextManager:
    """Let the fused operator take tensors of any device as it takes those of a GPU."""
    stack = ExitStack()
    for module in (fused_group_norm, backends):
        stack.enter_context(mock.patch.object(module, "INTERPRETED", True))
    return stack


def build(cfg: CfgNode, device: str, groups: int = 0) -> nn.Module:
    """Build a model for training; ``groups`` replaces the groups of PyTorch's norms."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    with torch.device(device):
        model = build_model(cfg).train()
    for module in model.modules():
        if groups and type(module) is nn.GroupNorm:
            module.num_groups = groups
    return model


def run_parts(model: nn.Module, cfg: CfgNode, size: tuple[int, int], watch: Watch) -> None:
    """Run what does not depend on values, convolutions, norms and their losses, part by part."""
    with as_on_gpu():
        images = torch.zeros(IMAGES, 3, *size, device=model.pixel_mean.device)
        with watch("backbone"):
            features = model.backbone(images)
        leaves = {name: f.detach().requires_grad_() for name, f in features.items()}
        with watch("heads"):
            loss = _losses(model, cfg, leaves, size)
        with watch("heads backward"):
            loss.backward()
        used = [name for name, leaf in leaves.items() if leaf.grad is not None]
        outputs, grads = ([each[name] for name in used] for each in (features, leaves))
        with watch("backbone backward"):
            torch.autograd.backward(outputs, [leaf.grad for leaf in grads])
    model.zero_grad()


def _losses(
    model: nn.Module, cfg: CfgNode, features: dict[str, Tensor], size: tuple[int, int]
) -> Tensor:
    heads, channels = model.roi_heads, cfg.MODEL.FPN.OUT_CHANNELS
    new = {"device": model.pixel_mean.device}
    inputs = [features[name] for name in cfg.MODEL.RPN.IN_FEATURES]
    objectness, deltas = model.proposal_generator.rpn_head(inputs)
    count = IMAGES * cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    regions = torch.zeros(count, channels, side, side, requires_grad=True, **new)
    outputs = [*objectness, *deltas, *heads.box_predictor(heads.box_head(regions))]
    if cfg.MODEL.MASK_ON:
        count, side = count // 4, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        regions = torch.zeros(count, channels, side, side, requires_grad=True, **new)
        outputs.append(heads.mask_head.layers(regions))
    loss = sum(output.sum() for output in outputs)
    if hasattr(model, "sem_seg_head"):
        targets = torch.zeros(IMAGES, *size, dtype=torch.int64, **new)
        loss = loss + sum(model.sem_seg_head(features, targets)[1].values())
    return loss


def trace(model: nn.Module, cfg: CfgNode, size: tuple[int, int], half: bool) -> dict:
    """Return the work of each part of a step."""
    works: dict[str, list[Work]] = {}

    @contextmanager
    def watch(part: str) -> Iterator[None]:
        with Trace(half) as noted:
            yield
        works[part] = noted.works

    run_parts(model, cfg, size, watch)
    return works


def host(model: nn.Module, cfg: CfgNode, repeats: int) -> dict[str, float]:
    """Return the least processor time of each part of a step of a narrow model on the CPU."""
    seconds: dict[str, float] = {}

    @contextmanager
    def watch(part: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        seconds[part] = min(time.thread_time() - start, seconds.get(part, math.inf))

    run_parts(model, cfg, NARROW, watch)  # compiles
    seconds.clear()
    for _ in range(repeats):
        run_parts(model, cfg, NARROW, watch)
    return seconds


class Rest(NamedTuple):
    """What of a step depends on values: proposals, matching, sampling, and those losses."""

    launches: int
    host: float
    waits: int


def rest(panoptic: bool, repeats: int) -> Rest:
    """Measure the rest of a step on a narrow model of the CPU: the whole less its other parts."""
    cfg = narrow(panoptic, "FrozenBN")
    parts = [w for works in trace(build(cfg, "meta"), cfg, NARROW, False).values() for w in works]
    model, data = build(cfg, "cpu"), batch(*NARROW, IMAGES)
    times = []
    with EventStorage():
        with Trace() as noted:
            sum(model(data).values()).backward()
        for _ in range(repeats):
            start = time.thread_time()
            sum(model(data).values()).backward()
            times.append(time.thread_time() - start)
    launches = sum(w.launches for w in noted.works) - sum(w.launches for w in parts)
    seconds = min(times) - sum(host(model, cfg, repeats).values())
    return Rest(launches, seconds, sum(w.name in WAITS for w in noted.works))


def narrow(panoptic: bool, norm: str, standardized: bool = False) -> CfgNode:
    """Return a config of the same structure as the recipes', of a handful of channels."""
    kind = ["GeneralizedRCNN", "PanopticFPN"][panoptic]
    overrides = [
        *("MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", kind, "MODEL.MASK_ON", str(panoptic)),
        *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "54", "MODEL.ROI_HEADS.NUM_CLASSES", "80"),
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", "4", "MODEL.ROI_MASK_HEAD.NUM_CONV", "4"),
        *("MODEL.PGN.FUSED", str(norm == "PGN"), "MODEL.WS.ENABLED", str(standardized)),
    ]
    cfg = load_cfg(str(FOLDER / "quickstart/tiny.yaml"), overrides).clone()
    cfg.defrost()
    for part in cfg.MODEL.values():
        if norm == "FrozenBN" and isinstance(part, CfgNode) and part.get("NORM") == "PGN":
            part.NORM = norm
    return cfg


def host_of(panoptic: bool, norm: str, standardized: bool, repeats: int) -> dict[str, float]:
    """Measure the host's time of a step's parts with one of the norms."""
    cfg = narrow(panoptic, norm, standardized)
    model = build(cfg, "cpu")
    for module in model.modules():
        if norm == "GN" and isinstance(module, PracticalGroupNorm):
            module.__class__ = nn.GroupNorm
    return host(model, cfg, repeats) | {"optimizer": STEP}


def parts_of(name: str, norm: str, half: bool, standardized: bool) -> dict[str, list[Work]]:
    """Return the work of the parts of a recipe's step at full size."""
    options = NORMS[norm]
    cfg = config(name, options, "cpu")
    model = build(cfg, "meta", options.get("groups", 0))
    works = trace(model, cfg, SIZE, half)
    if half:  # autocast copies the weights to half precision, and their gradients back
        sizes = [bytes_of(p) for p in model.parameters() if p.dim() > 1]
        for part in ("backbone", "backbone backward"):
            works[part] += [Work("cast", 1, 1.5 * size) for size in sizes]
    if standardized:
        layers = [m for m in model.modules() if isinstance(m, Conv2d) and m.norm is not None]
        sizes = [bytes_of(m.weight) for m in layers]
        works["backbone"] += [Work("standardize", 1, 2 * size) for size in sizes]
        works["backbone backward"] += [Work("standardize", 1, 3 * size) for size in sizes]
    size = sum(bytes_of(p) for p in model.parameters() if p.requires_grad)
    works["optimizer"] = [Work("SGD", 12, 6 * size)]  # of tensors in lists; is the gradient finite?
    return works


def step(
    works: dict[str, list[Work]], hosts: dict[str, float], others: Rest, gpu: Gpu, half: bool
) -> dict[str, Any]:
    """Return the time of a step in ms, part by part, and with a CUDA graph of the backbone."""
    parts = {}
    for part, each in works.items():
        launches = sum(work.launches for work in each)
        kernels = sum(work.seconds(gpu, half) for work in each)
        parts[part] = (kernels, hosts[part] + launches * LAUNCH, launches)
    kernels = others.launches * SHORTEST + others.waits * WAIT
    parts["rest"] = (kernels, others.host + others.launches * LAUNCH, others.launches)
    seconds = sum(max(kernels, busy) for kernels, busy, _ in parts.values())
    saved = sum(
        max(0.0, busy - max(kernels, 2 * LAUNCH))
        for part, (kernels, busy, _) in parts.items()
        if part.startswith("backbone")
    )
    return {
        "ms": seconds * 1e3,
        "gpu ms": sum(kernels for kernels, _, _ in parts.values()) * 1e3,
        "host ms": sum(busy for _, busy, _ in parts.values()) * 1e3,
        "launches": sum(count for _, _, count in parts.values()),
        "bound by the host": [p for p, (kernels, busy, _) in parts.items() if busy > kernels],
        "graph saves ms": saved * 1e3,
        "parts": {p: [kernels * 1e3, busy * 1e3] for p, (kernels, busy, _) in parts.items()},
    }


# Some of R-50's and the neck's norms, two images of 800 × 1344.
LAYERS = {
    "stem, res2": (2, 64, 200, 336),
    "res2 block, FPN p2": (2, 256, 200, 336),
    "res3 block": (2, 512, 100, 168),
    "res4": (2, 256, 50, 84),
    "res5": (2, 512, 25, 42),
    "box head": (1024, 256, 7, 7),
}


def layer(shape: tuple[int, ...], norm: str, half: bool) -> list[Work]:
    """Return the work of one norm with its ReLU, forward and backward."""
    x = torch.empty(shape, device="meta", requires_grad=True)
    weight, bias = (torch.empty(shape[1], device="meta", requires_grad=True) for _ in range(2))
    frozen = FrozenBatchNorm2d(shape[1]).to("meta")
    with Trace(half) as noted, as_on_gpu():
        if norm == "ours":
            y = fused_group_norm.fused_group_norm(x, 1, weight, bias, relu=True)
        elif norm.startswith("GN"):
            y = F.relu_(F.group_norm(x, int(norm[3:-1]), weight, bias))
        else:
            y = F.relu_(frozen(x))
        y.backward(torch.empty_like(y))
    return noted.works


def layer_rows(precisions: Iterable[str]) -> list[dict[str, Any]]:
    """Model single layers, in ms."""
    rows = []
    for precision, (where, shape) in product(precisions, LAYERS.items()):
        half = precision == "bf16"
        works = {norm: layer(shape, norm, half) for norm in NORMS}
        for name, gpu in GPUS.items():
            times = {k: 1e3 * sum(w.seconds(gpu, half) for w in v) for k, v in works.items()}
            if name != "V100":
                words = {"layer": where, "shape": shape, "gpu": name, "precision": precision}
                rows.append(words | times)
    return rows


def step_rows(repeats: int, precisions: Iterable[str]) -> list[dict[str, Any]]:
    """Model steps of both detectors."""
    triton.runtime.driver.set_active(NoDevice())
    rows = []
    for name in MODELS:
        panoptic = name.startswith("pfpn")
        others = rest(panoptic, repeats)
        for norm, options in NORMS.items():
            standardized = norm == "ours" and not panoptic  # as the recipe
            hosts = host_of(panoptic, options["NORM"], standardized, repeats)
            for precision in precisions:
                half = precision == "bf16"
                works = parts_of(name, norm, half, standardized)
                for gpu, peaks in GPUS.items():
                    found = step(works, hosts, others, peaks, half)
                    words = {"model": name, "norm": norm, "gpu": gpu, "precision": precision}
                    if gpu != "V100":
                        rows.append(words | found)
                    elif norm.startswith("Frozen") and not half:
                        measured = f"{ZOO[name]} ms measured by Detectron2's zoo"
                        print(
                            f"{name}, FrozenBN, V100, fp32: {found['ms']:.0f} ms here, {measured}"
                        )
    return rows


def main() -> None:
    """Model, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="of what is measured on the host")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    layers = layer_rows(args.precisions)
    print("Modelled, not measured: a norm with its ReLU, forward and backward, ms of the GPU")
    print(tabulate(layers, headers="keys", floatfmt=".3f"))
    steps = step_rows(args.repeats, args.precisions)
    print("Modelled, not measured: a training step of two images of 800 × 1344")
    shown = [{k: v for k, v in row.items() if k != "parts"} for row in steps]
    print(tabulate(shown, headers="keys", floatfmt=".1f"))
    path = args.output / "time_model.json"
    write_results({"layers": layers, "steps": steps}, str(path))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
