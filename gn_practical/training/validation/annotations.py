"""Rules on instances, each by itself: category, box, area, mask and keypoints.

What is on the edge of the image is sound: COCO's own boxes end on it, and rounding puts others a
fraction of a pixel beyond.
"""

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from gn_practical.training.data.coco_format import is_number
from gn_practical.training.validation.masks import (
    TOLERANCE,
    Findings,
    Measuring,
    check_masks,
    describe_beyond,
    numbers,
    pixels_beyond,
    short,
)

_BOX_TOLERANCE = 3.0  # pixels between box and mask; a tenth of the longer side if that is more
_AREA_TOLERANCE = 8.0  # pixels between area and mask besides a factor of two


def check_instances(
    annotations: Sequence[Mapping[str, Any]],
    sizes: np.ndarray,
    categories: Collection[Any],
    num_keypoints: Mapping[Any, int] | None = None,
    needs_mask: bool = False,
    needs_area: bool = False,
) -> Findings:
    """Yield everything that is wrong with single instances.

    Args:
        annotations: entries with all keys that are needed.
        sizes: ``(N, 2, 2)``, width and height of each one's image, as the json has it and as the
            file has it: where they differ it is the image's fault, and what fits one is sound.
        categories: the ids that are known.
        num_keypoints: of an instance, by category id, where the json says so.
        needs_mask: of every instance that is no crowd.
        needs_area: of every instance, as AP by size does.

    Example:
        >>> crowd = {"category_id": 1, "bbox": [5, 5, 9, 0], "area": 1}
        >>> list(check_instances([crowd], np.full((1, 2, 2), 20), {1}))
        [(0, 'box empty', 'width 9, height 0')]
    """
    for index, annotation in enumerate(annotations):
        if annotation["category_id"] not in categories:
            yield index, "category unknown", f"category_id={annotation['category_id']}"
    boxes = yield from _check_boxes(annotations, sizes)
    areas = yield from _check_areas(annotations, needs_area)
    extents = yield from check_masks(annotations, sizes, needs_mask)
    yield from _compare(annotations, boxes, areas, extents)
    for index, annotation in enumerate(annotations):
        if annotation.get("keypoints"):
            wanted = (num_keypoints or {}).get(annotation["category_id"])
            yield from _check_keypoints(index, annotation["keypoints"], wanted)


def _check_boxes(annotations: Sequence[Mapping[str, Any]], sizes: np.ndarray) -> Measuring:
    """Yield what is wrong; return the boxes, NaN for what cannot be compared with a mask."""
    boxes = boxes_of(annotations)
    for index in np.flatnonzero(~np.isfinite(boxes).all(axis=1)).tolist():
        text = f"bbox={short(annotations[index]['bbox'])}"
        if _is_box(annotations[index]["bbox"]):
            yield index, "box not finite", text
        else:
            yield index, "box malformed", f"{text}, not 4 numbers"
        boxes[index] = np.nan
    is_empty = (boxes[:, 2:] <= 0).any(axis=1)
    for index in np.flatnonzero(is_empty).tolist():
        _, _, width, height = boxes[index]
        yield index, "box empty", f"width {width:g}, height {height:g}"
    beyond = pixels_beyond(_edges(boxes), sizes)
    for index in np.flatnonzero(beyond > TOLERANCE).tolist():
        what = f"bbox={short(annotations[index]['bbox'])}"
        yield index, "box outside the image", describe_beyond(what, beyond[index], sizes[index])
    boxes[is_empty | (beyond > TOLERANCE)] = np.nan
    return boxes


def boxes_of(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the boxes of annotations, ``(N, 4)``; NaN for what is none."""
    boxes = (annotation["bbox"] for annotation in annotations)
    values = [box if _is_box(box) else (np.nan,) * 4 for box in boxes]
    return np.array(values, float).reshape(-1, 4)


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


@np.errstate(over="ignore")
def _edges(boxes: np.ndarray) -> np.ndarray:
    """Return left, top, right and bottom."""
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].clip(0)])


def _check_areas(annotations: Sequence[Mapping[str, Any]], needed: bool) -> Measuring:
    """Yield what is wrong; return the areas, NaN for what cannot be compared with a mask."""
    areas = np.full(len(annotations), np.nan)
    for index, annotation in enumerate(annotations):
        area = annotation.get("area")
        if "area" not in annotation:
            if needed:
                yield index, "area missing", "the evaluation needs it"
        elif isfinite(area) and area > 0:
            areas[index] = area
        else:
            yield index, "area not positive", f"area={area}"
    return areas


def _compare(
    annotations: Sequence[Mapping[str, Any]],
    boxes: np.ndarray,
    areas: np.ndarray,
    extents: np.ndarray,
) -> Findings:
    """Find a mask of another object or image, and a box that is no x, y, width, height."""
    masks, pixels = extents[:, :4], extents[:, 4]
    longest = np.hstack([boxes[:, 2:], masks[:, 2:] - masks[:, :2]]).max(axis=1)
    apart = np.abs(_edges(boxes) - masks).max(axis=1)
    for index in np.flatnonzero(apart > np.maximum(_BOX_TOLERANCE, longest / 10)).tolist():
        left, top, right, bottom = (f"{edge:g}" for edge in masks[index])
        detail = f"bbox={annotations[index]['bbox']}, the mask reaches "
        yield index, "box and mask differ", f"{detail}from {left}, {top} to {right}, {bottom}"
    is_small = areas < pixels / 2 - _AREA_TOLERANCE
    for index in np.flatnonzero(is_small | (areas > pixels * 2 + _AREA_TOLERANCE)).tolist():
        detail = f"area={areas[index]:g}, the mask has {pixels[index]:g}"
        yield index, "area and mask differ", detail


def _check_keypoints(index: int, keypoints: object, wanted: int | None) -> Findings:
    values = numbers(keypoints)
    if values is None or not np.isfinite(values).all():
        yield index, "keypoints malformed", "not a list of finite numbers"
    elif len(values) % 3 or (wanted is not None and len(values) != 3 * wanted):
        number = "a multiple of 3" if wanted is None else f"3 x {wanted}"
        yield index, "keypoints malformed", f"{len(values)} numbers, not {number}"
