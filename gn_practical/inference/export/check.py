"""An exported model beside the one it was made of: results and times."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from tabulate import tabulate
from torch import nn

from gn_practical.inference.export.agreement import Agreement, agreement
from gn_practical.inference.export.exact import predict_in_float64
from gn_practical.inference.export.network import Backbone, example_image, largest_stride
from gn_practical.inference.exported import ExportedModel

SCALES = (1.0, 0.75, 1.25)  # of the size at test time


@dataclass(frozen=True)
class Check:
    """Both models on one picture.

    Attributes:
        size: (height, width) that the models saw.
        agreement: of their results.
        seconds: median time of (PyTorch, the export).
    """

    size: tuple[int, int]
    agreement: Agreement
    seconds: tuple[float, float]


def inputs_of(pictures: Sequence[np.ndarray], cfg: CfgNode) -> Iterator[dict[str, Any]]:
    """Yield pictures as a model takes them, in three sizes in turn, three inputs at least.

    Args:
        pictures: (H, W, 3) in ``cfg.INPUT.FORMAT``.
        cfg: with the size at test time.
    """
    least, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    for k in range(max(len(SCALES), len(pictures))):
        picture, scale = pictures[k % len(pictures)], SCALES[k % len(SCALES)]
        short = least or min(picture.shape[:2])  # 0: as it is
        resize = ResizeShortestEdge(max(1, round(scale * short)), round(scale * most))
        resized = resize.get_transform(picture).apply_image(picture)
        image = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        height, width = picture.shape[:2]
        yield {"image": image, "height": height, "width": width}


def check(
    model: nn.Module,
    exported: ExportedModel,
    inputs: Iterable[dict[str, Any]],
    repeats: int = 3,
) -> Iterator[Check]:
    """Run both models in turn on each picture, with the same number of threads.

    Args:
        model: as it was trained, in evaluation mode.
        exported: made of it.
        inputs: as :func:`inputs_of` yields them.
        repeats: how often each runs, after the first run, which chooses algorithms.
    """
    for each in inputs:
        results: list[Any] = [None, None]
        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats + 1):
            for k, run in enumerate((model, exported)):
                results[k], seconds = _timed(run, each)
                if repeat:
                    times[k].append(seconds)
        ours, theirs = (result[0] for result in results)
        compared = agreement(ours, theirs, exported.thresholds)
        if not compared.is_close:
            exact = predict_in_float64(model, each)
            distances = (agreement(exact, found, exported.thresholds) for found in (ours, theirs))
            compared = compared.beside(*distances)
        medians = (statistics.median(times[0]), statistics.median(times[1]))
        yield Check(tuple(each["image"].shape[1:]), compared, medians)


def table(checks: Sequence[Check], name: str) -> str:
    """Format checks for reading.

    Args:
        checks: at least one.
        name: of the format.
    """
    rows = [
        (
            f"{each.size[1]} x {each.size[0]}",
            each.agreement.detections,
            f"{each.agreement.box:.1e}",
            f"{each.agreement.score:.1e}",
            _percent(each.agreement.masks),
            _percent(each.agreement.panoptic),
            *(f"{1000 * seconds:.0f}" for seconds in each.seconds),
            "yes" if each.agreement.holds else "NO",
        )
        for each in checks
    ]
    headers = ("size", "found", "boxes, px", "scores", "masks, %", "panoptic, %")
    times = ("PyTorch, ms", f"{name}, ms", "agrees")
    return tabulate(rows, headers=(*headers, *times), disable_numparse=True)


def roundings(checks: Sequence[Check]) -> list[str]:
    """Say, of each picture that needed it, how far both models are from float64."""
    return [
        f"{each.size[1]} x {each.size[0]}: boxes are {box[0]:.1e} px (PyTorch) and {box[1]:.1e} px "
        f"(the export) from those in float64, scores {score[0]:.1e} and {score[1]:.1e}"
        for each in checks
        if each.agreement.rounding is not None
        for box, score in [each.agreement.rounding]
    ]


def ratio(checks: Sequence[Check]) -> float:
    """Return the time of the export over that of PyTorch, of all pictures together."""
    ours, theirs = (sum(each.seconds[k] for each in checks) for k in (0, 1))
    return theirs / ours


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3f}"


def _timed(run: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, float]:
    with torch.no_grad():
        start = time.perf_counter()
        result = run([given])
        return result, time.perf_counter() - start


def check_backbone(model: nn.Module, path: str) -> float:
    """Return how far the maps of an exported backbone are from the model's, over three sizes.

    As a share of the largest value of each map.

    Args:
        model: as it was trained, in evaluation mode.
        path: a file of ``torch.export``.
    """
    exported = torch.export.load(path).module()
    stride, largest = largest_stride(model), 0.0
    for rows, columns in ((3, 4), (5, 5), (7, 3)):
        image = example_image(model, rows * stride, columns * stride)
        with torch.no_grad():
            for ours, theirs in zip(Backbone(model)(image), exported(image), strict=True):
                largest = max(largest, float((ours - theirs).abs().max() / ours.abs().max()))
    return largest
