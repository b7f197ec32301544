"""What can be known to fail is said before hours are spent."""

import logging
import os
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import nn

from gn_practical.data import check_datasets
from gn_practical.engine.autocast import DTYPES


def check_run(cfg: CfgNode, eval_only: bool = False, resume: bool = False) -> None:
    """Check a config against the machine, the files and the data, before anything is built.

    Args:
        cfg: the config, its data sets registered.
        eval_only: check what an evaluation needs alone.
        resume: a checkpoint in ``OUTPUT_DIR`` will be taken in place of ``MODEL.WEIGHTS``.

    Raises:
        ValueError: with the key, its value and the way out; ``DatasetError`` for data.
    """
    _check_device(cfg)
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if not (resume and os.path.isfile(last)):
        _check_weights(cfg.MODEL.WEIGHTS)
    if not eval_only:
        _check_precision(cfg)
        _check_solver(cfg.SOLVER)
        if os.path.isfile(last) and not resume:
            logging.getLogger(__name__).warning(
                "%s holds checkpoints of an earlier run, which this one overwrites. "
                "Add --resume to continue it, or choose another OUTPUT_DIR.",
                cfg.OUTPUT_DIR,
            )
    check_datasets(cfg, eval_only=eval_only)


def check_model(cfg: CfgNode, model: nn.Module) -> None:
    """Warn of a recipe that is known to fail: frozen statistics that were never learned.

    Args:
        cfg: the config of the model.
        model: as it was built.
    """
    frozen = sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    if frozen and not cfg.MODEL.WEIGHTS:
        logging.getLogger(__name__).warning(
            "%d FrozenBN layers have the statistics of no data, for MODEL.WEIGHTS is empty: such a "
            "network hardly trains. Give pretrained weights, or set the NORM keys to PGN.",
            frozen,
        )


def _check_device(cfg: CfgNode) -> None:
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE must be a device of this machine, got MODEL.DEVICE={device}, and "
            "PyTorch finds no CUDA GPU. Add MODEL.DEVICE cpu, or install a PyTorch that fits the "
            "driver."
        )


def _check_weights(weights: str) -> None:
    url = urlparse(weights)
    if weights and not url.scheme and not os.path.isfile(url.path):
        raise ValueError(
            f"MODEL.WEIGHTS must be a file, a URL or empty, got MODEL.WEIGHTS={weights}, which "
            'does not exist. Correct the path, or add MODEL.WEIGHTS "" to start from scratch.'
        )


def _check_precision(cfg: CfgNode) -> None:
    amp, device = cfg.SOLVER.AMP, cfg.MODEL.DEVICE
    if amp.DTYPE not in DTYPES:
        raise ValueError(
            f"SOLVER.AMP.DTYPE must be one of {', '.join(DTYPES)}, got SOLVER.AMP.DTYPE="
            f"{amp.DTYPE}. Correct the value."
        )
    if amp.ENABLED and amp.DTYPE == "float16" and not device.startswith("cuda"):
        raise ValueError(
            f"SOLVER.AMP.DTYPE must be bfloat16 on {device}, got SOLVER.AMP.DTYPE=float16. Add "
            "SOLVER.AMP.DTYPE bfloat16."
        )


def _check_solver(solver: CfgNode) -> None:
    world_size, reference = comm.get_world_size(), solver.REFERENCE_WORLD_SIZE
    if reference and solver.IMS_PER_BATCH % reference:
        raise ValueError(
            "SOLVER.IMS_PER_BATCH must be divisible by SOLVER.REFERENCE_WORLD_SIZE, got "
            f"{solver.IMS_PER_BATCH} and {reference}. Add SOLVER.REFERENCE_WORLD_SIZE 0 to take "
            "batch, learning rate and schedule as they are written."
        )
    batch = solver.IMS_PER_BATCH // reference * world_size if reference else solver.IMS_PER_BATCH
    if batch % world_size or batch < 1:
        raise ValueError(
            "SOLVER.IMS_PER_BATCH must be a positive multiple of the number of processes, got "
            f"SOLVER.IMS_PER_BATCH={batch} for {world_size}. Change one of them."
        )
    if solver.MAX_ITER in solver.STEPS:
        raise ValueError(
            "SOLVER.STEPS must end before SOLVER.MAX_ITER, got SOLVER.STEPS="
            f"{tuple(solver.STEPS)} and SOLVER.MAX_ITER={solver.MAX_ITER}. Move or drop that step."
        )
