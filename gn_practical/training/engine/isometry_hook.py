"""The isometry of a model while it trains: gradient variance ratios in TensorBoard."""

from math import isfinite

from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_practical.analysis.recorder import BlockRecorder


class IsometryHook(HookBase):
    """Logs A, B, C and K of every unit block as ``isometry/<K>/<layer>``, every few iterations.

    See :mod:`gn_practical.analysis.audit` for what they are. Between these iterations nothing is
    attached to the model. ``SOLVER.AUDIT_PERIOD`` adds this hook on the main rank.

    Args:
        period: iterations from one measurement to the next.

    Raises:
        ValueError: for a period that is no positive integer; when training begins, for a model
            without group norms.

    Example:
        >>> hook = IsometryHook(period=100)
    """

    def __init__(self, period: int) -> None:
        if not isinstance(period, int) or period < 1:
            raise ValueError(
                f"period must be a positive integer, got period={period!r}. Set "
                "SOLVER.AUDIT_PERIOD to a number of iterations, or 0 for no measurement."
            )
        self.period = period
        self._recorder: BlockRecorder | None = None

    def before_train(self) -> None:
        """Fail early for a model that has nothing to measure."""
        BlockRecorder(self._model())

    def before_step(self) -> None:
        """Attach the recorder where it is time."""
        if (self.trainer.iter + 1) % self.period == 0:
            self._recorder = BlockRecorder(self._model(), strict=False)
            self._recorder.__enter__()

    def after_step(self) -> None:
        """Detach it and log what it measured, without values that are not finite."""
        recorder = self._detach()
        if recorder is None:
            return
        storage = get_event_storage()
        for layer, ratios in recorder.ratios().items():
            for name, value in ratios.items():
                if isfinite(value):
                    storage.put_scalar(f"isometry/{name}/{layer}", value, smoothing_hint=False)

    def after_train(self) -> None:
        """Detach it if a step failed."""
        self._detach()

    def _detach(self) -> BlockRecorder | None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(None, None, None)
        return recorder

    def _model(self) -> nn.Module:
        model = self.trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model
