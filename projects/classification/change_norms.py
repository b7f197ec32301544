#!/usr/bin/env python
"""Measure what it costs to give a trained classifier other norms, and write one that is set right.

The weights of one pretraining run in the norms of another config: before training and after some
steps, as they are and with the norms recalibrated on a few batches.
"""

import os

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

import copy
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import islice

_EPILOG = """
Examples, in projects/classification:

  Weights trained with GN of 32 groups, in the practical number of groups:
    python change_norms.py --config-file configs/narrow50_tiny_imagenet.yaml --former GN32 \\
        MODEL.WEIGHTS output/gn32/model_final.pth OUTPUT_DIR output/gn32_to_pgn

  The same from batch norm, with 500 more steps:
    python change_norms.py --config-file configs/narrow50_tiny_imagenet.yaml --former BN \\
        --steps 0,100,500 MODEL.WEIGHTS output/bn/model_final.pth OUTPUT_DIR output/bn_to_pgn

OUTPUT_DIR gets results.json and backbone_recalibrated.pth, for MODEL.WEIGHTS of a detector.
"""


def argument_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config with the new norms")
    parser.add_argument("--former", required=True, help="former norms: GN32, GN8, ..., BN, LN, PGN")
    parser.add_argument("--batches", type=int, default=8, help="for recalibration (default 8)")
    parser.add_argument(
        "--steps", type=_numbers, default=[0, 50, 200], help="of training (default 0,50,200)"
    )
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of the steps")
    parser.add_argument("opts", nargs="*", help="config keys and values")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    ARGS = argument_parser().parse_args()

# Before Detectron2: it keeps off the screen what PyTorch says at the sight of that.
from gn_practical import training

# isort: split
import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.events import EventStorage
from gn_classification import (
    ClassificationEvaluator,
    add_classification_config,
    build_test_loader,
    build_train_loader,
    check_config,
    complete_config,
    export_backbone,
    open_datasets,
)
from torch import nn

from gn_practical import build_model
from gn_practical.modeling import recalibrate_norms
from gn_practical.training.config import RunConfig, load_cfg
from gn_practical.training.data.seeding import seed_all
from gn_practical.training.engine.autocast import AutocastTrainer
from gn_practical.training.engine.run import run
from gn_practical.training.evaluation import results_table, write_results


def main(args: Namespace) -> dict[str, dict[str, float]]:
    """Measure, write the results and return them."""
    cfg = setup(args)
    model, former = build_model(cfg), build_model(former_config(cfg, args.former))
    weights = torch.load(cfg.MODEL.WEIGHTS, map_location="cpu", weights_only=True)["model"]
    for each in (model, former):
        load_weights(each, weights)
    results: dict[str, dict[str, float]] = {}
    recalibrated = copy.deepcopy(model)
    paths = recalibrate_norms(recalibrated, calibration_batches(cfg, args.batches), former)
    print(f"{len(paths)} norms have the moments of {args.former}'s.")
    export_backbone(recalibrated, cfg, os.path.join(cfg.OUTPUT_DIR, "backbone_recalibrated.pth"))
    starts = {args.former: former, "new norms": model, "recalibrated": recalibrated}
    for name, start in starts.items():
        for step in train(cfg, start, args.steps, args.lr):
            results[f"{name}, {step} steps"] = evaluate(cfg, start)
    write_results(results, os.path.join(cfg.OUTPUT_DIR, "results.json"))
    print(results_table({name: {"classification": row} for name, row in results.items()}))
    return results


def setup(args: Namespace) -> RunConfig:
    """Read the config, open the data and set up the folder."""
    cfg = load_cfg(args.config_file, args.opts, add_config=add_classification_config)
    check_config(cfg)
    cfg = complete_config(cfg, open_datasets(cfg))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return cfg


def former_config(cfg: RunConfig, norm: str) -> RunConfig:
    """Return the config with the norms of before: "GN32", or a value of CLASSIFICATION.NORM."""
    cfg = cfg.clone()
    cfg.defrost()
    name = norm.rstrip("0123456789")
    cfg.CLASSIFICATION.NORM, cfg.MODEL.PGN.NUM_GROUPS = name, int(norm[len(name) :] or 0)
    return cfg


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load weights, whole but for what other norms have besides.

    Raises:
        ValueError: if the model has a parameter that they lack.
    """
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"MODEL.WEIGHTS must be a classifier's of the same config but for its norms, got one "
            f"without {', '.join(missing[:4])}. Give its model_final.pth, and --former."
        )


def calibration_batches(cfg: RunConfig, number: int) -> list:
    """Return the first batches of training."""
    return list(islice(build_train_loader(cfg), number))


def evaluate(cfg: RunConfig, model: nn.Module) -> dict[str, float]:
    """Return errors in percent and the cross-entropy on the first test set."""
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    return inference_on_dataset(model, loader, ClassificationEvaluator())["classification"]


def train(cfg: RunConfig, model: nn.Module, steps: list[int], lr: float) -> Iterator[int]:
    """Train with a constant learning rate, and pause after each of these numbers of steps."""
    optimizer = training.Trainer.build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = lr
    trainer = AutocastTrainer(model.train(), build_train_loader(cfg), optimizer)
    with EventStorage() as storage:
        for trainer.iter in range(max(steps) + 1):
            if trainer.iter in steps:
                yield trainer.iter
                model.train()
            if trainer.iter == max(steps):
                return
            storage.iter = trainer.iter
            seed_all(cfg.SEED, "step", 0, trainer.iter)
            trainer.run_step()


if __name__ == "__main__":
    run(main, ARGS)
