"""What can be known to fail is said before hours are spent."""

import logging
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from gn_practical.config import add_pgn_config
from gn_practical.layers.protocol import BindableNorm
from gn_practical.training.checkpoint.files import LAST, newest_whole
from gn_practical.training.config.keys import check_counts
from gn_practical.training.config.node import RunConfig
from gn_practical.training.engine.autocast import DTYPES
from gn_practical.training.engine.signals import STOP

_logger = logging.getLogger(__name__)


def check_run(cfg: CfgNode, eval_only: bool = False, resume: bool = False) -> None:
    """Check a config against the machine and the files, before anything is built.

    Args:
        cfg: the config.
        eval_only: check what an evaluation needs alone.
        resume: a checkpoint in ``OUTPUT_DIR`` will be taken in place of ``MODEL.WEIGHTS``.

    Raises:
        ValueError: with the key, its value and what to do.
    """
    STOP.check()
    check_counts(cfg)
    _check_device(cfg)
    _check_architecture(cfg)
    _check_expected_results(cfg.TEST.EXPECTED_RESULTS)
    _check_weights(cfg, resume)
    if not eval_only:
        _check_precision(cfg)
        _warn_of_schedule(cfg)
        if os.path.isfile(os.path.join(cfg.OUTPUT_DIR, LAST)) and not resume:
            _logger.warning(
                "%s holds checkpoints of an earlier run, which this one overwrites. "
                "Add --resume to continue it, or choose another OUTPUT_DIR.",
                cfg.OUTPUT_DIR,
            )
    STOP.check()


def check_model(cfg: CfgNode, model: nn.Module) -> None:
    """Warn of a recipe that is known to fail, and of keys for norms that are not there.

    The recipe: frozen statistics that were never learned.

    Args:
        cfg: the config of the model.
        model: as it was built.
    """
    _name_idle_keys(cfg, model)
    frozen = sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    if frozen and not cfg.MODEL.WEIGHTS:
        _logger.warning(
            "%d FrozenBN layers have the statistics of no data, for MODEL.WEIGHTS is empty: such a "
            "network hardly trains. Give pretrained weights, or set the NORM keys to PGN.",
            frozen,
        )


def _name_idle_keys(cfg: CfgNode, model: nn.Module) -> None:
    """Warn of ``MODEL.PGN`` keys that were changed and decide nothing in this model."""
    defaults = get_cfg()
    add_pgn_config(defaults)
    changed = [key for key, value in defaults.MODEL.PGN.items() if cfg.MODEL.PGN[key] != value]
    if not any(isinstance(module, BindableNorm) for module in model.modules()):
        idle, reason = changed, "the model has no PGN norm: set the NORM keys to PGN"
    else:
        by_rule = ("RULE", "ACTIVATION")
        idle = [key for key in changed if key in by_rule and cfg.MODEL.PGN.NUM_GROUPS]
        reason = "MODEL.PGN.NUM_GROUPS is not 0"
    if idle:
        _logger.warning(
            "%s %s no effect, for %s.",
            ", ".join(f"MODEL.PGN.{key}" for key in idle),
            *("has" if len(idle) == 1 else "have", reason),
        )


def _check_device(cfg: CfgNode) -> None:
    device = cfg.MODEL.DEVICE
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE must be a device of this machine, got MODEL.DEVICE={device}, and "
            "PyTorch finds no CUDA GPU. Add MODEL.DEVICE cpu, or install a PyTorch that fits the "
            "driver."
        )


def _check_weights(cfg: CfgNode, resume: bool) -> None:
    weights = cfg.MODEL.WEIGHTS
    url = urlparse(weights)
    if not weights or url.scheme or os.path.isfile(url.path):
        return
    # Asked last, for it reads a whole checkpoint, on every rank, as the checkpointer will again.
    if not (resume and newest_whole(cfg.OUTPUT_DIR)[0]):
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
            f"SOLVER.AMP.DTYPE must be bfloat16 on {device} with SOLVER.AMP.ENABLED, got "
            "SOLVER.AMP.DTYPE=float16. Add SOLVER.AMP.DTYPE bfloat16."
        )


def _check_architecture(cfg: CfgNode) -> None:
    model = cfg.MODEL
    combines = model.META_ARCHITECTURE == "PanopticFPN" and model.PANOPTIC_FPN.COMBINE.ENABLED
    if combines and not model.MASK_ON:
        raise ValueError(
            "MODEL.MASK_ON must be True for a PanopticFPN, got MODEL.MASK_ON=False: its segments "
            "are its masks. Add MODEL.MASK_ON True, or MODEL.PANOPTIC_FPN.COMBINE.ENABLED False."
        )
    if cfg.TEST.AUG.ENABLED and model.META_ARCHITECTURE != "GeneralizedRCNN":
        raise ValueError(
            "TEST.AUG.ENABLED must be False but for a GeneralizedRCNN, got TEST.AUG.ENABLED=True "
            f"for a {model.META_ARCHITECTURE}. Add TEST.AUG.ENABLED False."
        )


def _check_expected_results(expected: Sequence[Any]) -> None:
    """Detectron2 looks at them when training has ended."""
    for entry in expected:
        if not isinstance(entry, list | tuple) or len(entry) != 4:
            raise ValueError(
                "TEST.EXPECTED_RESULTS must hold (task, metric, value, tolerance), got "
                f"TEST.EXPECTED_RESULTS={expected!r}. Write it like "
                '(("bbox", "AP", 38.5, 0.2),).'
            )


def _warn_of_schedule(cfg: CfgNode) -> None:
    """Warn of a learning rate that does not fit the length of the run or the batch.

    Shortening a run is the first thing that one does, and its overrides leave the rest of the
    recipe as it was.
    """
    solver = cfg.SOLVER
    length = f"SOLVER.MAX_ITER={solver.MAX_ITER}"
    if solver.WARMUP_ITERS * 2 > solver.MAX_ITER > 0:
        _logger.warning(
            "The learning rate is warmed up in SOLVER.WARMUP_ITERS=%d of %s iterations: it is far "
            "below SOLVER.BASE_LR for most of the run. Add SOLVER.WARMUP_ITERS %d.",
            *(solver.WARMUP_ITERS, length, solver.MAX_ITER // 10),
        )
    falls = not solver.STEPS or min(solver.STEPS) < solver.MAX_ITER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and not falls:
        _logger.warning(
            "No step of SOLVER.STEPS=%s lies within %s iterations: the learning rate never falls.",
            *(tuple(solver.STEPS), length),
        )
    recipe = (cfg.recipe or cfg).SOLVER if isinstance(cfg, RunConfig) else solver
    batch = recipe.IMS_PER_BATCH
    if batch != solver.IMS_PER_BATCH and recipe.BASE_LR == solver.BASE_LR:
        _logger.warning(
            "SOLVER.IMS_PER_BATCH is %d in place of the recipe's %d, with the same learning rate. "
            "The linear rule asks for SOLVER.BASE_LR %g; SOLVER.REFERENCE_WORLD_SIZE scales batch, "
            "learning rate and schedule together with the number of GPUs.",
            *(solver.IMS_PER_BATCH, batch, solver.BASE_LR * solver.IMS_PER_BATCH / max(1, batch)),
        )
