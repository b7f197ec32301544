"""Rules on one instance: its category, box, area, mask and keypoints.

What is on the edge of the image is sound: COCO's own boxes end on it, and rounding puts others a
fraction of a pixel beyond.
"""

from collections.abc import Generator, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from gn_practical.training.validation.findings import Finding, Findings

TOLERANCE = 1.0  # pixels that a box or a polygon may reach beyond the image
_BOX_TOLERANCE = 3.0  # pixels between box and mask; a tenth of the longer side if that is more
_AREA_TOLERANCE = 8.0  # pixels between area and mask besides a factor of two

Size = tuple[float, float]  # width, height


class Expected(NamedTuple):
    """What the annotations of a data set have to be.

    Attributes:
        categories: the ids that are known.
        num_keypoints: keypoints of an instance, by category id, where the json says so.
        masks: whether every instance that is no crowd needs a mask.
        area: whether every instance needs an area, as AP by size does.
        compare: whether box, area and mask are compared, which takes most of the time.
    """

    categories: frozenset
    num_keypoints: Mapping[Any, int] = {}
    masks: bool = False
    area: bool = False
    compare: bool = True


class Extent(NamedTuple):
    """The edges of a mask and its pixels."""

    left: float
    top: float
    right: float
    bottom: float
    area: float


def check_instance(
    annotation: Mapping[str, Any], sizes: Sequence[Size], expected: Expected
) -> Findings:
    """Yield everything that is wrong with one instance by itself.

    Args:
        annotation: an entry of ``annotations`` with all keys that are needed.
        sizes: of its image, in pixels; more than one where json and file disagree, which is a fault
            of the image: what fits one of them is sound.
        expected: what the data set asks for.

    Example:
        >>> crowd = {"category_id": 1, "bbox": [5, 5, 9, 0], "area": 1}
        >>> list(check_instance(crowd, [(20, 20)], Expected(frozenset({1}))))
        [('box empty', 'width 9, height 0')]
    """
    yield from _check_category(annotation, expected)
    box = yield from _check_box(annotation["bbox"], sizes)
    area = yield from _check_area(annotation, expected)
    extent = yield from _check_mask(annotation, sizes, expected)
    # COCO's crowds keep old areas.
    if extent is not None and expected.compare and not annotation.get("iscrowd", 0):
        yield from _compare(box, area, extent)
    yield from _check_keypoints(annotation, expected)


def _check_category(annotation: Mapping[str, Any], expected: Expected) -> Findings:
    if annotation["category_id"] not in expected.categories:
        yield "category unknown", f"category_id={annotation['category_id']}"
    # Detectron2 leaves crowds (1) out, stops at what is marked to be ignored, and counts on 0.
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield "annotation malformed", f"iscrowd={annotation['iscrowd']!r}, neither 0 nor 1"
    if annotation.get("ignore", 0) != 0:
        yield "annotation malformed", f"ignore={annotation['ignore']!r}, which Detectron2 refuses"


