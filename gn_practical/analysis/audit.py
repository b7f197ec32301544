"""Measure what every unit block of a network does to the gradient, for any choice of groups.

A unit block is weight layer, group normalization, activation: u → x → y → z. With V(t) the mean
of (dL/dt)² over all values of t, four ratios are measured, as in Eqs. A to D of the paper:

    A = V(u) / V(x)   the weight layer
    B = V(x) / V(y)   the normalization
    C = V(y) / V(z)   the activation
    K = V(u) / V(z)   the block (the paper's D), K = A B C

V(u) counts the gradient that flows through this block's weight layer alone, not its sum at a tensor
that others use as well; V(z) is the whole gradient at the block's output. Where no activation acts
directly on the norm's output the block ends with the norm: z is y, C is 1. docs/audit.md.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from gn_practical.analysis.blocks import UnitBlock, choose_groups, find_unit_blocks
from gn_practical.analysis.recorder import BlockAudit, BlockRecorder

LossFunction = Callable[[nn.Module, Any], Tensor]


def audit_isometry(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    groups: Sequence[str | int] = ("model",),
    seed: int = 0,
    progress: bool = False,
) -> list[BlockAudit]:
    """Measure A, B, C and K of every unit block of a model, for each choice of groups.

    Every choice runs the same weights on the same batches with the same random numbers, forward
    and backward; groups, gradients, buffers and the random state are restored afterwards. The mode
    (train or eval) is left as it is.

    Beside K stand two predictions that use nothing from the backward pass. ``K_paper`` is Eq. 31.
    ``K_exact`` is A B C with A = E[W²] times the connections for each input value, B = γ² / σ²
    times :func:`~gn_practical.analysis.exact_factor.convolution_factor` (second moment σ² and
    shared part as measured in the forward pass), and C the activation's backward gain.

    Args:
        model: any module with group norms, PGN ones bound.
        batches: what ``loss_fn`` takes, one batch at a time; for Detectron2's models lists of
            dicts with ground truth, and the model in training mode.
        loss_fn: maps (model, batch) to a scalar; by default ``model(batch)``, a dict of losses
            summed up.
        groups: choices, each "model" (as they are), or what
            :func:`~gn_practical.num_groups.resolve_num_groups` takes.
        seed: of the random numbers that the forward pass draws.
        progress: show a progress bar for each choice.

    Returns:
        A row for each choice and norm: in the order of the forward pass, then what did not run.

    Raises:
        ValueError: for a model without group norms, groups that do not divide, a group that holds
            a single value, no batch, or a loss without a gradient; naming the layers.
        FloatingPointError: for activations or gradients that are not finite; naming the layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.GroupNorm(4, 32), nn.ReLU())
        >>> v = torch.randn(32)
        >>> rows = audit_isometry(model, [torch.randn(8, 64)], lambda m, x: (m(x) * v).sum())
        >>> rows[0].layer, rows[0].activation, rows[0].K_paper
        ('1', 'relu', 0.75)
    """
    blocks = find_unit_blocks(model)
    choices = {str(choice): choose_groups(choice, blocks) for choice in groups}
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one batch, got none. Give one.")
    rows: list[BlockAudit] = []
    with _preserved(model, blocks):
        for choice, numbers in choices.items():
            for block, number in zip(blocks, numbers, strict=True):
                block.norm.num_groups = number
            torch.manual_seed(seed)
            with BlockRecorder(model) as recorder:
                for batch in tqdm(batches, f"groups: {choice}", disable=not progress, unit="batch"):
                    _backward(model, batch, loss_fn or _sum_of_losses)
            rows += recorder.rows(choice)
    return rows


@contextmanager
def _preserved(model: nn.Module, blocks: Sequence[UnitBlock]) -> Iterator[None]:
    """Restore groups, gradients, buffers and random state; give Detectron2 its event storage."""
    groups = [block.norm.num_groups for block in blocks]
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    gpus = {p.device for p, _ in gradients if p.is_cuda}
    with torch.random.fork_rng(gpus), EventStorage():
        try:
            yield
        finally:
            for block, number in zip(blocks, groups, strict=True):
                block.norm.num_groups = number
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for buffer, value in buffers:
                buffer.data.copy_(value)


def _backward(model: nn.Module, batch: Any, loss_fn: LossFunction) -> None:
    model.zero_grad()
    loss = loss_fn(model, batch)
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        got = "one that requires none" if got in ((), (1,)) else got
        raise ValueError(
            f"the loss must be a single number with a gradient, got {got} from "
            f"{type(model).__name__}. Run the model in training mode with ground truth, outside of "
            "no_grad, or give another loss_fn."
        )
    loss.backward()


def _sum_of_losses(model: nn.Module, batch: Any) -> Tensor:
    losses = model(batch)
    return sum(losses.values()) if isinstance(losses, dict) else losses
