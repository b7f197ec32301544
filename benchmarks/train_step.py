"""Time whole training steps and inference: PGN, PyTorch's GN(32) and the zoo's FrozenBN.

    python benchmarks/train_step.py                  # R-50 at 800 × 1333 on CUDA, small on the CPU
    python benchmarks/train_step.py --variants "PGN + WS" "GN(32)" --models pfpn_pgn_all

The models take turns in one process on the same images; ratios are of the medians. Weights are
random, which FrozenBN does not normalize: without pretrained weights its detections, and so its
times, do not compare.
"""

import argparse
import statistics
from pathlib import Path

import torch
from clock import clock
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from live_bytes import LiveBytes
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


def config(name: str, variant: dict, device: str) -> CfgNode:
    """Return the config of a variant: this project's with another norm, or the zoo's."""
    if variant["NORM"] == "FrozenBN":
        cfg = model_zoo.get_config(CONFIGS[name])
        add_pgn_config(cfg)
    else:
        cfg = load_cfg(str(FOLDER / f"{name}.yaml"), ["MODEL.DEVICE", device]).clone()
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


def step(model: nn.Module, data: list[dict], amp: bool) -> float:
    """Time one forward and backward pass."""
    device = next(model.parameters()).device.type
    now = clock(device)
    start = now()
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        loss = sum(model(data).values())
    loss.backward()
    seconds = now() - start
    model.zero_grad(set_to_none=True)
    return seconds


def infer(model: nn.Module, data: list[dict], amp: bool) -> float:
    """Time inference."""
    device = next(model.parameters()).device.type
    model.eval()
    now = clock(device)
    start = now()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=amp):
        model(data)
    seconds = now() - start
    model.train()
    return seconds


def peak_bytes(model: nn.Module, data: list[dict], amp: bool) -> int:
    """Return the most bytes that a step holds: of the allocator on CUDA, of tensors on the CPU."""
    if next(model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step(model, data, amp)
        return torch.cuda.max_memory_allocated()
    with LiveBytes(model) as live:
        step(model, data, amp)
    return live.peak


def measure(
    name: str, variants: list[str], device: str, repeats: int, size: tuple[int, int], amp: bool
) -> list[dict]:
    """Time the variants in turns."""
    data = batch(*size, 2 if device == "cuda" else 1)
    models = {}
    for variant in variants:
        torch.manual_seed(0)
        models[variant] = build_model(config(name, VARIANTS[variant], device)).train()
    times: dict[str, tuple[list, list]] = {variant: ([], []) for variant in models}
    with EventStorage():
        for turn in range(repeats + 1):
            for variant, model in models.items():
                seconds = step(model, data, amp), infer(model, data, amp)
                if turn:
                    for values, value in zip(times[variant], seconds, strict=True):
                        values.append(value)
        peaks = {variant: peak_bytes(model, data, amp) for variant, model in models.items()}
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
        measured = measure(name, args.variants, device, args.repeats, size, args.amp)
        print(tabulate(rows(measured), headers=headers, floatfmt=".2f"), flush=True)
        results += measured
    path = args.output / "train_step.json"
    write_results(results, str(path))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
