"""What can be known to fail is said before hours are spent."""

import logging
import os
from collections.abc import Iterator
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from gn_practical.config import add_pgn_config
from gn_practical.layers.protocol import BindableNorm
from gn_practical.training.checkpoint.files import LAST, newest_whole
from gn_practical.training.config.keys import check_counts
from gn_practical.training.config.node import RunConfig, look_up
from gn_practical.training.engine.autocast import DTYPES
from gn_practical.training.engine.signals import STOP

_logger = logging.getLogger(__name__)


def check_run(cfg: CfgNode, eval_only: bool = False, resume: bool = False) -> None:
    """Check a config against the machine and the files, before anything is built.

    With ``eval_only`` what an evaluation needs alone; with ``resume`` a checkpoint in
    ``OUTPUT_DIR`` will be taken in place of ``MODEL.WEIGHTS``.

    Raises:
        ValueError: with the key, its value and what to do.
    """
    STOP.check()
    check_counts(cfg)
    for key, be, then in _faults(cfg, eval_only, resume):
        raise ValueError(f"{key} must be {be}, got {key}={look_up(cfg, key)}{then}")
    if not eval_only:
        _warn_of_schedule(cfg)
        if os.path.isfile(os.path.join(cfg.OUTPUT_DIR, LAST)) and not resume:
            _logger.warning(
                "%s holds checkpoints of an earlier run, which this one overwrites. "
                "Add --resume to continue it, or choose another OUTPUT_DIR.",
                cfg.OUTPUT_DIR,
            )
    STOP.check()


def check_model(cfg: CfgNode, model: nn.Module) -> None:
    """Warn of frozen statistics that were never learned, and of keys for norms not in the model."""
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
    idle = [key for key, value in defaults.MODEL.PGN.items() if cfg.MODEL.PGN[key] != value]
    reason = "the model has no PGN norm: set the NORM keys to PGN"
    if any(isinstance(module, BindableNorm) for module in model.modules()):
        idle = [key for key in ("RULE", "ACTIVATION") if key in idle and cfg.MODEL.PGN.NUM_GROUPS]
        reason = "MODEL.PGN.NUM_GROUPS is not 0"
    if idle:
        names = ", ".join(f"MODEL.PGN.{key}" for key in idle)
        _logger.warning(
            "%s %s no effect, for %s.", names, "has" if len(idle) == 1 else "have", reason
        )


def _faults(cfg: CfgNode, eval_only: bool, resume: bool) -> Iterator[tuple[str, str, str]]:
    """Yield the keys that cannot stay, what each must be, and what follows on its value."""
    model, test, amp = cfg.MODEL, cfg.TEST, cfg.SOLVER.AMP
    name, on_cuda = model.META_ARCHITECTURE, model.DEVICE.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        then = ", and PyTorch finds no CUDA GPU. Add MODEL.DEVICE cpu, or install a PyTorch "
        yield "MODEL.DEVICE", "a device of this machine", then + "that fits the driver."
    if name == "PanopticFPN" and model.PANOPTIC_FPN.COMBINE.ENABLED and not model.MASK_ON:
        be = "True for a PanopticFPN, whose segments are its masks"
        then = ". Add MODEL.MASK_ON True, or MODEL.PANOPTIC_FPN.COMBINE.ENABLED False."
        yield "MODEL.MASK_ON", be, then
    if test.AUG.ENABLED and name != "GeneralizedRCNN":
        then = f" for a {name}. Add TEST.AUG.ENABLED False."
        yield "TEST.AUG.ENABLED", "False but for a GeneralizedRCNN", then
    # Detectron2 looks at these when training has ended.
    if not all(isinstance(e, list | tuple) and len(e) == 4 for e in test.EXPECTED_RESULTS):
        then = '. Write it like (("bbox", "AP", 38.5, 0.2),).'
        yield "TEST.EXPECTED_RESULTS", "tuples (task, metric, value, tolerance)", then
    url = urlparse(model.WEIGHTS)
    is_missing = model.WEIGHTS and not url.scheme and not os.path.isfile(url.path)
    # Asked last, for it reads a whole checkpoint, on every rank, as the checkpointer will again.
    if is_missing and not (resume and newest_whole(cfg.OUTPUT_DIR)[0]):
        then = ', which does not exist. Correct it, or add MODEL.WEIGHTS "" to start from scratch.'
        yield "MODEL.WEIGHTS", "a file, a URL or empty", then
    if amp.DTYPE not in DTYPES and not eval_only:
        yield "SOLVER.AMP.DTYPE", f"one of {', '.join(DTYPES)}", ". Correct the value."
    if amp.ENABLED and amp.DTYPE == "float16" and not on_cuda and not eval_only:
        be = f"bfloat16 on {model.DEVICE} with SOLVER.AMP.ENABLED"
        yield "SOLVER.AMP.DTYPE", be, ". Add SOLVER.AMP.DTYPE bfloat16."


def _warn_of_schedule(cfg: CfgNode) -> None:
    """Warn of a learning rate that does not fit the length of the run or the batch.

    Overrides that shorten a run leave the rest of its recipe as it was.
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
