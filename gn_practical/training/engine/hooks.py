"""What a run does beside its steps."""

import logging
import math
import os
from contextlib import ExitStack
from typing import Any

from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_practical.analysis.recorder import BlockRecorder
from gn_practical.training.checkpoint.checkpointer import BEST, GroupsCheckpointer
from gn_practical.training.config.node import look_up
from gn_practical.training.data import SkippedSamples
from gn_practical.training.evaluation import plot_metrics

_logger = logging.getLogger(__name__)


class CountSkippedSamples(HookBase):
    """Logs as ``skipped_samples`` how many images the mappers have listed; on the main rank."""

    def __init__(self, samples: SkippedSamples, period: int = 20) -> None:
        self.samples = samples
        self.period = period

    def before_train(self) -> None:
        """Remove the list of an earlier run, where training starts at 0."""
        if self.trainer.start_iter == 0:
            self.samples.forget()

    def after_step(self) -> None:
        """Log the count, once there is something to count."""
        if (self.trainer.iter + 1) % self.period == 0 and (count := len(self.samples.read())):
            get_event_storage().put_scalar("skipped_samples", count, smoothing_hint=False)


def name_unread_keys(trainer: DefaultTrainer) -> None:
    """Warn after the first step of overrides of its ``RunConfig`` that nothing has read."""
    unread = trainer.cfg.unread_overrides() if trainer.iter == trainer.start_iter else ()
    if unread:
        _logger.warning(
            "Nothing in this run reads %s: without effect. Are they keys of this model and "
            "solver, or is what they belong to switched off?",
            ", ".join(f"{key}={look_up(trainer.cfg, key)}" for key in unread),
        )


class BestCheckpoint(HookBase):
    """Keeps the state with the highest value of a metric as ``model_best.pth``.

    Differences from Detectron2's ``BestCheckpointer``: the checkpoint to resume from stays the
    last one; the iteration saved is that of the last step, also after the final evaluation; and a
    resumed run remembers the best value.

    Put it behind the hook that evaluates, on the main rank. Metrics are named as in
    ``metrics.json``: "bbox/AP"; with several test sets their name comes first: "my_val/bbox/AP".
    """

    def __init__(self, checkpointer: GroupsCheckpointer, metric: str, eval_period: int) -> None:
        self._checkpointer, self._metric, self._period = checkpointer, metric, eval_period
        self._best, self._compared = -math.inf, -1

    def before_train(self) -> None:
        """Read the best value of the run that is resumed."""
        best = self._checkpointer.read_best() if self.trainer.start_iter > 0 else {}
        if best.get("metric") == self._metric:
            self._best = best["value"]

    def after_step(self) -> None:
        """Compare, if this step ended in an evaluation."""
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._compare()

    def after_train(self) -> None:
        """Compare the final evaluation's value, if training was not broken off."""
        counted = self.trainer.iter
        if counted + 1 >= self.trainer.max_iter:
            # The loop counts one further at its end; the state is that of the last step.
            self.trainer.iter = self.trainer.max_iter - 1
            self._compare()
            self.trainer.iter = counted

    def _compare(self) -> None:
        latest: dict[str, Any] = self.trainer.storage.latest()
        value, evaluated = latest.get(self._metric, (math.nan, None))
        if evaluated is None:
            known = ", ".join(sorted(name for name in latest if "/AP" in name or "Q" in name))
            _logger.warning(
                "TEST.BEST_METRIC must be a result of the evaluation, got %s. There are: %s. "
                "No best checkpoint is kept.",
                *(self._metric, known or "none"),
            )
        elif evaluated != self._compared and value > self._best:
            self._best, iteration = float(value), self.trainer.iter
            best = {"metric": self._metric, "value": self._best}
            self._checkpointer.save(BEST, iteration=iteration, best=best)
            _logger.info("Best %s so far: %.3f after iteration %d", self._metric, value, iteration)
        self._compared = evaluated


class IsometryHook(HookBase):
    """Logs A, B, C and K of every unit block as ``isometry/<K>/<layer>``, every few iterations.

    See :mod:`gn_practical.analysis.audit` for what they are. Between these iterations nothing is
    attached to the model. ``SOLVER.AUDIT_PERIOD`` adds this hook on the main rank.

    Raises:
        ValueError: for a period that is no positive integer; when training begins, for a model
            without group norms.
    """

    def __init__(self, period: int) -> None:
        if not isinstance(period, int) or period < 1:
            raise ValueError(
                f"period must be a positive integer, got period={period!r}. Set "
                "SOLVER.AUDIT_PERIOD to a number of iterations, or 0 for no measurement."
            )
        self.period = period
        self._recorder: BlockRecorder | None = None
        self._attached = ExitStack()

    def before_train(self) -> None:
        """Fail early for a model that has nothing to measure."""
        BlockRecorder(self._model())

    def before_step(self) -> None:
        """Attach the recorder where it is time."""
        if (self.trainer.iter + 1) % self.period == 0:
            self._recorder = BlockRecorder(self._model(), strict=False)
            self._attached.enter_context(self._recorder)

    def after_step(self) -> None:
        """Detach it and log what it measured, without values that are not finite."""
        self._attached.close()
        recorder, self._recorder = self._recorder, None
        for layer, ratios in recorder.ratios().items() if recorder else ():
            for name, value in ratios.items():
                if math.isfinite(value):
                    get_event_storage().put_scalar(
                        f"isometry/{name}/{layer}", value, smoothing_hint=False
                    )

    def after_train(self) -> None:
        """Detach it if a step failed."""
        self._attached.close()

    def _model(self) -> nn.Module:
        model = self.trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model


def draw_curves(trainer: DefaultTrainer) -> None:
    """Draw ``curves.png`` from ``metrics.json``; a failure does not hide what ended training."""
    path = os.path.join(trainer.cfg.OUTPUT_DIR, "curves.png")
    try:
        plot_metrics(os.path.join(trainer.cfg.OUTPUT_DIR, "metrics.json"), path)
    except Exception as error:
        _logger.warning("The curves could not be drawn: %s", error)
    else:
        _logger.info("Curves of losses and metrics: %s", path)
