"""Faults of a panoptic json, its PNGs, and the PNGs of stuff labels made from them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gn_practical.training.data.coco_format import VOID, rgb_to_id
from gn_practical.training.data.entries import (
    PANOPTIC_KEYS,
    SEGMENT_KEYS,
    lacking_keys,
    repeated,
    unknown_labels,
)
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.annotations import Size
from gn_practical.training.validation.files import Decoded, read_pixels
from gn_practical.training.validation.findings import Fault
from gn_practical.training.validation.images import Images, describe_size, is_id
from gn_practical.training.validation.instances import check_lists

TOLERANCE = 1  # pixels of a segment's area and of each side of its box
_LISTED = 10  # ids of one PNG that the json lacks; more are one fault

Box = tuple[int, int, int, int]  # x, y, width, height
Part = tuple[str, tuple[str | int, ...], Any, str]  # reason, rest of the entry, segment id, detail


class PanopticTarget(NamedTuple):
    """A panoptic json with its PNGs and, if given, images and PNGs of stuff labels.

    Attributes:
        json: path of the json.
        png_root: folder of the panoptic PNGs.
        image_root: folder of the images; None to leave them out.
        known_ids: ids of the categories; by default those of the json.
        stuff_root: folder of the PNGs of stuff labels; None to leave them out.
        num_stuff_classes: labels below it are known, and 255 for void.
        files: False to check the json alone.
    """

    json: str
    png_root: str
    image_root: str | None = None
    known_ids: frozenset | None = None
    stuff_root: str | None = None
    num_stuff_classes: int = VOID
    files: bool = True

    def check(self, pool: Pool, decoded: dict[str, Decoded]) -> Iterator[Fault]:
        """Yield all faults; see `InstancesTarget.check`."""
        opened = yield from check_lists(self.json, self.image_root, pool, decoded)
        if not opened:
            return
        content, images = opened
        known = self.known_ids or frozenset(
            c["id"] for c in content["categories"] if not lacking_keys(c, {"id"}) and is_id(c["id"])
        )
        yield from self._check_annotations(content["annotations"], images, known, pool)

    def _check_annotations(
        self, annotations: Sequence[Any], images: Images, known: frozenset, pool: Pool
    ) -> Iterator[Fault]:
        sound, tasks = [], []
        for index, annotation in enumerate(annotations):
            problem = _malformed(annotation)
            if problem:
                yield self._fault("annotation malformed", index, annotation, detail=problem)
                continue
            sound.append(index)
            image_id = annotation["image_id"]
            if image_id in images.by_id:
                tasks.append((index, annotation, images.sizes[image_id]))
            elif images.lacks(image_id):
                detail = f"image_id={image_id} is not among the images"
                yield self._fault("annotation of unknown image", index, annotation, detail=detail)
        for position in repeated(annotations[index]["image_id"] for index in sound):
            index = sound[position]
            detail = "an earlier one is of the same image"
            yield self._fault("panoptic annotation twice", index, annotations[index], detail=detail)
        check = partial(_check_task, target=self, known=known)
        title = f"Panoptic PNGs of {os.path.basename(self.json)}"
        for (index, annotation, _), parts in zip(
            tasks, pool.map(check, tasks, title, 16), strict=True
        ):
            for reason, rest, segment_id, detail in parts:
                yield self._fault(reason, index, annotation, rest, segment_id, detail)

    def _fault(
        self,
        reason: str,
        index: int,
        annotation: object,
        rest: tuple[str | int, ...] = (),
        segment_id: object = None,
        detail: str = "",
    ) -> Fault:
        values = annotation if isinstance(annotation, Mapping) else {}
        root = self.stuff_root if reason.startswith("stuff") else self.png_root
        name = values.get("file_name")
        file = os.path.join(root, name) if isinstance(name, str) else ""
        entry = ("annotations", index, *rest)
        return Fault(reason, self.json, entry, file, values.get("image_id"), segment_id, detail)


def _malformed(annotation: object) -> str:
    lacking = lacking_keys(annotation, PANOPTIC_KEYS)
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    types = {"image_id": int | str, "file_name": str, "segments_info": list}
    wrong = [key for key, kind in types.items() if not isinstance(annotation[key], kind)]
    return f"{', '.join(wrong)} of a wrong type" if wrong else ""


# One image, in a worker -------------------------------------------------------------------------


def _check_task(
    task: tuple[int, dict[str, Any], Sequence[Size]], target: PanopticTarget, known: frozenset
) -> list[Part]:
    _, annotation, sizes = task
    parts, segments = [], {}
    for position, segment in enumerate(annotation["segments_info"]):
        problem = _malformed_segment(segment)
        if problem:
            parts.append(("segment malformed", (), _id_of(segment), problem))
            continue
        if segment["category_id"] not in known:
            detail = f"category_id={segment['category_id']}"
            parts.append(("category unknown", (), segment["id"], detail))
        if segment["id"] in segments:
            rest = ("segments_info", position)
            parts.append(("segment id twice", rest, segment["id"], "an earlier one has it"))
        else:
            segments[segment["id"]] = (position, segment)
    if target.files:
        parts += _check_panoptic_png(target, annotation["file_name"], sizes, segments)
        if target.stuff_root is not None:
            parts += _check_stuff_png(target, annotation["file_name"], sizes)
    return parts


def _malformed_segment(segment: object) -> str:
    lacking = lacking_keys(segment, SEGMENT_KEYS | {"area"})  # PQ takes the json's area
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    sound = {
        "id": type(segment["id"]) is int,
        "category_id": is_id(segment["category_id"]),
        "area": type(segment["area"]) in (int, float),
    }
    return ", ".join(f"{key}={segment[key]!r}" for key, is_sound in sound.items() if not is_sound)


def _id_of(segment: object) -> object:
    return segment.get("id") if isinstance(segment, Mapping) else None


def _check_panoptic_png(
    target: PanopticTarget,
    name: str,
    sizes: Sequence[Size],
    segments: dict[int, tuple[int, dict[str, Any]]],
) -> Iterator[Part]:
    facts, pixels = read_pixels(os.path.join(target.png_root, name), "RGB")
    yield from _file_parts("panoptic PNG", facts, sizes)
    if pixels is None or facts.size not in sizes:
        return
    extents = segment_extents(rgb_to_id(pixels))
    extents.pop(0, None)  # void
    for number, (position, segment) in segments.items():
        if number not in extents:
            rest = ("segments_info", position)
            detail = "0 is void" if number == 0 else "no pixel has its id"
            yield "segment in the json alone", rest, number, detail
        else:
            yield from _compare(segment, *extents[number])
    strangers = [number for number in extents if number not in segments]
    for number in strangers[:_LISTED]:
        yield "segment in the PNG alone", (), number, f"{extents[number][0]} pixels have its id"
    if len(strangers) > _LISTED:
        detail = f"and {len(strangers) - _LISTED} more ids; was the PNG resized or made a JPEG?"
        yield "segment in the PNG alone", (), None, detail


def _compare(segment: Mapping[str, Any], area: int, box: Box) -> Iterator[Part]:
    if not abs(segment["area"] - area) <= TOLERANCE:  # true of NaN too
        detail = f"{segment['area']} in the json, {area} pixels in the PNG"
        yield "segment area differs", (), segment["id"], detail
    if "bbox" not in segment:
        return
    stated = segment["bbox"]
    try:
        agrees = np.shape(stated) == (4,) and np.allclose(stated, box, rtol=0, atol=TOLERANCE)
    except (TypeError, ValueError):
        agrees = False
    if not agrees:
        detail = f"{stated} in the json, {list(box)} in the PNG"
        yield "segment box differs", (), segment["id"], detail


def _check_stuff_png(target: PanopticTarget, name: str, sizes: Sequence[Size]) -> Iterator[Part]:
    facts, labels = read_pixels(os.path.join(target.stuff_root, name), "L")
    yield from _file_parts("stuff PNG", facts, sizes)
    if labels is None:
        return
    unknown = unknown_labels(labels, target.num_stuff_classes)
    if unknown:
        listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        detail = f"{listed}; there are {target.num_stuff_classes} stuff classes"
        yield "stuff PNG label unknown", (), None, detail


def _file_parts(what: str, facts: Decoded, sizes: Sequence[Size]) -> Iterator[Part]:
    if facts.state:
        yield f"{what} {facts.state}", (), None, facts.detail
    if facts.size is not None and facts.size not in sizes:
        yield f"{what} of another size", (), None, describe_size(facts, sizes[0])


def segment_extents(ids: np.ndarray) -> dict[int, tuple[int, Box]]:
    """Measure every segment of a panoptic PNG: its pixels and its box.

    Works on runs of equal pixels, which are few.

    Args:
        ids: the segment of each pixel.

    Shape:
        ids ``(H, W)``.

    Example:
        >>> segment_extents(np.array([[7, 7, 0], [0, 7, 0]]))
        {0: (3, (0, 0, 3, 2)), 7: (3, (0, 0, 2, 2))}
    """
    width, flat = ids.shape[1], ids.ravel()
    is_start = np.ones(flat.size, bool)
    is_start[1:] = flat[1:] != flat[:-1]
    is_start[::width] = True
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=flat.size)
    order = np.argsort(flat[starts], kind="stable")
    starts, lengths = starts[order], lengths[order]
    numbers, first = np.unique(flat[starts], return_index=True)
    rows, left = np.divmod(starts, width)
    areas = np.add.reduceat(lengths, first)
    x, y = np.minimum.reduceat(left, first), np.minimum.reduceat(rows, first)
    right = np.maximum.reduceat(left + lengths, first)
    bottom = np.maximum.reduceat(rows + 1, first)
    boxes = np.stack([x, y, right - x, bottom - y], axis=1).tolist()
    return {
        number: (area, tuple(box))
        for number, area, box in zip(numbers.tolist(), areas.tolist(), boxes, strict=True)
    }
