"""Which predictions of one image match what is annotated on it, and how good that is.

The rules are those of the official panoptic code, and of COCO's for detections at one threshold of
IoU; quality is PQ's formula in both, so an image of either kind has a number from 0 to 100.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from gn_practical.training.evaluation.panoptic import panoptic_quality

Segment = dict[str, Any]
Class = tuple[int, bool]  # contiguous id, whether it is a thing


@dataclass
class Matches:
    """Matched pairs of one image and what is left, by position in the lists that were matched."""

    pairs: dict[int, tuple[int, float]] = field(default_factory=dict)  # found → truth, IoU
    missed: list[int] = field(default_factory=list)  # of the truth
    wrong: list[int] = field(default_factory=list)  # of what was found
    tallies: dict[Class, np.ndarray] = field(default_factory=dict)  # Σ IoU, TP, FP, FN

    def quality(self) -> dict[str, float]:
        """PQ, SQ and RQ in percent, means over the classes of the image; NaN if it has none."""
        return panoptic_quality(np.array(list(self.tallies.values())).reshape(-1, 4))

    def count(self, kind: Class, iou: float = 0.0, *, wrong: bool = False) -> None:
        """Count a match of an IoU, or, where it is 0, what was missed or is wrong."""
        row = self.tallies.setdefault(kind, np.zeros(4))
        row += (iou, 1, 0, 0) if iou else (0, 0, int(wrong), int(not wrong))


def match_segments(
    truth_ids: np.ndarray, truth: Sequence[Segment], ids: np.ndarray, found: Sequence[Segment]
) -> Matches:
    """Match the segments of two panoptic maps, as the official code does.

    Args:
        truth_ids: (H, W), 0 is void.
        truth: segments with "id", "category_id", "isthing" and perhaps "iscrowd".
        ids: (H, W), of the prediction.
        found: its segments.

    Example:
        >>> ids = np.array([[1, 1, 1, 2]])
        >>> segments = [{"id": i, "category_id": i, "isthing": True} for i in (1, 2)]
        >>> matches = match_segments(ids, segments, np.array([[1, 1, 0, 0]]), segments[:1])
        >>> round(matches.quality()["PQ"], 1), matches.missed
        (33.3, [1])
    """
    common = _overlaps(truth_ids, ids)
    areas: Counter[int] = Counter()
    truth_areas: Counter[int] = Counter()
    for (other, number), overlap in common.items():
        areas[number] += overlap
        truth_areas[other] += overlap
    matches, taken = Matches(), set()
    by_id = {segment["id"]: index for index, segment in enumerate(truth)}
    for index, segment in enumerate(found):
        number = segment["id"]
        for other, overlap in ((t, n) for (t, f), n in common.items() if f == number):
            position = by_id.get(other)
            if position is None or truth[position].get("iscrowd"):
                continue
            if _class(truth[position]) != _class(segment):
                continue
            void = common.get((0, number), 0)
            iou = overlap / (areas[number] + truth_areas[other] - overlap - void)
            if iou > 0.5:
                matches.pairs[index] = (position, iou)
                matches.count(_class(segment), iou)
                taken.add(position)
    _count_missed(matches, truth, taken)
    _count_wrong_segments(matches, truth, found, common, areas)
    return matches


def match_instances(truth: Sequence[Segment], found: Sequence[Segment]) -> Matches:
    """Match detections of IoU 0.5 at least, those of high scores first, as COCO does.

    Masks are compared where both sides have them, else boxes. What lies in a crowd of its class is
    neither right nor wrong.

    Args:
        truth: annotations with "category_id", "bbox" (x, y, width, height), perhaps "rle" and
            "iscrowd".
        found: likewise, with "score".
    """
    matches, taken = Matches(), set()
    kind = "rle" if all("rle" in each for each in (*truth, *found)) else "bbox"
    order = sorted(range(len(found)), key=lambda index: -found[index]["score"])
    ious = _ious([t[kind] for t in truth], [f[kind] for f in found], truth)
    for index in order:
        category = found[index]["category_id"]
        candidates = [i for i, each in enumerate(truth) if each["category_id"] == category]
        free = [i for i in candidates if i not in taken and not truth[i].get("iscrowd")]
        best = max(free, key=lambda i: ious[index, i], default=None)
        if best is not None and ious[index, best] >= 0.5:
            matches.pairs[index] = (best, float(ious[index, best]))
            matches.count((category, True), float(ious[index, best]))
            taken.add(best)
        elif not any(truth[i].get("iscrowd") and ious[index, i] >= 0.5 for i in candidates):
            matches.wrong.append(index)
            matches.count((category, True), wrong=True)
    _count_missed(matches, truth, taken)
    return matches


def _count_wrong_segments(
    matches: Matches,
    truth: Sequence[Segment],
    found: Sequence[Segment],
    common: dict[tuple[int, int], int],
    areas: Counter[int],
) -> None:
    """Count the segments without a match, but for those that lie in void and a crowd mostly."""
    # Of several crowds of a class the last one counts, in the official code too.
    crowds = {_class(s): s["id"] for s in truth if s.get("iscrowd")}
    for index, segment in enumerate(found):
        if index in matches.pairs:
            continue
        ignored = common.get((0, segment["id"]), 0)
        if _class(segment) in crowds:
            ignored += common.get((crowds[_class(segment)], segment["id"]), 0)
        if ignored / max(areas[segment["id"]], 1) <= 0.5:
            matches.wrong.append(index)
            matches.count(_class(segment), wrong=True)


def _overlaps(truth_ids: np.ndarray, ids: np.ndarray) -> dict[tuple[int, int], int]:
    """Count the pixels of each pair of ids, which are below 2^24."""
    pairs, counts = np.unique(truth_ids.astype(np.int64) << 24 | ids, return_counts=True)
    keys = zip((pairs >> 24).tolist(), (pairs & (1 << 24) - 1).tolist(), strict=True)
    return dict(zip(keys, counts.tolist(), strict=True))


def _ious(truth: list[Any], found: list[Any], annotations: Sequence[Segment]) -> np.ndarray:
    if not truth or not found:
        return np.zeros((len(found), len(truth)))
    crowds = [int(bool(each.get("iscrowd"))) for each in annotations]
    if not isinstance(truth[0], dict):
        truth, found = np.array(truth, float), np.array(found, float)
    return mask_util.iou(found, truth, crowds)


def _count_missed(matches: Matches, truth: Sequence[Segment], taken: set[int]) -> None:
    for position, segment in enumerate(truth):
        if position not in taken and not segment.get("iscrowd"):
            matches.missed.append(position)
            matches.count(_class(segment))


def _class(segment: Segment) -> Class:
    return segment["category_id"], bool(segment.get("isthing", True))