def _check_box(
    value: object, sizes: Sequence[Size]
) -> Generator[Finding, None, Sequence[float] | None]:
    """Yield what is wrong; return the box if it can be compared with a mask."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        yield "box malformed", f"bbox={_short(value)}, not 4 numbers"
        return None
    if not all(map(isfinite, value)):
        yield "box not finite", f"bbox={_short(value)}"
        return None
    x, y, width, height = value
    if width <= 0 or height <= 0:
        yield "box empty", f"width {width:g}, height {height:g}"
    beyond = _beyond((x, y), (x + max(width, 0), y + max(height, 0)), sizes)
    if beyond > TOLERANCE:
        yield "box outside the image", _describe_beyond(f"bbox={_short(value)}", beyond, sizes)
        return None
    return (x, y, width, height) if width > 0 and height > 0 else None


def _beyond(low: Sequence[float], high: Sequence[float], sizes: Sequence[Size]) -> float:
    """Pixels by which an extent reaches beyond the image; of several sizes, beyond the best."""
    return min(max(-low[0], -low[1], high[0] - w, high[1] - h) for w, h in sizes)


def _describe_beyond(what: str, beyond: float, sizes: Sequence[Size]) -> str:
    return f"{what} reaches {beyond:g} pixels beyond {sizes[0][0]}x{sizes[0][1]}"


def _check_area(
    annotation: Mapping[str, Any], expected: Expected
) -> Generator[Finding, None, float | None]:
    """Yield what is wrong; return the area if it can be compared with a mask."""
    if "area" not in annotation:
        if expected.area:
            yield "area missing", "the evaluation needs it"
        return None
    area = annotation["area"]
    if not _is_number(area):
        yield "annotation malformed", f"area={_short(area)}"
    elif not (isfinite(area) and area > 0):
        yield "area not positive", f"area={_short(area)}"
    else:
        return area
    return None


def _compare(box: Sequence[float] | None, area: float | None, extent: Extent) -> Findings:
    """Find a mask of another object or image, and a box that is no x, y, width, height."""
    if box is not None:
        x, y, width, height = box
        edges = np.array([x, y, x + width, y + height])
        sides = (width, height, extent.right - extent.left, extent.bottom - extent.top)
        if np.abs(edges - extent[:4]).max() > max(_BOX_TOLERANCE, max(sides) / 10):
            left, top, right, bottom = (f"{edge:g}" for edge in extent[:4])
            detail = f"bbox={list(box)}, the mask reaches from {left}, {top} to {right}, {bottom}"
            yield "box and mask differ", detail
    if area is not None:
        low, high = extent.area / 2 - _AREA_TOLERANCE, extent.area * 2 + _AREA_TOLERANCE
        if not low <= area <= high:
            yield "area and mask differ", f"area={area:g}, the mask has {extent.area:g}"


def _check_keypoints(annotation: Mapping[str, Any], expected: Expected) -> Findings:
    if not annotation.get("keypoints"):
        return
    values = _numbers(annotation["keypoints"])
    wanted = expected.num_keypoints.get(annotation["category_id"])
    if values is None or not np.isfinite(values).all():
        yield "keypoints malformed", "not a list of finite numbers"
    elif len(values) % 3 or (wanted is not None and len(values) != 3 * wanted):
        number = "a multiple of 3" if wanted is None else f"3 x {wanted}"
        yield "keypoints malformed", f"{len(values)} numbers, not {number}"


# Masks ------------------------------------------------------------------------------------------


def _check_mask(
    annotation: Mapping[str, Any], sizes: Sequence[Size], expected: Expected
) -> Generator[Finding, None, Extent | None]:
    """Yield what is wrong; return the mask's extent if it has one."""
    mask, is_crowd = annotation.get("segmentation"), bool(annotation.get("iscrowd", 0))
    if not mask:
        if expected.masks and not is_crowd:
            yield "mask missing", "it has no segmentation"
    elif isinstance(mask, list):
        return (yield from _check_polygons(mask, sizes, expected.compare))
    elif isinstance(mask, dict):
        return (yield from _check_rle(mask, sizes, is_crowd))
    else:
        yield "mask malformed", f"segmentation={_short(mask)}, neither polygons nor RLE"
    return None


def _check_polygons(
    polygons: list[Any], sizes: Sequence[Size], measure: bool
) -> Generator[Finding, None, Extent | None]:
    sound = []
    for value in polygons:
        points = _numbers(value)
        if points is None or len(points) % 2:
            count = "" if points is None else f" {len(points)}"
            yield "polygon malformed", f"not an even number of numbers:{count} {_short(value)}"
            return None
        if len(points) < 6:
            yield "polygon of fewer than 3 points", f"{len(points) // 2} points"
            continue
        sound.append(points.reshape(-1, 2))
    if not sound:
        return None
    points = np.concatenate(sound)
    low, high = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    if not all(map(isfinite, (*low, *high))):
        yield "polygon not finite", _short(points[~np.isfinite(points)].tolist())
        return None
    beyond = _beyond(low, high, sizes)
    if beyond > TOLERANCE:
        yield "polygon outside the image", _describe_beyond("it", beyond, sizes)
        return None
    return Extent(*low, *high, sum(map(_polygon_area, sound))) if measure else None


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    twice = x[1:] @ y[:-1] - y[1:] @ x[:-1] + x[0] * y[-1] - y[0] * x[-1]
    return abs(float(twice)) / 2


