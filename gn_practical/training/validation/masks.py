"""Rules on the masks of instances, polygons and RLE, and their extents."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

TOLERANCE = 1.0  # pixels that a box or a polygon may reach beyond the image

Finding = tuple[int, str, str]  # position of the annotation, reason, what was found
Findings = Iterator[Finding]
Measuring = Generator[Finding, None, np.ndarray]  # NaN for what cannot be compared


def check_masks(
    annotations: Sequence[Mapping[str, Any]], sizes: np.ndarray, needed: bool
) -> Measuring:
    """Yield what is wrong; return left, top, right, bottom and number of pixels of each mask."""
    extents, polygons = np.full((len(annotations), 5), np.nan), {}
    for index, annotation in enumerate(annotations):
        mask, is_crowd = annotation.get("segmentation"), bool(annotation.get("iscrowd", 0))
        if not mask:
            if needed and not is_crowd:
                yield index, "mask missing", "it has no segmentation"
        elif isinstance(mask, list):
            polygons[index] = mask
        elif isinstance(mask, dict):
            known = sizes[index, :, ::-1].tolist()
            counts = yield from _check_rle(index, mask, known, is_crowd)
            if counts is not None:
                extents[index] = _rle_extent(counts, mask["size"][0])
        else:
            text = f"segmentation={short(mask)}, neither polygons nor RLE"
            yield index, "mask malformed", text
    yield from _check_polygons(polygons, sizes, extents)
    # COCO's crowds keep old areas.
    extents[[bool(annotation.get("iscrowd", 0)) for annotation in annotations]] = np.nan
    return extents


def _check_polygons(
    polygons: Mapping[int, list[Any]], sizes: np.ndarray, extents: np.ndarray
) -> Findings:
    """Yield what is wrong; fill in the extents of what is sound."""
    sound, owners = [], []
    for index, parts in polygons.items():
        arrays = []
        for part in parts:
            points = numbers(part)
            if points is None or len(points) % 2:
                count = "" if points is None else f" {len(points)}"
                text = f"not an even number of numbers:{count} {short(part)}"
                yield index, "polygon malformed", text
                arrays = []
                break
            if len(points) < 6:
                yield index, "polygon of fewer than 3 points", f"{len(points) // 2} points"
            else:
                arrays.append(points)
        sound += arrays
        owners += [index] * len(arrays)
    if not sound:
        return
    owners, found = _measure(sound, np.array(owners))
    is_finite = np.isfinite(found[:, :4]).all(axis=1)
    beyond = pixels_beyond(found[:, :4], sizes[owners])
    for index in owners[~is_finite]:
        values = [value for part in polygons[index] for value in part]
        yield index, "polygon not finite", short([v for v in values if not np.isfinite(v)])
    is_outside = is_finite & (beyond > TOLERANCE)
    for index, pixels in zip(owners[is_outside], beyond[is_outside], strict=True):
        yield index, "polygon outside the image", describe_beyond("it", pixels, sizes[index])
    sound = is_finite & ~is_outside
    extents[owners[sound]] = found[sound]


@np.errstate(over="ignore", invalid="ignore")
def _measure(polygons: Sequence[np.ndarray], owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each owner once, and the extent of all of its polygons."""
    ends = np.cumsum([len(points) // 2 for points in polygons])
    starts = np.append(0, ends[:-1])
    x, y = np.concatenate(polygons).astype(float).reshape(-1, 2).T
    following = np.arange(1, len(x) + 1)
    following[ends - 1] = starts
    areas = np.abs(np.add.reduceat(x * y[following] - y * x[following], starts)) / 2
    owners, first = np.unique(owners, return_index=True)
    low = [np.minimum.reduceat(side, starts[first]) for side in (x, y)]
    high = [np.maximum.reduceat(side, starts[first]) for side in (x, y)]
    return owners, np.stack([*low, *high, np.add.reduceat(areas, first)], axis=1)


@np.errstate(over="ignore")
def pixels_beyond(edges: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Pixels by which extents reach beyond their images; of two sizes, beyond the better.

    Shape:
        edges ``(N, 4)``: left, top, right, bottom; sizes ``(N, 2, 2)``; result ``(N,)``.
    """
    low, high = edges[:, None, :2], edges[:, None, 2:]
    return np.maximum(-low, high - sizes).max(axis=2).min(axis=1)


def describe_beyond(what: str, pixels: float, sizes: np.ndarray) -> str:
    """Say how far something reaches beyond an image of these sizes."""
    return f"{what} reaches {pixels:g} pixels beyond {sizes[0, 0]}x{sizes[0, 1]}"


def _check_rle(
    index: int, rle: Mapping[str, Any], known: Sequence[list[int]], is_crowd: bool
) -> Generator[Finding, None, np.ndarray | None]:
    """Yield what is wrong; return the runs of a mask that can be measured."""
    size, counts = rle.get("size"), rle_counts(rle.get("counts"))
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        yield index, "RLE malformed", f"size={short(size)}, not [height, width]"
        return None
    if size not in known:
        yield index, "RLE of another size", f"size={short(size)}, the image has {known[0]}"
    if counts is None:
        text = f"counts cannot be decoded: {short(rle.get('counts'))}"
        yield index, "RLE malformed", text
    elif counts.sum() != size[0] * size[1]:
        yield index, "RLE counts do not sum up", f"{counts.sum():g}, not {size[0]} x {size[1]}"
    elif counts[1::2].any():
        return counts if size in known else None
    elif not is_crowd:
        yield index, "RLE without a pixel", "the mask is empty"
    return None


def _rle_extent(counts: np.ndarray, height: int) -> list[float]:
    """Measure a mask by its runs, which go down the columns."""
    ends = np.cumsum(counts)[1::2]
    lengths = counts[1::2]
    ends, lengths = ends[lengths > 0], lengths[lengths > 0]
    left, top = np.divmod(ends - lengths, height)
    right, bottom = np.divmod(ends - 1, height)
    if (left != right).any():  # a run that goes on in the next column
        top, bottom = np.zeros(1), np.array([height - 1])
    return [left.min(), top.min(), right.max() + 1, bottom.max() + 1, lengths.sum()]


def rle_counts(counts: object) -> np.ndarray | None:
    """Decode the lengths of runs of 0 and 1 in turn of COCO's RLE, without making its mask.

    None is returned if they cannot be decoded or one is negative. pycocotools trusts what it
    decodes: it reads and writes beyond its memory for some broken RLE.

    Args:
        counts: run lengths, or the text of a compressed RLE: numbers in base 32, little end first,
            from ``chr(48)`` on; bit 5 says that another digit follows, bit 4 of the last digit is
            the sign; from the fourth number on they are differences to the last but one.

    Example:
        >>> rle_counts("52203").tolist()
        [5, 2, 2, 2, 5]
    """
    runs = _decode(counts) if isinstance(counts, str) else numbers(counts)
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


def numbers(value: object) -> np.ndarray | None:
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


def short(value: object) -> str:
    """Write a value of a json in a line."""
    if isinstance(value, list) and len(value) > 6:
        value = [*value[:6], "..."]
    text = str(value).replace("'...'", "...")
    return text if len(text) <= 60 else text[:57] + "..."
