"""What a run needs besides its config: output folder, logs, random seed."""

import os
from argparse import Namespace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from gn_practical.atomic import replace_file
from gn_practical.training.engine.logs import DETAILS, start_logging
from gn_practical.training.engine.signals import STOP
from gn_practical.training.ranks import raise_on_all_ranks


def default_setup(cfg: CfgNode, args: Namespace) -> None:
    """Set up the output folder, logs and random numbers of a run, as Detectron2's function does.

    What Detectron2 prints, environment, command line and config, is in ``log.txt``.

    Raises:
        ValueError: if ``OUTPUT_DIR`` cannot be written.
    """
    STOP.check()
    with raise_on_all_ranks(ValueError):
        if comm.is_main_process():
            _make_folder(cfg)
    start_logging(cfg.OUTPUT_DIR)
    DETAILS.info("Environment:\n%s", collect_env_info())
    DETAILS.info(
        "'detectron2._C not built' does no harm here: Panoptic FPN and Faster R-CNN take their "
        "operators from torchvision. Rotated boxes and deformable convolutions need it."
    )
    DETAILS.info("Command line: %s", args)
    if args.config_file:
        DETAILS.info("%s:\n%s", args.config_file, Path(args.config_file).read_text())
    DETAILS.info("The whole config:\n%s", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    STOP.check()


def _make_folder(cfg: CfgNode) -> None:
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        with replace_file(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as path:
            Path(path).write_text(cfg.dump(), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR must be a folder that can be written, got OUTPUT_DIR={cfg.OUTPUT_DIR!r}: "
            f"{error}. Choose another one."
        ) from error
