"""Faults of a panoptic json, its PNGs, and the PNGs of stuff labels made from them."""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gn_practical.training.data.coco_format import (
    VOID,
    rgb_to_id,
    stuff_labels,
)
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.validation.annotations import Size
from gn_practical.training.validation.files import Decoded, read_pixels
from gn_practical.training.validation.findings import Fault
from gn_practical.training.validation.images import (
    Images,
    Names,
    Session,
    category_ids,
    check_lists,
    describe_size,
    is_file_name,
    is_id,
    lacking_keys,
    repeated,
    sound_categories,
)

TOLERANCE = 1  # pixels of a segment's area and of each side of its box
_LISTED = 10  # ids of one PNG that the json lacks; more are one fault
_OTHER_LABELS = 0.01  # share of a stuff PNG's pixels that may disagree with the panoptic PNG
_LOOKED_AT = 4  # stuff PNGs whose labels are read where files are not decoded

Box = tuple[int, int, int, int]  # x, y, width, height
Part = tuple[str, tuple[str | int, ...], Any, str]  # reason, rest of the entry, segment id, detail
Segments = Mapping[int, tuple[int, dict[str, Any]]]  # position and segment, by id


class PanopticTarget(NamedTuple):
    """A panoptic json with its PNGs and, if given, images and PNGs of stuff labels.

    Attributes:
        json: path of the json.
        png_root: folder of the panoptic PNGs.
        image_root: folder of the images; None to leave them out.
        names: id and name of the categories; by default those of the json.
        stuff_root: folder of the PNGs of stuff labels; None to leave them out.
        files: False to check the json alone.
        instances_json: of the same images; compared if it was checked before.
        area: whether every segment needs its area, as PQ does.
    """

    json: str
    png_root: str
    image_root: str | None = None
    names: Names | None = None
    stuff_root: str | None = None
    files: bool = True
    instances_json: str | None = None
    area: bool = True

    def check(self, session: Session) -> Iterator[Fault]:
        """Yield all faults; see `InstancesTarget.check`."""
        opened = yield from check_lists(self.json, self.image_root, self.names, session)
        if not opened:
            return
        content, images = opened
        labels = None
        try:
            labels = stuff_labels(sound_categories(content), self.json)
        except DatasetError as error:
            yield Fault("category malformed", self.json, detail=str(error))
        sound = {}
        for index, annotation in enumerate(content["annotations"]):
            if problem := _malformed(annotation):
                yield self._fault("annotation malformed", index, annotation, detail=problem)
            else:
                sound[index] = annotation
        yield from self._check_images(sound, images, session.images.get(self.instances_json))
        if self.files and not session.decode:
            yield from self._check_present(sound, session)
        known = [index for index, a in sound.items() if a["image_id"] in images.by_id]
        looks = self._looks(session.decode, len(known))
        tasks = [
            (sound[index], images.sizes[sound[index]["image_id"]], look)
            for index, look in zip(known, looks, strict=True)
        ]
        ids = category_ids(content, self.names)
        check = partial(_check_task, target=self, known=ids, labels=labels)
        title = f"Panoptic PNGs of {os.path.basename(self.json)}"
        for index, parts in zip(known, session.pool.map(check, tasks, title, 16), strict=True):
            for reason, rest, segment_id, detail in parts:
                yield self._fault(reason, index, sound[index], rest, segment_id, detail)

    def _looks(self, decode: bool, count: int) -> list[str]:
        """Say of each annotation which PNGs to read: all, or the labels of the first few."""
        if not self.files:
            return [""] * count
        few = min(count, _LOOKED_AT)
        return ["all"] * count if decode else ["labels"] * few + [""] * (count - few)

    def _check_images(
        self, sound: Mapping[int, dict[str, Any]], images: Images, others: dict[Any, str] | None
    ) -> Iterator[Fault]:
        """Compare the images that are annotated with those listed, here and in the other json."""
        for index in repeated({index: a["image_id"] for index, a in sound.items()}):
            detail = "an earlier one is of the same image"
            yield self._fault("panoptic annotation twice", index, sound[index], detail=detail)
        annotated = {annotation["image_id"]: index for index, annotation in sound.items()}
        for image_id, index in annotated.items():
            if images.lacks(image_id):
                detail = f"{image_id=} is not among the images"
                reason = "panoptic annotation of unknown image"
                yield self._fault(reason, index, sound[index], detail=detail)
        for image_id in images.by_id:
            if image_id not in annotated:
                detail = "no annotation has its id: it is neither trained nor tested on"
                yield self._image_fault("image without annotation", images, image_id, detail)
        if others is None:
            return
        for image_id in [key for key in annotated if key not in others]:
            detail = f"{self.instances_json} does not list it"
            yield self._image_fault("images differ", images, image_id, detail)
        for image_id, name in others.items():
            listed = images.by_id.get(image_id, {}).get("file_name", name)
            if image_id not in annotated:
                detail = f"{self.instances_json} lists {name}, no annotation of this json is of it"
                yield self._image_fault("images differ", images, image_id, detail)
            elif name and os.path.basename(listed) != os.path.basename(name):
                detail = f"{self.instances_json} has {name} under this id"
                yield self._image_fault("images differ", images, image_id, detail)

    def _check_present(
        self, sound: Mapping[int, dict[str, Any]], session: Session
    ) -> Iterator[Fault]:
        names = [annotation["file_name"] for annotation in sound.values()]
        for what, root in (("panoptic PNG", self.png_root), ("stuff PNG", self.stuff_root)):
            found = session.look_at(root, names, what) if root else [Decoded()] * len(names)
            for index, facts in zip(sound, found, strict=True):
                if facts.state:
                    reason = f"{what} {facts.state}"
                    yield self._fault(reason, index, sound[index], detail=facts.detail)

    def _image_fault(self, reason: str, images: Images, image_id: object, detail: str) -> Fault:
        return Fault(reason, self.json, (), images.file(image_id), image_id, None, detail)

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
    if lacking := lacking_keys(annotation, "image_id", "file_name", "segments_info"):
        return lacking
    sound = {
        "image_id": is_id(annotation["image_id"]),
        "file_name": is_file_name(annotation["file_name"]),
        "segments_info": isinstance(annotation["segments_info"], list),
    }
    return ", ".join(
        f"{key}={annotation[key]!r}" for key, is_sound in sound.items() if not is_sound
    )


