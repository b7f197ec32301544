"""Time whole training steps and inference: PGN, PyTorch's GN(32) and the zoo's FrozenBN.

    python benchmarks/train_step.py                  # R-50 at 800 × 1333 on CUDA, small on the CPU
    python benchmarks/train_step.py --variants "PGN + WS" "GN(32)" --models pfpn_pgn_all

The models take turns in one process on the same images; ratios are of the medians. Weights are
random, so FrozenBN takes its statistics from the images: with others its activations would grow
from block to block, and half precision would overflow. The zoo's model freezes the first stages.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from clock import clock
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from live_bytes import counter
from tabulate import tabulate
from torch import nn

from gn_practical import add_pgn_config, build_model
from gn_practical.training.engine import load_cfg
from gn_practical.training.evaluation.results import write_results

# Configs of this project, and of the zoo for the same model.
CONFIGS = {
    "pfpn_pgn_all": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "faster_rcnn_gn_ws_pgn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
}
FOLDER = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "PGN + WS": {"NORM": "PGN", "WS": True},
    "PGN": {"NORM": "PGN"},
    "PGN, not fused": {"NORM": "PGN", "FUSED": False},
    "PGN, memory mode": {"NORM": "PGN", "RECOMPUTE": True},
    "GN(32) + WS": {"NORM": "GN", "WS": True},
    "GN(32)": {"NORM": "GN"},
    "FrozenBN of the zoo": {"NORM": "FrozenBN"},
}


def config(name: str, variant: dict, device: str, overrides: Sequence = ()) -> CfgNode:
    """Return the config of a variant: this project's with another norm, or the zoo's."""
    if variant["NORM"] == "FrozenBN":
        cfg = model_zoo.get_config(CONFIGS[name])
        add_pgn_config(cfg)
        cfg.merge_from_list([*overrides])
    else:
        words = ["MODEL.DEVICE", device, *map(str, overrides)]
        cfg = load_cfg(str(FOLDER / f"{name}.yaml"), words).clone()
        cfg.defrost()
        for part in cfg.MODEL.values():
            if isinstance(part, CfgNode) and part.get("NORM") == "PGN":
                part.NORM = variant["NORM"]
        cfg.MODEL.WS.ENABLED = variant.get("WS", False)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, ""
    cfg.MODEL.PGN.FUSED = variant.get("FUSED", True)
    cfg.MODEL.PGN.RECOMPUTE = variant.get("RECOMPUTE", False)
    return cfg


def batch(height: int, width: int, images: int) -> list[dict]:
    """Make images with two instances each."""
    generator = torch.Generator().manual_seed(0)
    instances = Instances((height, width))
    half = torch.tensor([width, height, width, height]) / 2
    instances.gt_boxes = Boxes(torch.tensor([[0.1, 0.1, 1, 1], [0.5, 0.6, 1.8, 1.7]]) * half)
    instances.gt_classes = torch.tensor([0, 5])
    instances.gt_masks = BitMasks(torch.ones(2, height, width, dtype=torch.bool))
    image = torch.randint(0, 255, (3, height, width), generator=generator, dtype=torch.uint8)
    sem_seg = torch.randint(0, 50, (height, width), generator=generator)
    return [{"image": image, "instances": instances, "sem_seg": sem_seg}] * images


def step(model: nn.Module, data: list[dict], dtype: torch.dtype | None) -> float:
    """Time one forward and backward pass, under autocast where a dtype is given."""
    device = next(model.parameters()).device.type
    now = clock(device)
    start = now()
    with torch.autocast(device, dtype, enabled=dtype is not None):
        loss = sum(model(data).values())
    loss.backward()
    seconds = now() - start
    model.zero_grad(set_to_none=True)
    return seconds


def infer(model: nn.Module, data: list[dict], dtype: torch.dtype | None) -> float:
    """Time inference."""
    device = next(model.parameters()).device.type
    model.eval()
    now = clock(device)
    start = now()
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
        model(data)
    seconds = now() - start
    model.train()
    return seconds


def peak_bytes(model: nn.Module, data: list[dict], dtype: torch.dtype | None) -> int:
    """Return the most bytes that a step holds beside the parameters."""
    with counter(model) as live:
        step(model, data, dtype)
    return live.peak


def take_statistics(model: nn.Module, data: list[dict]) -> None:
    """Give each FrozenBN the mean and variance of its input, in the order in which they run."""

    def take(norm: nn.Module, inputs: tuple) -> None:
        variance, mean = torch.var_mean(inputs[0].float(), (0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(take) for norm in norms]
    with torch.no_grad():
        model.backbone(model.preprocess_image(data).tensor)
    for hook in hooks:
        hook.remove()


def build(
    name: str, variants: list[str], data: list[dict], device: str, overrides: Sequence = ()
) -> dict[str, nn.Module]:
    """Return the models of the variants, with the same weights where they have the same layers."""
    models = {}
    for variant in variants:
        torch.manual_seed(0)
        cfg = config(name, VARIANTS[variant], device, overrides)
        models[variant] = build_model(cfg).train()
        take_statistics(models[variant], data)
    return models


def take_turns(
    name: str,
    models: dict[str, nn.Module],
    data: list[dict],
    repeats: int,
    dtype: torch.dtype | None,
    warm_up: int = 1,
    count: bool = True,
) -> list[dict]:
    """Time the variants in turns, after some of warm-up, and count their bytes.

    Args:
        name: of the config.
        models: from :func:`build`.
        data: a batch.
        repeats: turns that are timed.
        dtype: of autocast; None to run without.
        warm_up: turns before them.
        count: whether to count the bytes, else they are not a number.
    """
    times: dict[str, tuple[list, list]] = {variant: ([], []) for variant in models}
    with EventStorage():
        for turn in range(repeats + warm_up):
            for variant, model in models.items():
                seconds = step(model, data, dtype), infer(model, data, dtype)
                if turn >= warm_up:
                    for values, value in zip(times[variant], seconds, strict=True):
                        values.append(value)
        peaks = {v: peak_bytes(m, data, dtype) if count else math.nan for v, m in models.items()}
    return [
        {"model": name, "norm": v, "train": t, "inference": i, "peak_bytes": peaks[v]}
        for v, (t, i) in times.items()
    ]


def rows(results: list[dict]) -> list[list]:
    """Format medians in ms, their spread, and ratios to GN(32)."""
    median = statistics.median
    reference = next((r for r in results if r["norm"] == "GN(32)"), results[0])
    return [
        [
            r["model"], r["norm"], median(r["train"]) * 1e3,
            (max(r["train"]) - min(r["train"])) * 1e3,
            median(r["train"]) / median(reference["train"]),
            median(r["inference"]) * 1e3,
            median(r["inference"]) / median(reference["inference"]),
            r["peak_bytes"] / 2**30, r["peak_bytes"] / reference["peak_bytes"],
        ]
        for r in results
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, help="height and width in pixels")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = tuple(args.size or ((800, 1333) if device == "cuda" else (192, 256)))
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {size}.")
    if device == "cpu":
        print("Not run: CUDA, peak memory of its allocator; GiB are of live tensors.")
    headers = ("model", "norm", "step ms", "range", "to GN(32)", "inference ms", "to GN(32)",
               "peak GiB", "to GN(32)")  # fmt: skip
    results = []
    for name in args.models:
        data = batch(*size, 2 if device == "cuda" else 1)
        models = build(name, args.variants, data, device)
        dtype = torch.bfloat16 if args.amp else None
        measured = take_turns(name, models, data, args.repeats, dtype)
        print(tabulate(rows(measured), headers=headers, floatfmt=".2f"), flush=True)
        results += measured
    path = args.output / "train_step.json"
    write_results(results, str(path))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
