"""Time whole training steps: PGN + WS, fused and not, GN(32) and the zoo's FrozenBN.

    python benchmarks/train_step.py                  # R-50 at 800 × 1333 on CUDA, small on the CPU

The models take turns in one process on the same images; ratios are of the medians. Weights are
random, which FrozenBN does not normalize: without pretrained weights its detections, and so its
times, do not compare.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from gn_practical import add_pgn_config, build_model

BASES = {
    "pfpn": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
}
VARIANTS = {
    "PGN + WS": {"NORM": "PGN", "WS": True, "FUSED": True},
    "PGN": {"NORM": "PGN", "WS": False, "FUSED": True},
    "PGN, not fused": {"NORM": "PGN", "WS": False, "FUSED": False},
    "GN(32)": {"NORM": "GN", "WS": False, "FUSED": False},
    "FrozenBN of the zoo": {"NORM": "FrozenBN", "WS": False, "FUSED": False},
}


def config(base: str, variant: dict, device: str) -> CfgNode:
    """Return the config of a variant; every norm of the network is of the same type."""
    cfg = model_zoo.get_config(BASES[base])
    add_pgn_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, ""
    cfg.MODEL.RESNETS.NORM = variant["NORM"]
    if variant["NORM"] != "FrozenBN":
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.FPN.NORM = cfg.MODEL.SEM_SEG_HEAD.NORM = variant["NORM"]
    cfg.MODEL.WS.ENABLED, cfg.MODEL.PGN.FUSED = variant["WS"], variant["FUSED"]
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
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        loss = sum(model(data).values())
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def infer(model: nn.Module, data: list[dict], amp: bool) -> float:
    """Time inference."""
    device = next(model.parameters()).device.type
    model.eval()
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=amp):
        model(data)
    if device == "cuda":
        torch.cuda.synchronize()
    model.train()
    return time.perf_counter() - start


def measure(base: str, device: str, repeats: int, size: tuple[int, int], amp: bool) -> list[dict]:
    """Time all variants in turns."""
    data = batch(*size, 2 if device == "cuda" else 1)
    models = {}
    for name, variant in VARIANTS.items():
        torch.manual_seed(0)
        models[name] = build_model(config(base, variant, device)).train()
    times: dict[str, tuple[list, list]] = {name: ([], []) for name in models}
    memory = dict.fromkeys(models, 0)
    with EventStorage():
        for turn in range(repeats + 1):
            for name, model in models.items():
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                train, inference = step(model, data, amp), infer(model, data, amp)
                if device == "cuda":
                    memory[name] = torch.cuda.max_memory_allocated()
                if turn:
                    times[name][0].append(train)
                    times[name][1].append(inference)
    return [
        {"model": base, "norm": name, "train": t, "inference": i, "peak_bytes": memory[name]}
        for name, (t, i) in times.items()
    ]


def rows(results: list[dict]) -> list[list]:
    """Format medians in ms, their spread, and ratios to GN(32)."""
    median = statistics.median
    reference = next(r for r in results if r["norm"] == "GN(32)")
    return [
        [
            r["model"], r["norm"], median(r["train"]) * 1e3,
            (max(r["train"]) - min(r["train"])) * 1e3,
            median(r["train"]) / median(reference["train"]),
            median(r["inference"]) * 1e3,
            median(r["inference"]) / median(reference["inference"]),
            r["peak_bytes"] / 2**30 or "not run",
        ]
        for r in results
    ]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, help="height and width in pixels")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--models", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = tuple(args.size or ((800, 1333) if device == "cuda" else (192, 256)))
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {size}.")
    if device == "cpu":
        print("Not run: CUDA, peak memory.")
    headers = ("model", "norm", "step ms", "range", "to GN(32)", "inference ms", "to GN(32)", "GiB")
    results = []
    for base in args.models:
        measured = measure(base, device, args.repeats, size, args.amp)
        print(tabulate(rows(measured), headers=headers, floatfmt=".2f"))
        results += measured
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "train_step.json"
    path.write_text(json.dumps(results, indent=1))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