def _check_rle(
    rle: dict[str, Any], sizes: Sequence[Size], is_crowd: bool
) -> Generator[Finding, None, Extent | None]:
    size, counts = rle.get("size"), rle_counts(rle.get("counts"))
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        yield "RLE malformed", f"size={_short(size)}, not [height, width]"
        return None
    if (size[1], size[0]) not in sizes:
        width, height = sizes[0]
        yield "RLE of another size", f"size={_short(size)}, the image has [{height}, {width}]"
    if counts is None:
        yield "RLE malformed", f"counts cannot be decoded: {_short(rle.get('counts'))}"
    elif counts.sum() != size[0] * size[1]:
        yield "RLE counts do not sum up", f"{counts.sum():g}, not {size[0]} x {size[1]}"
    elif not counts[1::2].any():
        if not is_crowd:
            yield "RLE without a pixel", "the mask is empty"
    elif (size[1], size[0]) in sizes:
        return _rle_extent(counts, size[0])
    return None


def _rle_extent(counts: np.ndarray, height: int) -> Extent:
    """Measure a mask by its runs, which go down the columns."""
    ends = np.cumsum(counts)[1::2]
    lengths = counts[1::2]
    ends, lengths = ends[lengths > 0], lengths[lengths > 0]
    left, top = np.divmod(ends - lengths, height)
    right, bottom = np.divmod(ends - 1, height)
    if (left != right).any():  # a run that goes on in the next column
        top, bottom = np.zeros(1), np.array([height - 1])
    corners = (left.min(), top.min(), right.max() + 1, bottom.max() + 1)
    return Extent(*map(float, corners), float(lengths.sum()))


def rle_counts(counts: object) -> np.ndarray | None:
    """Decode the run lengths of COCO's RLE without making its mask, whatever is in them.

    pycocotools trusts what it decodes: it reads and writes beyond its memory for some broken RLE.

    Args:
        counts: run lengths, or the text of a compressed RLE: numbers in base 32, little end first,
            from ``chr(48)`` on; bit 5 says that another digit follows, bit 4 of the last digit is
            the sign; from the fourth number on they are differences to the last but one.

    Returns:
        The lengths of runs of 0 and 1 in turn; None if they cannot be decoded or one is negative.

    Example:
        >>> rle_counts("52203").tolist()
        [5, 2, 2, 2, 5]
    """
    runs = _decode(counts) if isinstance(counts, str) else _numbers(counts)
    if runs is None or not np.isfinite(runs).all() or (runs < 0).any() or (runs % 1).any():
        return None
    return runs


def _decode(text: str) -> np.ndarray | None:
    digits = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63:
        return None
    last = np.flatnonzero(digits < 32)  # of each number
    if not last.size or last[-1] != len(digits) - 1:
        return None
    first = np.concatenate(([0], last[:-1] + 1))
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # larger than any image
        return None
    values = np.add.reduceat((digits & 31) << (5 * place), first)
    values -= np.where(digits[last] & 16, 1 << (5 * (last - first + 1)), 0)
    for parity in (1, 2):
        values[parity::2] = np.cumsum(values[parity::2])
    return values


# Values of a json -------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return type(value) in (int, float)  # and no bool


def _numbers(value: object) -> np.ndarray | None:
    """Return a list of numbers as an array; None if it is none."""
    if not isinstance(value, list):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # lists within of unequal length
        return None
    if value and (array.ndim != 1 or array.dtype.kind not in "iuf"):
        return None
    return array


def _short(value: object) -> str:
    """Write a value of a json in a line."""
    if isinstance(value, list) and len(value) > 6:
        value = [*value[:6], "..."]
    text = str(value).replace("'...'", "...")
    return text if len(text) <= 60 else text[:57] + "..."
