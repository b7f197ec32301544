"""Keeping the best checkpoint of a training."""

import logging
import math
from typing import Any

from detectron2.engine import HookBase

from gn_practical.training.checkpoint.checkpointer import BEST, GroupsCheckpointer


class BestCheckpoint(HookBase):
    """Keeps the state with the highest value of a metric as ``model_best.pth``.

    Differences from Detectron2's ``BestCheckpointer``: the checkpoint to resume from stays the
    last one; the iteration saved is that of the last step, also after the final evaluation; and a
    resumed run remembers the best value.

    Put it behind the hook that evaluates, on the main rank.

    Args:
        checkpointer: saves.
        metric: as in ``metrics.json``: "panoptic_seg/PQ", "bbox/AP"; with several test sets their
            name comes first: "my_val/bbox/AP".
        eval_period: iterations between two evaluations, ``TEST.EVAL_PERIOD``.
    """

    def __init__(self, checkpointer: GroupsCheckpointer, metric: str, eval_period: int) -> None:
        self._checkpointer, self._metric, self._period = checkpointer, metric, eval_period
        self._best, self._compared = -math.inf, -1

    def before_train(self) -> None:
        """Read the best value of the run that is resumed."""
        if self.trainer.start_iter > 0:
            best = self._checkpointer.read_best()
            if best.get("metric") == self._metric:
                self._best = best["value"]

    def after_step(self) -> None:
        """Compare, if this step ended in an evaluation."""
        evaluated = self._period > 0 and (self.trainer.iter + 1) % self._period == 0
        if evaluated and self.trainer.iter + 1 != self.trainer.max_iter:
            self._compare()

    def after_train(self) -> None:
        """Compare the final evaluation's value, if training was not broken off."""
        counted = self.trainer.iter
        if counted + 1 < self.trainer.max_iter:
            return
        # The loop counts one further at its end; the state is that of the last step.
        self.trainer.iter = self.trainer.max_iter - 1
        self._compare()
        self.trainer.iter = counted

    def _compare(self) -> None:
        latest: dict[str, Any] = self.trainer.storage.latest()
        value, evaluated = latest.get(self._metric, (math.nan, None))
        if evaluated is None:
            known = ", ".join(sorted(name for name in latest if "/AP" in name or "Q" in name))
            logging.getLogger(__name__).warning(
                "TEST.BEST_METRIC must be a result of the evaluation, got %s. There are: %s. "
                "No best checkpoint is kept.",
                *(self._metric, known or "none"),
            )
        elif evaluated != self._compared and value > self._best:
            self._best, iteration = float(value), self.trainer.iter
            best = {"metric": self._metric, "value": self._best}
            self._checkpointer.save(BEST, iteration=iteration, best=best)
            logging.getLogger(__name__).info(
                "Best %s so far: %.3f after iteration %d", self._metric, value, iteration
            )
        self._compared = evaluated
