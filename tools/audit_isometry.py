#!/usr/bin/env python
"""Measure what each norm layer of a model does to the gradient; see --help."""

import argparse
import contextlib
import logging
import os
import random
import sys
from typing import TYPE_CHECKING, Any

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

if TYPE_CHECKING:
    from detectron2.config import CfgNode

_EPILOG = """example: python tools/audit_isometry.py --config-file configs/pfpn_pgn_all.yaml \\
    --synthetic --groups practical 32 1 MODEL.WEIGHTS "" MODEL.DEVICE cpu

The weights are those of MODEL.WEIGHTS, from which training would start, or of --checkpoint;
MODEL.WEIGHTS "" gives random ones. Results: OUTPUT_DIR/audit/audit.txt, .json, .csv and .png. More
in docs/audit.md."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Run batches forward and backward and report A, B, C and K, the ratios of the "
        "gradient's variance over the weight layer, the norm, the activation and the whole of "
        "every unit block, beside Eq. 31 and the exact factor. The table shows K; the files have "
        "all. docs/audit.md explains it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE")
    model.add_argument(
        "--checkpoint", metavar="FILE", help="one of a training here, with its config and weights"
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        default=["model"],
        metavar="CHOICE",
        help="model (as the config has them, the default), practical, exact, instance or numbers",
    )
    parser.add_argument("--synthetic", action="store_true", help="random images and ground truth")
    parser.add_argument("--num-batches", type=int, default=2, help="(default: 2)")
    parser.add_argument("--images-per-batch", type=int, default=2, help="(default: 2)")
    parser.add_argument(
        "--image-size", type=int, default=320, help="shorter side in pixels (default: 320)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    for name in ("num_batches", "images_per_batch", "image_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    # After parsing: importing Detectron2 takes seconds, and --help should not.
    from gn_practical.training.config.node import split_overrides

    args.groups, swallowed = split_overrides(args.groups)
    args.opts = swallowed + args.opts
    return args


def audit(args: argparse.Namespace) -> None:
    """Build the model and its batches, measure, report."""
    from detectron2.utils.env import seed_all_rng

    from gn_practical import build_model
    from gn_practical.analysis.audit import audit_isometry
    from gn_practical.analysis.audit_report import save_audit
    from gn_practical.analysis.blocks import choose_groups, find_unit_blocks
    from gn_practical.training.checkpoint import GroupsCheckpointer
    from gn_practical.training.engine import check_run
    from gn_practical.training.validation import check_datasets

    cfg = read_config(args)
    if not args.synthetic:
        check_run(cfg, eval_only=True)
        check_datasets(cfg)
    seed_all_rng(args.seed)
    model = build_model(cfg)
    blocks = find_unit_blocks(model)
    for choice in args.groups:  # before weights and data are read
        choose_groups(choice, blocks)
    GroupsCheckpointer(model, cfg=cfg).load(cfg.MODEL.WEIGHTS)
    options = {"groups": args.groups, "seed": args.seed, "progress": True}
    rows = audit_isometry(model.train(), make_batches(cfg, args), **options)
    folder = os.path.join(cfg.OUTPUT_DIR, "audit")
    about = {**vars(args), "weights": cfg.MODEL.WEIGHTS}
    about["config_file"] = args.config_file or args.checkpoint
    print(save_audit(rows, folder, about))
    print(f"{len(blocks)} unit blocks; table, JSON, CSV and picture are in {folder}")


def read_config(args: argparse.Namespace) -> "CfgNode":
    """Read the config, with a small batch of small images unless the overrides say otherwise."""
    from gn_practical.training.engine import load_cfg
    from gn_practical.weights.stored import merge_stored_config

    size = str(args.image_size)
    small = [
        *("INPUT.MIN_SIZE_TRAIN", f"({size},)", "INPUT.MAX_SIZE_TRAIN", str(2 * args.image_size)),
        *("SOLVER.IMS_PER_BATCH", str(args.images_per_batch), "SOLVER.REFERENCE_WORLD_SIZE", "0"),
        # The box head on 512 regions would take longer than all the rest.
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"),
        *("DATALOADER.NUM_WORKERS", "0", "DATASETS.TEST", "()", "SEED", str(args.seed)),
    ]
    if not args.checkpoint:
        return load_cfg(args.config_file, small + args.opts)
    opts = [*small, "MODEL.WEIGHTS", args.checkpoint, *args.opts]
    return load_cfg("", opts, add_config=lambda cfg: merge_stored_config(cfg, args.checkpoint))


def make_batches(cfg: "CfgNode", args: argparse.Namespace) -> list[Any]:
    """Take the first batches of the training set, or make random ones."""
    from gn_practical.training.engine import Trainer

    if not args.synthetic:
        loader = iter(Trainer.build_train_loader(cfg))
        return [next(loader) for _ in range(args.num_batches)]
    rng = random.Random(args.seed)
    return [
        [synthetic_sample(cfg, args.image_size, rng) for _ in range(args.images_per_batch)]
        for _ in range(args.num_batches)
    ]


def synthetic_sample(cfg: "CfgNode", size: int, rng: random.Random) -> dict[str, Any]:
    """Make a smooth random image with ground truth for every head that Detectron2 has.

    Eight boxes, their elliptic masks, and stuff in quarters.
    """
    import torch
    from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
    from torch.nn.functional import interpolate, pad

    count, model = 8, cfg.MODEL
    torch.manual_seed(rng.randrange(2**32))
    coarse = torch.rand(1, 3, max(size // 16, 2), max(size // 16, 2))
    image = interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)[0] * 255
    corner = torch.rand(count, 2) * 0.6 * size
    side = (0.1 + 0.3 * torch.rand(count, 2)) * size
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.cat([corner, corner + side], 1))
    retina = "Retina" in model.META_ARCHITECTURE
    classes = model.RETINANET.NUM_CLASSES if retina else model.ROI_HEADS.NUM_CLASSES
    instances.gt_classes = torch.randint(classes, (count,))
    angle = torch.arange(16) * 0.3927
    circle = torch.stack([angle.cos(), angle.sin()], 1) / 2 + 0.5
    outlines = (corner[:, None] + side[:, None] * circle).flatten(1).numpy()
    instances.gt_masks = PolygonMasks([[outline] for outline in outlines])
    if cfg.INPUT.MASK_FORMAT == "bitmask":
        instances.gt_masks = BitMasks.from_polygon_masks(instances.gt_masks, size, size)
    if model.KEYPOINT_ON:
        points = torch.rand(count, model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 2)
        points = corner[:, None] + side[:, None] * points
        instances.gt_keypoints = Keypoints(pad(points, (0, 1), value=2))  # 2: visible
    quarters = torch.randint(model.SEM_SEG_HEAD.NUM_CLASSES, (1, 1, 2, 2)).float()
    sem_seg = interpolate(quarters, (size, size))[0, 0].long()
    sample = {"image": image, "instances": instances, "sem_seg": sem_seg}
    if model.LOAD_PROPOSALS:
        proposals = Instances((size, size), proposal_boxes=instances.gt_boxes.clone())
        proposals.objectness_logits = torch.zeros(count)
        sample["proposals"] = proposals
    return {**sample, "height": size, "width": size}


def main() -> None:
    """Run, ending with one clear error that says what to change."""
    args = parse_args()
    from gn_practical.training.engine.run import one_clear_error

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with one_clear_error(), contextlib.suppress(BrokenPipeError):
        audit(args)


if __name__ == "__main__":
    sys.exit(main())
