"""Training steps in mixed precision, on CUDA and on the CPU."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class AutocastTrainer(SimpleTrainer):
    """A ``SimpleTrainer`` whose forward pass runs under autocast.

    Detectron2's ``AMPTrainer`` asserts CUDA and always scales the loss; this one takes the device
    of the model and scales the loss for float16 alone.

    Args:
        model: returns a dict of losses.
        data_loader: infinite, as ``build_detection_train_loader`` makes it.
        optimizer: of the model's parameters.
        dtype: "float16" or "bfloat16".
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        dtype: str,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device.type
        self.dtype = DTYPES[dtype]
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)

    def run_step(self) -> None:
        """Compute the losses under autocast, then step in the precision of the parameters."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self.device, self.dtype):
            loss_dict = self.model(data)
            loss = sum(loss_dict.values())
        self.optimizer.zero_grad()
        self.grad_scaler.scale(loss).backward()
        self.after_backward()
        self._write_metrics(loss_dict, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and the loss scale."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict.get("grad_scaler", {}))
