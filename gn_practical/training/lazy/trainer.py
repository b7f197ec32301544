"""``LazyTrainer``: the trainer, whose model, data, optimizer and schedule a LazyConfig makes."""

import copy
import logging
import os
from collections.abc import Iterable
from typing import Any

from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from gn_practical.modeling import prepare_model
from gn_practical.training.detectron2_internals import set_write_period
from gn_practical.training.engine import Trainer
from gn_practical.training.lazy.config import LazyRunConfig
from gn_practical.training.lazy.data import build_test_loader, build_train_loader
from gn_practical.training.lazy.evaluators import build_evaluator

_logger = logging.getLogger(__name__)


class LazyTrainer(Trainer):
    """The package's ``Trainer`` for a LazyConfig.

    All that surrounds a step is the same: checkpoints, exact resume, signals, steps that are not
    finite, evaluation, pictures.

    Args:
        cfg: as :func:`~gn_practical.training.lazy.load_lazy_config` returns it.
    """

    cfg: LazyRunConfig

    def build_hooks(self) -> list[HookBase | None]:
        """Return the trainer's hooks, which write every ``train.log_period`` iterations."""
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, PeriodicWriter):
                set_write_period(hook, self.cfg.lazy.train.get("log_period", 20))
        return built

    @classmethod
    def construct_model(cls, cfg: LazyRunConfig) -> nn.Module:
        """Return ``model``, on ``train.device``, with its norms bound as ``pgn`` and ``ws`` say."""
        return prepare_model(instantiate(cfg.lazy.model).to(cfg.MODEL.DEVICE), cfg)

    @classmethod
    def distribute(cls, cfg: LazyRunConfig, model: nn.Module, **options: Any) -> nn.Module:
        """Wrap the model as ``train.ddp`` says."""
        ddp = OmegaConf.to_container(OmegaConf.create(cfg.lazy.train.get("ddp") or {}))
        return super().distribute(cfg, model, **{**ddp, **options})

    @classmethod
    def build_optimizer(cls, cfg: LazyRunConfig, model: nn.Module) -> Optimizer:
        """Return ``optimizer`` of the model, with ``train.clip_gradients``."""
        node = cfg.lazy.optimizer
        node.params.model = model
        try:
            optimizer = instantiate(node)
        finally:
            del node.params["model"]
        return maybe_add_gradient_clipping(cfg, optimizer)

    @classmethod
    def build_lr_scheduler(cls, cfg: LazyRunConfig, optimizer: Optimizer) -> Any:
        """Return the schedule that ``lr_multiplier`` makes of the optimizer's learning rates."""
        schedule = instantiate(cfg.lazy.lr_multiplier)
        if isinstance(schedule, ParamScheduler):
            return LRMultiplier(optimizer, schedule, cfg.SOLVER.MAX_ITER)
        return schedule

    build_train_loader = staticmethod(build_train_loader)

    @classmethod
    def build_test_loader(cls, cfg: LazyRunConfig, dataset_name: str) -> Iterable[Any]:
        """Return the loader of ``dataloader.test`` for one of its data sets."""
        return build_test_loader(_dataloader_of(cfg, dataset_name).test)

    @classmethod
    def build_evaluator(
        cls, cfg: LazyRunConfig, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Return ``dataloader.evaluator`` for one of the data sets."""
        folder = [dataset_name] if len(cfg.DATASETS.TEST) > 1 else []
        output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", *folder)
        node = _dataloader_of(cfg, dataset_name).evaluator
        return build_evaluator(cfg, dataset_name, node, output_folder)


def _dataloader_of(cfg: LazyRunConfig, dataset_name: str) -> DictConfig:
    """Return ``dataloader`` with one data set to test, whose name the evaluators refer to."""
    dataloader = copy.deepcopy(cfg.lazy.dataloader)
    if OmegaConf.select(dataloader, "test.dataset.names") is not None:
        dataloader.test.dataset.names = dataset_name
    return dataloader
