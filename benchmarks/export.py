"""Exported models beside the ones they were made of: agreement and time.

    python benchmarks/export.py                                # random models of five kinds
    python benchmarks/export.py --weights output/quickstart/model_final.pth --only

Random weights of the last layers are large, so that scores differ and something is found. Each
model sees drawn scenes in three sizes; both take turns in one process, on the same threads.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from gn_practical import build_model
from gn_practical.inference.export.check import check, inputs_of, ratio, roundings
from gn_practical.inference.export.contents import contents_of
from gn_practical.inference.export.formats import write_onnx
from gn_practical.inference.export.standardization import fold_standardization
from gn_practical.inference.exported import ExportedModel
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config import load_cfg
from gn_practical.training.data.drawing import draw_scene
from gn_practical.weights import Description, config_from_checkpoint, load_description

CONFIGS = Path(__file__).parents[1] / "configs"
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", "False"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
    *("MODEL.RETINANET.NUM_CLASSES", "5", "MODEL.RETINANET.NORM", "PGN"),
]
MODELS = {
    "RetinaNet, tiny": ("quickstart/tiny.yaml", RETINANET),
    "Mask R-CNN, tiny": ("quickstart/tiny.yaml", ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]),
    "Faster R-CNN R-18, as for bccd": (
        "quickstart/faster_rcnn.yaml",
        ["INPUT.MIN_SIZE_TEST", "240", "MODEL.ROI_HEADS.NUM_CLASSES", "3"],
    ),
    "panoptic FPN R-50, 480 px": ("pfpn_pgn_all.yaml", ["INPUT.MIN_SIZE_TEST", "480"]),
    "panoptic FPN R-50, 800 px": ("pfpn_pgn_all.yaml", []),
}
HEADERS = ("model", "size", "found", "boxes, px", "scores", "panoptic, %", "PyTorch, ms")


def random_model(name: str) -> tuple[nn.Module, CfgNode, Description]:
    """Build a model that finds something."""
    config, words = MODELS[name]
    words = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *words]
    cfg = load_cfg(str(CONFIGS / config), words)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for path, module in model.named_modules():
        if path.endswith("cls_score"):
            nn.init.normal_(module.weight, std=0.3)
        if path.endswith(("objectness_logits", "sem_seg_head.predictor")):
            nn.init.normal_(module.weight, std=0.1)
    return model, cfg, Description()


def trained_model(path: str) -> tuple[nn.Module, CfgNode, Description]:
    """Load a checkpoint."""
    cfg = config_from_checkpoint(path)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    GroupsCheckpointer(model, cfg=cfg, evaluation=True).load(path, checkpointables=[])
    return model, cfg, load_description(path)


def scenes() -> list[np.ndarray]:
    """Draw three pictures of different shapes."""
    shapes = ((320, 240), (256, 256), (240, 360))
    drawn = (draw_scene(np.random.default_rng(seed), 256)[0] for seed in range(3))
    return [cv2.resize(each, shape) for each, shape in zip(drawn, shapes, strict=True)]


def measure(name: str, args: argparse.Namespace) -> None:
    """Export and compare one model, and print its rows."""
    trained = name not in MODELS
    model, cfg, stored = trained_model(name) if trained else random_model(name)
    folded, start = copy.deepcopy(model), time.perf_counter()
    fold_standardization(folded)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        opset = 21 if args.group_norm == "onnx" else 18
        write_onnx(folded, contents_of(model, cfg, stored, args.group_norm), path, opset)
        seconds = time.perf_counter() - start
        inputs = inputs_of(scenes(), cfg)
        checks = list(check(model, ExportedModel(path), inputs, args.repeats))
    rows = [
        (
            Path(name).parent.name if trained else name,
            f"{each.size[1]} x {each.size[0]}",
            found.detections,
            f"{found.box:.1e}",
            f"{found.score:.1e}",
            "" if found.panoptic is None else f"{100 * found.panoptic:.3f}",
            f"{1000 * each.seconds[0]:.0f}",
            f"{1000 * each.seconds[1]:.0f}",
            f"{each.seconds[1] / each.seconds[0]:.2f}",
            "yes" if found.holds else "NO",
        )
        for each in checks
        for found in [each.agreement]
    ]
    headers = (*HEADERS, "ONNX, ms", "ratio", "agrees")
    print(tabulate(rows, headers, "github", disable_numparse=True), flush=True)
    for line in (*roundings(checks), *(alone for c in checks for alone in c.agreement.alone)):
        print(line)
    print(f"written in {seconds:.0f} s; ratio {ratio(checks):.2f}\n", flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE", help="trained models")
    parser.add_argument(
        "--only", nargs="*", metavar="TEXT", help="random models that have one of these in the name"
    )
    parser.add_argument("--group-norm", choices=("fast", "plain", "onnx"), default="fast")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    chosen = [n for n in MODELS if args.only is None or any(text in n for text in args.only)]
    for name in (*args.weights, *chosen):
        measure(name, args)


if __name__ == "__main__":
    main()
