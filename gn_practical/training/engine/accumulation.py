"""One optimizer step from several backward passes, for a GPU that holds a part of the batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def backward_in_parts(
    model: nn.Module,
    data: Sequence[Any],
    steps: int,
    losses_of: Callable[[Sequence[Any]], dict[str, Tensor]],
    backward: Callable[[Tensor], None],
) -> dict[str, Tensor]:
    """Add up the gradients of the mean loss over equal parts of a batch.

    They are those of the whole batch, up to rounding, for a model whose losses are means over its
    images and whose norms do not look at other images, as group norms do not. Under data
    parallelism the ranks exchange gradients once, in the last part.

    Args:
        model: as trained, with its gradients set to zero.
        data: batch of this rank, in slices of which the parts are.
        steps: number of parts; 1 for the batch as it is.
        losses_of: runs the model on a part, forward.
        backward: of a scalar.

    Returns:
        The losses, each the mean over the parts.

    Raises:
        ValueError: for a batch that has no such parts.
    """
    if steps == 1:
        losses = losses_of(data)
        backward(sum(losses.values()))
        return losses
    total: dict[str, Tensor] = {}
    for number, part in enumerate(split_batch(data, steps), start=1):
        with nullcontext() if number == steps else without_exchange(model):
            losses = {name: loss / steps for name, loss in losses_of(part).items()}
            backward(sum(losses.values()))
        for name, loss in losses.items():
            total[name] = total.get(name, 0) + loss.detach()
    return total


def split_batch(data: Sequence[Any], parts: int) -> Iterator[Sequence[Any]]:
    """Return equal slices of a batch, in order: of a list, or whatever has length and slices.

    Raises:
        ValueError: for a number of samples that is no multiple of ``parts``.

    Example:
        >>> list(split_batch([1, 2, 3, 4], 2))
        [[1, 2], [3, 4]]
    """
    size, rest = divmod(len(data), parts)
    if rest or not size:
        raise ValueError(
            "a rank's batch must be a multiple of SOLVER.ACCUMULATE_STEPS, got "
            f"{len(data)} images and SOLVER.ACCUMULATE_STEPS={parts}. Correct it or "
            "SOLVER.IMS_PER_BATCH."
        )
    return (data[number * size : (number + 1) * size] for number in range(parts))


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the gradients of the ranks stay their own."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def scaling_world_size(cfg: CfgNode) -> int:
    """Return for how many ranks ``SOLVER.REFERENCE_WORLD_SIZE`` scales: a part counts as a rank.

    So one GPU with ``SOLVER.ACCUMULATE_STEPS`` 8 trains a recipe for 8 GPUs as they do, with its
    batch, learning rate and iterations.

    Raises:
        ValueError: if there is not at least one part.
    """
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    if steps < 1:
        raise ValueError(
            "SOLVER.ACCUMULATE_STEPS must be 1 or more, got SOLVER.ACCUMULATE_STEPS="
            f"{steps}. Set it to 1 for none."
        )
    return comm.get_world_size() * steps


def check_accumulation(cfg: CfgNode) -> None:
    """Raise a ValueError, with what to do, unless each rank's batch, scaled, has equal parts."""
    parts = scaling_world_size(cfg)
    if cfg.SOLVER.IMS_PER_BATCH % parts:
        raise ValueError(
            "SOLVER.IMS_PER_BATCH must be a multiple of the ranks times SOLVER.ACCUMULATE_STEPS, "
            f"got SOLVER.IMS_PER_BATCH={cfg.SOLVER.IMS_PER_BATCH} for {comm.get_world_size()} x "
            f"{cfg.SOLVER.ACCUMULATE_STEPS}. It is the batch of an optimizer step: correct one of "
            "them."
        )
