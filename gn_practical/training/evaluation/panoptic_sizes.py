"""Panoptic quality by the size of segments, as COCO has its sizes: small, medium, large."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIZES = ("s", "m", "l")
_LIMITS = (32**2, 96**2)  # pixels from which a segment is medium, and large


def tallies_by_size(
    true_ids: np.ndarray,
    truth: Sequence[Mapping[str, Any]],
    ids: np.ndarray,
    predicted: Sequence[Mapping[str, Any]],
    numbers: Mapping[Any, int],
) -> np.ndarray:
    """Return Σ IoU, TP, FP and FN of an image, ``(3 sizes, classes, 4)``.

    Matched as panopticapi does. What is annotated counts at its own size, whether found or not; a
    false positive at the size that was predicted. The sizes add up to the tallies of all segments.

    Args:
        true_ids: annotated segment of each pixel, 0 for none.
        truth: "id", "category_id" and "iscrowd" of each segment.
        ids: the predicted segments, alike.
        predicted: "id" and "category_id" of each.
        numbers: category → its number from 1.
    """
    overlaps = _overlaps(true_ids, ids)
    true_areas, areas = (_areas(overlaps, side) for side in (0, 1))
    tallies = np.zeros((len(SIZES), len(numbers), 4))

    def count(category: Any, area: int, *values: float) -> None:
        tallies[np.searchsorted(_LIMITS, area, "right"), numbers[category] - 1] += values

    crowds = {
        s["category_id"]: s["id"] for s in truth if s.get("iscrowd")
    }  # the last of each class
    wanted = {s["id"]: s["category_id"] for s in truth if not s.get("iscrowd")}
    found = {s["id"]: s["category_id"] for s in predicted}
    matched = set()
    for (true_id, number), both in overlaps.items():
        if found.get(number) is None or wanted.get(true_id) != found[number]:
            continue
        union = true_areas[true_id] + areas[number] - both - overlaps.get((0, number), 0)
        if both / union > 0.5:
            matched |= {("true", true_id), ("found", number)}
            count(wanted[true_id], true_areas[true_id], both / union, 1, 0, 0)
    for true_id, category in wanted.items():
        if ("true", true_id) not in matched:
            count(category, true_areas[true_id], 0, 0, 0, 1)
    for number, category in found.items():
        excused = overlaps.get((0, number), 0) + overlaps.get((crowds.get(category), number), 0)
        if ("found", number) not in matched and excused <= areas[number] / 2:
            count(category, areas[number], 0, 0, 1, 0)
    return tallies


def _overlaps(true_ids: np.ndarray, ids: np.ndarray) -> dict[tuple[int, int], int]:
    """Count the pixels of each pair of an annotated and a predicted segment."""
    joint = true_ids.astype(np.int64) << 24 | ids.astype(np.int64)
    pairs, pixels = np.unique(joint, return_counts=True)
    keys = zip((pairs >> 24).tolist(), (pairs % 2**24).tolist(), strict=True)
    return dict(zip(keys, pixels.tolist(), strict=True))


def _areas(overlaps: Mapping[tuple[int, int], int], side: int) -> dict[int, int]:
    areas: dict[int, int] = defaultdict(int)
    for pair, pixels in overlaps.items():
        areas[pair[side]] += pixels
    return areas