# One image, in a worker -------------------------------------------------------------------------


def _check_task(
    task: tuple[dict[str, Any], Sequence[Size], str],
    target: PanopticTarget,
    known: frozenset,
    labels: dict[int, int] | None,
) -> list[Part]:
    annotation, sizes, look = task
    return list(_check_annotation(annotation, sizes, look, target, known, labels))


def _check_annotation(
    annotation: dict[str, Any],
    sizes: Sequence[Size],
    look: str,
    target: PanopticTarget,
    known: frozenset,
    labels: dict[int, int] | None,
) -> Iterator[Part]:
    segments = yield from _check_segments(annotation["segments_info"], known, target.area)
    expected, name = None, annotation["file_name"]
    if look == "all":
        path = os.path.join(target.png_root, name)
        ids = yield from _check_panoptic_png(path, sizes, segments)
        if ids is not None and labels is not None:
            expected = _expected_labels(ids, segments, labels)
    if look and target.stuff_root is not None:
        stuff = _check_stuff_png(os.path.join(target.stuff_root, name), sizes, labels, expected)
        yield from (part for part in stuff if look == "all" or part[0] == "stuff PNG label unknown")


def _check_segments(
    entries: Sequence[Any], known: frozenset, area: bool
) -> Generator[Part, None, dict[int, tuple[int, dict[str, Any]]]]:
    """Yield what is wrong with the segments of an image; return the sound ones."""
    segments: dict[int, tuple[int, dict[str, Any]]] = {}
    for position, segment in enumerate(entries):
        if problem := _malformed_segment(segment, area):
            segment_id = segment.get("id") if isinstance(segment, Mapping) else None
            yield "segment malformed", (), segment_id, problem
            continue
        if segment["category_id"] not in known:
            yield "category unknown", (), segment["id"], f"category_id={segment['category_id']}"
        if segment["id"] in segments:
            rest = ("segments_info", position)
            yield "segment id twice", rest, segment["id"], "an earlier one has it"
        else:
            segments[segment["id"]] = (position, segment)
    return segments


def _malformed_segment(segment: object, area: bool) -> str:
    needed = ("id", "category_id", *(("area",) if area else ()))  # PQ takes the json's area
    if lacking := lacking_keys(segment, *needed):
        return lacking
    stated = segment.get("area", 0)
    sound = {
        "id": type(segment["id"]) is int,
        "category_id": is_id(segment["category_id"]),
        "area": type(stated) in (int, float) and 0 <= stated < float("inf"),
        "iscrowd": segment.get("iscrowd", 0) in (0, 1),
    }
    return ", ".join(f"{key}={segment.get(key)!r}" for key in sound if not sound[key])


def _check_panoptic_png(
    path: str, sizes: Sequence[Size], segments: Segments
) -> Generator[Part, None, np.ndarray | None]:
    """Yield what is wrong with a panoptic PNG; return its ids."""
    facts, pixels = read_pixels(path, "RGB")
    yield from _file_parts("panoptic PNG", facts, sizes)
    if pixels is None or facts.size not in sizes:
        return None
    ids = rgb_to_id(pixels)
    extents = segment_extents(ids)
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
    return ids


def _compare(segment: Mapping[str, Any], area: int, box: Box) -> Iterator[Part]:
    if "area" in segment and abs(segment["area"] - area) > TOLERANCE:
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


def _expected_labels(ids: np.ndarray, segments: Segments, labels: dict[int, int]) -> np.ndarray:
    """Return the stuff labels that a panoptic PNG leads to, -1 where its own faults hide them."""
    expected = np.where(ids == 0, VOID, -1)
    for number, (_, segment) in segments.items():
        expected[ids == number] = labels.get(segment["category_id"], -1)
    return expected


def _check_stuff_png(
    path: str,
    sizes: Sequence[Size],
    labels: dict[int, int] | None,
    expected: np.ndarray | None,
) -> Iterator[Part]:
    facts, values = read_pixels(path, "L")
    yield from _file_parts("stuff PNG", facts, sizes)
    if values is None or labels is None:
        return
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=VOID + 1)).tolist()
    count = max(labels.values()) + 1
    if unknown := [label for label in present if count <= label != VOID]:
        listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        detail = f"{listed}; there are {count} stuff classes with 'things'"
        yield "stuff PNG label unknown", (), None, detail
    elif expected is not None and values.shape[:2] == expected.shape:
        differs = (values.reshape(expected.shape) != expected) & (expected >= 0)
        share = np.mean(differs)
        if share > _OTHER_LABELS:
            detail = (
                f"{share:.0%} of its pixels have another label than the panoptic PNG's segments"
            )
            yield "stuff PNG of another image", (), None, detail


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
