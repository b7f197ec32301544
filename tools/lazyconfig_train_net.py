#!/usr/bin/env python
"""Train or evaluate a model of a Python config, as Detectron2's own lazyconfig_train_net does."""

import os

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from runpy import run_path
from typing import Any

_DESCRIPTION = """Train or evaluate a model of a Python config (LazyConfig), with the trainer,
checkpoints and evaluation of tools/train_net.py. Such a config is code, and runs."""
_EPILOG = """
Examples:

  Detectron2's own configs, by their names there, with PGN in the semantic head:
    python tools/lazyconfig_train_net.py --num-gpus 8 \\
        --config-file COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py \\
        model.sem_seg_head.norm=PGN train.output_dir=output/lazy_panoptic

  The paper's Faster R-CNN, continued after an interruption, evaluated:
    python tools/lazyconfig_train_net.py --config-file configs/lazy/faster_rcnn_gn_ws_pgn.py
    python tools/lazyconfig_train_net.py --resume \\
        --config-file configs/lazy/faster_rcnn_gn_ws_pgn.py
    python tools/lazyconfig_train_net.py --config-file configs/lazy/faster_rcnn_gn_ws_pgn.py \\
        --eval-only train.init_checkpoint=output/lazy_faster_rcnn_gn_ws_pgn/model_final.pth

  Groups and weight standardization of any of them:
    ... pgn.num_groups=32 ws.enabled=True

Results go to train.output_dir. docs/lazyconfig.md lists the keys.
"""


def argument_parser() -> ArgumentParser:
    """Return the parser of tools/train_net.py; overrides are path.key=value."""
    # Read from its file, for importing the package takes seconds.
    package = find_spec("gn_practical").submodule_search_locations[0]
    return run_path(f"{package}/training/engine/arguments.py")["argument_parser"](
        _DESCRIPTION, _EPILOG
    )


if __name__ == "__main__":
    ARGS = argument_parser().parse_args()

# Before Detectron2: it keeps off the screen what PyTorch says at the sight of that.
import gn_practical.training  # noqa: F401

# isort: split
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.engine import check_run, default_setup, launch
from gn_practical.training.lazy import (
    LazyRunConfig,
    LazyTrainer,
    errors_in_lazy_words,
    find_file,
    load_lazy_config,
    log_in_lazy_words,
)
from gn_practical.training.validation import check_datasets


def setup(args: Namespace) -> LazyRunConfig:
    """Run the config, set up folder and logs, and check all that is known before a model is."""
    args.config_file = find_file(args.config_file)
    cfg = load_lazy_config(args.config_file, args.opts, eval_only=args.eval_only)
    default_setup(cfg, args)
    log_in_lazy_words()
    check_run(cfg, args.eval_only, args.resume)
    if args.eval_only or cfg.DATASETS.TRAIN:  # else the loader has data of its own
        check_datasets(cfg, args.eval_only)
    return cfg


def main(args: Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, on this rank."""
    with errors_in_lazy_words():
        cfg = setup(args)
        if args.eval_only:
            model = LazyTrainer.build_model(cfg)
            checkpointer = GroupsCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, evaluation=True)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            results = LazyTrainer.test(cfg, model)
            if comm.is_main_process():
                verify_results(cfg, results)
            return results

        trainer = LazyTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


if __name__ == "__main__":
    launch(main, ARGS)
