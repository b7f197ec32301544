"""Non-maximum suppression of each class by itself, in graphs as in PyTorch.

While it traces, torchvision takes all classes at once, each moved aside by more than the picture is
wide. Of 80 classes the boxes then lie at 100,000 pixels, where float32 knows 1/128 of a pixel, and
one picture in 20 kept another box. What PyTorch runs has no such limit, so neither have exports.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).min
_ALL = torch.iinfo(torch.int64).max


@contextmanager
def suppressing_by(run: Callable[..., Tensor]) -> Iterator[None]:
    """Let torchvision's ``batched_nms`` be another function, for the time of a trace.

    Args:
        run: :func:`by_class_in_onnx` or :func:`by_class_in_torchscript`.
    """
    with patch.object(torchvision.ops.boxes, "batched_nms", run):
        yield


def by_class_in_onnx(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Return what is kept, the best first, by ONNX's operator, which takes classes apart."""
    count = torch.cat([idxs, idxs.new_zeros(1)]).max() + 1
    is_of_class = torch.arange(count)[:, None] == idxs[None]
    by_class = torch.where(is_of_class, scores[None], torch.full_like(scores, -torch.inf)[None])
    kept = _Suppression.apply(boxes[None], by_class[None], iou_threshold)[:, 2].sort()[0]
    return kept[scores[kept].sort(descending=True)[1]]


@torch.jit.script_if_tracing
def by_class_in_torchscript(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float
) -> Tensor:
    """Return what is kept, the best first, by a loop over classes."""
    is_kept = torch.zeros_like(scores, dtype=torch.bool)
    for each in torch.unique(idxs):
        (of_class,) = torch.where(idxs == each)
        kept = torch.ops.torchvision.nms(boxes[of_class], scores[of_class], iou_threshold)
        is_kept[of_class[kept]] = True
    kept = torch.where(is_kept)[0]
    return kept[scores[kept].sort(descending=True)[1]]


class _Suppression(torch.autograd.Function):
    """ONNX's NonMaxSuppression: rows of (picture, class, box)."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        # Runs while a graph is traced, which needs some rows of the right type and no more.
        kept = torchvision.ops.nms(boxes[0], scores[0].amax(0), iou_threshold)
        zeros = torch.zeros_like(kept)
        return torch.stack([zeros, zeros, kept], dim=1)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, iou_threshold: float) -> Any:
        most = g.op("Constant", value_t=torch.tensor([_ALL]))
        limits = (g.op("Constant", value_t=torch.tensor([v])) for v in (iou_threshold, _LOWEST))
        return g.op("NonMaxSuppression", boxes, scores, most, *limits)
