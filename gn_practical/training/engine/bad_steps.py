"""Steps whose loss or gradient is not finite: left out or the end, with what led to them."""

import json
import logging
import os
from collections.abc import Iterable
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from gn_practical.training.checkpoint.files import LAST
from gn_practical.training.checkpoint.finite_weights import all_finite

_MOST_NAMES = 20  # parameters and images that are named; where all are bad, more say nothing


class BadSteps:
    """Counts the steps left out for a loss or gradient that is not finite, and stops in time.

    Each is one line of JSON in ``OUTPUT_DIR/bad_steps.json``: iteration, count, last checkpoint,
    the parameters whose gradient is not finite, and the losses and images of every rank.

    Args:
        output_dir: folder of the file and of the checkpoints; no file if empty.
        max_skipped: bad steps of a run, resumed or not, that are left out; the next one is an
            error. They are counted in total: a few hard batches among thousands do no harm, and
            weights that are beyond repair reach any number at once.
    """

    def __init__(self, output_dir: str = "", max_skipped: int = 0) -> None:
        self.output_dir = output_dir
        self.max_skipped = max_skipped
        self.skipped = 0

    def add(self, step: dict[str, Any]) -> None:
        """Keep a bad step, as :func:`describe_step` describes it; every rank must call this.

        Raises:
            FloatingPointError: if it is one too many; with the losses, the images and what to do.
        """
        self.skipped += 1
        last = Path(self.output_dir, LAST)
        checkpoint = last.read_text().strip() if self.output_dir and last.is_file() else ""
        step = {**step, "skipped_steps": self.skipped, "checkpoint": checkpoint}
        if self.output_dir and comm.is_main_process():
            with open(os.path.join(self.output_dir, "bad_steps.json"), "a") as file:
                file.write(json.dumps(step) + "\n")
        text = f"the losses and gradients of a step must be finite, got {_words(step)}."
        if self.skipped > self.max_skipped:
            left_out = f" after {self.max_skipped} steps left out" if self.max_skipped else ""
            raise FloatingPointError(
                f"{text} Training stopped{left_out} with the weights before that step; the last "
                f"checkpoint is {checkpoint or 'none'}, and bad_steps.json holds the losses and "
                "images. Look at these images, lower SOLVER.BASE_LR, add "
                "SOLVER.CLIP_GRADIENTS.ENABLED True, or leave out more such steps with "
                "SOLVER.MAX_SKIPPED_STEPS."
            )
        logging.getLogger(__name__).warning(
            "%s The step is left out, as number %d of SOLVER.MAX_SKIPPED_STEPS=%d.",
            *(text, self.skipped, self.max_skipped),
        )


def _words(step: dict[str, Any]) -> str:
    losses = [loss for rank in step["ranks"] for loss in rank["losses"].items()]
    bad = {name: value for name, value in losses if isinstance(value, str)}
    what = ", ".join(f"{name}={value}" for name, value in bad.items())
    what = what or f"the gradient of {', '.join(step['gradients'][:3])}"
    images = [str(image["file_name"]) for rank in step["ranks"] for image in rank["images"]]
    shown = ", ".join(images[:_MOST_NAMES]) + (" ..." if len(images) > _MOST_NAMES else "")
    return f"{what} at iteration={step['iteration']} on {shown or 'unnamed images'}"


def gradients_are_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all gradients are finite.

    Under data parallelism gradients are averaged before, so all ranks get the same answer. On CUDA
    this waits for the backward pass, as the writing of the losses does otherwise.
    """
    return all_finite(
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )


def describe_step(
    iteration: int, model: nn.Module, losses: dict[str, Tensor], data: Iterable[Any]
) -> dict[str, Any]:
    """Describe a step for :class:`BadSteps`; every rank must call it, with its losses and data."""
    values = {name: loss.item() for name, loss in losses.items()}
    mine = {
        "losses": {name: v if isfinite(v) else str(v) for name, v in values.items()},
        "images": [{key: sample.get(key) for key in ("image_id", "file_name")} for sample in data],
    }
    bad = (
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    )
    names = list(islice(bad, _MOST_NAMES))
    return {"iteration": iteration, "gradients": names, "ranks": comm.all_gather(mine)}


def losses_are_finite(step: dict[str, Any]) -> bool:
    """Whether the losses of all ranks are finite in what :func:`describe_step` returned."""
    return not any(isinstance(v, str) for rank in step["ranks"] for v in rank["losses"].values())
