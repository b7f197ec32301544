"""Training steps in any precision, on CUDA and on the CPU, that leave out what is not finite."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from gn_practical.training.engine.accumulation import backward_in_parts
from gn_practical.training.engine.bad_steps import (
    BadSteps,
    describe_step,
    gradients_are_finite,
    losses_are_finite,
)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AutocastTrainer(SimpleTrainer):
    """A ``SimpleTrainer`` with autocast on any device, and without steps that are not finite.

    Detectron2's ``AMPTrainer`` asserts CUDA and always scales the loss; this one scales it for
    float16 alone. Detectron2's trainers look at the losses alone, on the main rank, where the
    others would wait for ever; this one looks at the gradients too, and all ranks decide alike. Of
    a bad step no weight, momentum or running statistic stays.

    Args:
        model: returns a dict of losses; ``data_loader`` is infinite.
        dtype: "float16" or "bfloat16"; None for the precision of the parameters.
        bad_steps: what becomes of them; by default the first one is an error.
        accumulate_steps: parts of a batch that run one after another, see
            :func:`~gn_practical.training.engine.accumulation.backward_in_parts`.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        dtype: str | None = None,
        bad_steps: BadSteps | None = None,
        accumulate_steps: int = 1,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device.type
        self.dtype = DTYPES[dtype] if dtype else None
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)
        self.bad_steps = bad_steps or BadSteps()
        self.accumulate_steps = accumulate_steps
        self._batches: Iterator[Any] | None = None  # made when the first step asks
        self._statistics = _running_statistics(model) if self.bad_steps.max_skipped else []
        self._statistics_before = [statistic.clone() for statistic in self._statistics]

    def run_step(self) -> None:
        """Compute the losses under autocast, then step in the precision of the parameters."""
        start = time.perf_counter()
        data = self._next_batch()
        data_time = time.perf_counter() - start
        _copy(self._statistics, self._statistics_before)
        self.optimizer.zero_grad()
        loss_dict = self._losses_and_gradients(data)
        self.after_backward()
        if gradients_are_finite(self.optimizer) or not self._is_bad(loss_dict, data):
            self.write_metrics(loss_dict, data_time, self.iter)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        self._write_counts()

    def rehearse(self) -> None:
        """Run the next step up to its gradients, and forget all but how the ranks exchange them.

        ``DistributedDataParallel`` arranges gradients anew for exchange after its first backward
        pass. Where a number stands decides in which order three ranks or more add it up, and so
        its last bit. After a rehearsal a resumed run adds up as the one that went on.
        """
        data = self._next_batch()
        self._batches = itertools.chain([data], self._batches)
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        with EventStorage(self.iter):
            self._losses_and_gradients(data)
        _copy(before, buffers)
        self.optimizer.zero_grad()

    def _next_batch(self) -> Any:
        if self._batches is None:
            self._batches = iter(self.data_loader)
        return next(self._batches)

    def _losses_and_gradients(self, data: Any) -> dict[str, Tensor]:
        return backward_in_parts(
            self.model, data, self.accumulate_steps, self._losses, self._backward
        )

    def _losses(self, data: Any) -> dict[str, Tensor]:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            return self.model(data)

    def _backward(self, loss: Tensor) -> None:
        # The factor is 1, or NaN where the loss is not finite: then the gradients are NaN too,
        # on every rank once they are averaged, and no rank needs to be told.
        self.grad_scaler.scale(loss * (1 + 0 * loss.detach())).backward()

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Replace the data loader, and end the workers of the one before."""
        self._batches = None
        super().reset_data_loader(data_loader_builder)

    def _is_bad(self, loss_dict: dict[str, Tensor], data: Iterable[Any]) -> bool:
        """Undo and keep the step; unless the loss was scaled too far, which the scaler undoes."""
        step = describe_step(self.iter, self.model, loss_dict, data)
        if losses_are_finite(step) and self.grad_scaler.get_scale() > 1:
            return False
        _copy(self._statistics_before, self._statistics)
        self.bad_steps.add(step)
        return True

    def _write_counts(self) -> None:
        storage = get_event_storage()
        if self.bad_steps.skipped:
            storage.put_scalar("skipped_steps", self.bad_steps.skipped, smoothing_hint=False)
        if self.grad_scaler.is_enabled():
            storage.put_scalar("grad_scale", self.grad_scaler.get_scale(), smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, the loss scale and the count of bad steps."""
        return {
            **super().state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "skipped_steps": self.bad_steps.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or the trainers of Detectron2."""
        super().load_state_dict(state_dict)
        self.bad_steps.skipped = state_dict.get("skipped_steps", 0)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """The forward pass alone changes these, so leaving out the optimizer's step is not enough."""
    return [
        buffer
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
        for buffer in module.buffers()
        if buffer.is_floating_point()
    ]


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for value, place in zip(source, target, strict=True):
        place.copy_(value)
