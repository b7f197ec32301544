"""``Trainer``: Detectron2's ``DefaultTrainer`` with PGN models, PQ and AP, on CUDA and the CPU."""

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import CallbackHook, EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from gn_practical.atomic import write_json
from gn_practical.modeling import build_model, group_norm_bindings
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config.node import RunConfig
from gn_practical.training.data import CheckedDatasetMapper, skipped_samples
from gn_practical.training.data.loader import build_train_loader
from gn_practical.training.data.seeding import run_seed
from gn_practical.training.detectron2_internals import bound_histories
from gn_practical.training.engine import hooks
from gn_practical.training.engine.accumulation import check_accumulation, scaling_world_size
from gn_practical.training.engine.autocast import AutocastTrainer
from gn_practical.training.engine.bad_steps import BadSteps
from gn_practical.training.engine.checks import check_model
from gn_practical.training.engine.events import SteadyWriter, forget_metrics
from gn_practical.training.engine.signals import EXIT_INTERRUPTED, STOP, Agreement, Interrupted
from gn_practical.training.engine.summary import describe_run
from gn_practical.training.engine.training_state import TrainingState
from gn_practical.training.evaluation import build_evaluator, results_table, write_results

_logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for models with "PGN" norms.

    What it adds: models from :func:`gn_practical.build_model`, with their table of groups in
    ``OUTPUT_DIR/num_groups.json``; checkpoints that know their groups; mixed precision in float16
    and bfloat16; training on CPU ranks; the evaluators of :mod:`gn_practical.training.evaluation`,
    their table, ``results.json`` and pictures; curves when training ends.

    Args:
        cfg: a config with the keys of :func:`gn_practical.add_pgn_config` and
            :func:`gn_practical.training.add_training_config`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # As DefaultTrainer's own, which cannot be called: it passes a device index to
        # DistributedDataParallel on the CPU too, and knows one kind of mixed precision.
        TrainerBase.__init__(self)
        if isinstance(cfg, RunConfig):
            cfg.forget_reads()
        cfg = self.auto_scale_workers(cfg, scaling_world_size(cfg))
        check_accumulation(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = self.distribute(cfg, model)
        dtype = cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None
        bad_steps = BadSteps(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_SKIPPED_STEPS)
        steps = cfg.SOLVER.ACCUMULATE_STEPS
        self._trainer = AutocastTrainer(model, data_loader, optimizer, dtype, bad_steps, steps)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.state = TrainingState(run_seed(cfg), data_loader)
        self.checkpointer = GroupsCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            cfg=cfg,
            keep_last=cfg.SOLVER.CHECKPOINT_KEEP_LAST,
            trainer=weakref.proxy(self),
            training_state=self.state,
        )
        self.checkpointer.copy_beside(optimizer)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        _logger.info(describe_run(cfg, self._trainer.model, data_loader))
        STOP.check()

    def build_hooks(self) -> list[HookBase | None]:
        """Return Detectron2's hooks, evaluation with augmentation where asked, and curves."""
        cfg, built = self.cfg, super().build_hooks()
        if cfg.TEST.AUG.ENABLED:
            built.append(EvalHook(0, lambda: self.test_with_tta(cfg, self.model)))
        if comm.is_main_process():
            if cfg.TEST.BEST_METRIC:
                best = (cfg.TEST.BEST_METRIC, cfg.TEST.EVAL_PERIOD)
                built.append(hooks.BestCheckpoint(self.checkpointer, *best))
            built.append(CallbackHook(after_train=hooks.draw_curves))
            if isinstance(cfg, RunConfig):
                built.append(CallbackHook(after_step=hooks.name_unread_keys))
            if cfg.DATALOADER.MAX_SKIPPED_SAMPLES:
                # First, so that what it logs is there when the writers write.
                built.insert(0, hooks.CountSkippedSamples(skipped_samples(cfg)))
            if cfg.SOLVER.AUDIT_PERIOD:
                built.insert(0, hooks.IsometryHook(cfg.SOLVER.AUDIT_PERIOD))
        return built

    def before_train(self) -> None:
        """Run the hooks, with a storage that forgets.

        Detectron2 keeps a million values of each scalar, 100 bytes a value, and looks at 20 of
        them; the writers write them all.
        """
        bound_histories(self.storage, 1000)
        super().before_train()

    def build_writers(self) -> list[EventWriter]:
        """Return Detectron2's writers, which cannot end the training here."""
        return [SteadyWriter(writer) for writer in super().build_writers()]

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint of ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS``."""
        super().resume_or_load(resume)
        if self.start_iter:
            self.state.warn_if_fresh()
            if comm.is_main_process():
                forget_metrics(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)
        STOP.check()

    def train(self) -> dict[str, Any] | None:
        """Train; stop after a step if a signal asks for it, with a checkpoint of it.

        Raises:
            Interrupted: if it was stopped.
        """
        with STOP.handled():
            self._agreement = Agreement()
            try:
                results = super().train()
            except Exception as error:
                if self.iter > self.start_iter:  # its keys have been seen to work
                    error.is_for_config = getattr(error, "is_for_config", False)
                raise
            finally:
                self._trainer.reset_data_loader(lambda: self.state.loader)  # ends its workers
            self._agreement.finish()
            self.checkpointer.wait()
            _logger.info("Done: checkpoints, metrics and curves are in %s.", self.cfg.OUTPUT_DIR)
            return results

    def run_step(self) -> None:
        """Run a step, with random numbers that follow from the iteration."""
        self.state.begin_step(self.iter)
        if self.iter == self.start_iter > 0 and comm.get_world_size() > 2:
            self._trainer.rehearse()
            self.state.begin_step(self.iter)
        super().run_step()

    def after_step(self) -> None:
        """Run the hooks, and stop here if a signal has asked for it.

        An evaluation is left between two batches: it can be redone. The other ranks may still be
        in it, so that they are not waited for.
        """
        try:
            super().after_step()
        except Interrupted:
            self._save_and_say_so()
            raise
        if self._agreement.stop(bool(STOP.received)) and self.iter + 1 < self.max_iter:
            self._save_and_say_so()
            comm.synchronize()  # a launcher ends the other ranks as soon as one has ended
            raise Interrupted

    def _save_and_say_so(self) -> None:
        STOP.ignore()
        if (self.iter + 1) % self.cfg.SOLVER.CHECKPOINT_PERIOD:  # else it has been saved
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        self.checkpointer.wait()
        _logger.warning(
            "Stopped by %s after iteration %d. --resume goes on from there; exit code %d.",
            *(STOP.received.name if STOP.received else "a signal to another rank", self.iter),
            EXIT_INTERRUPTED,
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model and save its table of groups beside the checkpoints to come."""
        STOP.check()
        model = cls.construct_model(cfg)
        check_model(cfg, model)
        if comm.is_main_process():
            table = [asdict(binding) for binding in group_norm_bindings(model)]
            write_json(os.path.join(cfg.OUTPUT_DIR, "num_groups.json"), table, indent=1)
        STOP.check()
        return model

    @classmethod
    def construct_model(cls, cfg: CfgNode) -> nn.Module:
        """Return a new model, with its norms bound."""
        return build_model(cfg)

    @classmethod
    def distribute(cls, cfg: CfgNode, model: nn.Module, **options: Any) -> nn.Module:
        """Wrap the model for data parallelism where there are several ranks, on CPUs too."""
        if not cfg.MODEL.DEVICE.startswith("cuda"):
            options["device_ids"] = None
        return create_ddp_model(model, **{"broadcast_buffers": False, **options})

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Return a loader that a checkpoint can position, with errors that name the file."""
        return build_train_loader(cfg, CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        """Return Detectron2's loader, with errors that name the file."""
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    build_evaluator = staticmethod(build_evaluator)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on ``cfg.DATASETS.TEST``, log one table and write ``results.json``.

        Raises:
            Interrupted: between two batches, if a signal asks for it.
        """
        results = cls._test(cfg, model, evaluators)
        if comm.is_main_process() and results:
            path = os.path.join(cfg.OUTPUT_DIR, "results.json")
            write_results(results, path)
            _logger.info("Results (%s):\n%s", path, results_table(results))
        return results

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, as ``TEST.AUG`` says; R-CNN models only."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls._test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict({f"{key}_TTA": value for key, value in results.items()})

    @classmethod
    def _test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None
    ) -> dict[str, Any]:
        STOP.check()
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        try:
            return super().test(cfg, model, [[_StopCheck(), each] for each in evaluators])
        except Exception as error:
            if STOP.received:  # another rank has left
                raise Interrupted from error
            if not isinstance(error, OSError):  # a full disk is no value of the config
                error.is_for_config = True
            raise


class _StopCheck(DatasetEvaluator):
    """Leaves an evaluation between two batches, and before their results are counted."""

    def process(self, inputs: Any, outputs: Any) -> None:
        STOP.check()

    def evaluate(self) -> None:
        STOP.check()
