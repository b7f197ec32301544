"""An exponential moving average of the weights, evaluated and saved beside them."""

from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AverageWeights(HookBase):
    """Keeps the average that each step moves by ``1 - decay`` towards the weights.

    It begins with the weights after the first step, and takes running statistics as it takes
    weights. Put it before the hook that saves checkpoints, and its ``average`` into them as "ema":
    then a resumed run has the average of one that was never stopped.

    Args:
        model: as trained, wrapped for data parallelism or not.
        decay: share of the average that stays in a step, below 1.

    Attributes:
        average: the averaged model is its ``module``.

    Example:
        >>> import torch
        >>> hook = AverageWeights(torch.nn.Linear(2, 2), decay=0.999)
        >>> hook.average.module
        Linear(in_features=2, out_features=2, bias=True)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = plain(model)
        update = get_ema_multi_avg_fn(decay)
        self.average = AveragedModel(self._model, multi_avg_fn=update, use_buffers=True)
        self.average.requires_grad_(False)

    def after_step(self) -> None:
        """Move the average."""
        self.average.update_parameters(self._model)


def plain(model: nn.Module) -> nn.Module:
    """Return a model without its wrapper for data parallelism."""
    return model.module if isinstance(model, DistributedDataParallel) else model
