#!/usr/bin/env python
"""Train or evaluate a detector or panoptic segmenter, as Detectron2's own train_net does."""

import os

# Before PyTorch is loaded: threads that wait long for each other stall where a core is taken.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")

from argparse import Namespace
from importlib.util import find_spec
from runpy import run_path
from typing import Any

# Read from its file and used before the imports below, which take seconds.
PACKAGE = find_spec("gn_practical").submodule_search_locations[0]
argument_parser = run_path(f"{PACKAGE}/training/engine/arguments.py")["argument_parser"]

if __name__ == "__main__":
    ARGS = argument_parser().parse_args()

# Before Detectron2: it keeps off the screen what PyTorch says at the sight of that.
from gn_practical.training import Trainer

# isort: split
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config import RunConfig, load_cfg
from gn_practical.training.engine import check_run, default_setup, launch
from gn_practical.training.validation import check_datasets


def setup(args: Namespace) -> RunConfig:
    """Read the config, set up folder and logs, and check all that is known before a model is."""
    cfg = load_cfg(args.config_file, args.opts, trusted=args.trust_config)
    default_setup(cfg, args)
    check_run(cfg, args.eval_only, args.resume)
    check_datasets(cfg, args.eval_only)
    return cfg


def main(args: Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, on this rank."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = GroupsCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg, evaluation=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch(main, ARGS)
