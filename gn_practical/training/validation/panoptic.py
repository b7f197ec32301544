"""Faults of a panoptic json, its PNGs, and the PNGs of stuff labels made from them."""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gn_practical.training.data.coco_format import (
    FILE_NAME,
    FLAG,
    ID,
    LIST,
    VOID,
    WHOLE,
    Kind,
    is_number,
    repeated,
    rgb_to_id,
    stuff_labels,
)
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.validation.coco import Coco, Names, Session, Sound, split
from gn_practical.training.validation.files import Size, read_pixels
from gn_practical.training.validation.findings import Fault

TOLERANCE = 1  # pixels of a segment's area and of each side of its box
_LISTED = 10  # ids of one PNG that the json lacks; more are one fault
_OTHER_LABELS = 0.01  # share of a stuff PNG's pixels that may disagree with the panoptic PNG
_LOOKED_AT = 4  # stuff PNGs whose labels are read where files are not decoded

_ANNOTATION = {"image_id": ID, "file_name": FILE_NAME, "segments_info": LIST}
_SEGMENT = {"id": WHOLE, "category_id": ID}
_AREA: Kind = (
    lambda value: is_number(value) and 0 <= value < float("inf"),
    "a finite number from 0 on",  # PQ takes the json's area
)

Box = tuple[int, int, int, int]  # x, y, width, height
Labels = dict[int, int]  # in stuff PNGs, by category id
Segments = dict[int, tuple[int, dict[str, Any]]]  # position and segment, by id


class Annotation(NamedTuple):
    """One annotation with its index, the sizes of its image, and its sound segments."""

    index: int
    entry: dict[str, Any]
    sizes: Sequence[Size]
    segments: Segments


class PanopticTarget(NamedTuple):
    """A panoptic json with its PNGs and, if given, images and PNGs of stuff labels."""

    json: str
    png_root: str
    image_root: str | None = None  # None to leave the images out
    names: Names | None = None  # id and name of the categories; by default those of the json
    stuff_root: str | None = None  # None to leave the PNGs of stuff labels out
    files: bool = True  # False to check the json alone
    instances_json: str | None = None  # of the same images; compared if it was checked before
    area: bool = True  # whether every segment needs its area, as PQ does

    def check(self, session: Session) -> Iterator[Fault]:
        """Yield all faults; see `InstancesTarget.check`."""
        coco = Coco(self.json, self.image_root, self.names)
        if not (yield from coco.check(session)):
            return
        labels = None
        try:
            labels = stuff_labels(coco.categories, self.json)
        except DatasetError as error:
            yield Fault("category malformed", self.json, detail=str(error))
        sound, wrong = split(coco.annotations, _ANNOTATION)
        for index, problem in wrong.items():
            yield self._fault("annotation malformed", index, coco.annotations[index], problem)
        yield from self._check_images(sound, coco, session.images.get(self.instances_json))
        known = []
        for index, entry in sound.items():
            if entry["image_id"] in coco.by_id:
                segments = yield from self._check_segments(index, entry, coco.category_ids)
                known.append(Annotation(index, entry, coco.sizes[entry["image_id"]], segments))
        if self.files and session.pool is None:
            yield from self._check_present(sound, session)
            for annotation in known[: _LOOKED_AT if self.stuff_root else 0]:
                found = self._check_stuff_png(annotation, labels, None)
                yield from (fault for fault in found if fault.reason == "stuff PNG label unknown")
        elif self.files:
            check = partial(self.check_pngs, labels=labels)
            title = f"Panoptic PNGs of {os.path.basename(self.json)}"
            for faults in session.pool.map(check, known, title, 16):
                yield from faults

    def _check_images(
        self, sound: Sound, coco: Coco, others: dict[Any, str] | None
    ) -> Iterator[Fault]:
        """Compare the images that are annotated with those listed, here and in the other json."""
        for index in repeated({index: a["image_id"] for index, a in sound.items()}):
            detail = "an earlier one is of the same image"
            yield self._fault("panoptic annotation twice", index, sound[index], detail)
        annotated = {annotation["image_id"]: index for index, annotation in sound.items()}
        for image_id, index in annotated.items():
            if coco.lacks(image_id):
                detail = f"{image_id=} is not among the images"
                reason = "panoptic annotation of unknown image"
                yield self._fault(reason, index, sound[index], detail)
        for image_id in coco.by_id:
            if image_id not in annotated:
                detail = "no annotation has its id: it is neither trained nor tested on"
                yield self._image_fault("image without annotation", coco, image_id, detail)
        if others is None:
            return
        for image_id in {**annotated, **others}:
            name, listed = others.get(image_id), coco.by_id.get(image_id, {}).get("file_name")
            if image_id not in others:
                detail = "does not list it"
            elif image_id not in annotated:
                detail = f"lists {name}, no annotation of this json is of it"
            elif name and listed and os.path.basename(listed) != os.path.basename(name):
                detail = f"has {name} under this id"
            else:
                continue
            detail = f"{self.instances_json} {detail}"
            yield self._image_fault("images differ", coco, image_id, detail)

    def _check_present(self, sound: Sound, session: Session) -> Iterator[Fault]:
        names = [annotation["file_name"] for annotation in sound.values()]
        for what, root in (("panoptic PNG", self.png_root), ("stuff PNG", self.stuff_root)):
            looks = session.look_at(root, names, what) if root else []
            for index, facts in zip(sound, looks, strict=bool(root)):
                for reason, detail in facts.findings(what, []):
                    yield self._fault(reason, index, sound[index], detail)

    def _image_fault(self, reason: str, coco: Coco, image_id: object, detail: str) -> Fault:
        return Fault(reason, self.json, (), coco.file(image_id), image_id, None, detail)

    def _fault(
        self,
        reason: str,
        index: int,
        entry: object,
        detail: str,
        segment_id: object = None,
        rest: tuple[str | int, ...] = (),
    ) -> Fault:
        values = entry if isinstance(entry, Mapping) else {}
        root = self.stuff_root if reason.startswith("stuff") else self.png_root
        name = values.get("file_name")
        file = os.path.join(root, name) if isinstance(name, str) else ""
        place = ("annotations", index, *rest)
        return Fault(reason, self.json, place, file, values.get("image_id"), segment_id, detail)

    def _check_segments(
        self, index: int, entry: dict[str, Any], categories: frozenset
    ) -> Generator[Fault, None, Segments]:
        """Yield what is wrong with the segments of an image; return the sound ones."""
        segments: Segments = {}
        entries = entry["segments_info"]
        needed = {**_SEGMENT, "area": _AREA} if self.area else _SEGMENT
        sound, wrong = split(entries, needed, {"area": _AREA, "iscrowd": FLAG})
        for position, problem in wrong.items():
            segment = entries[position]
            segment_id = segment.get("id") if isinstance(segment, Mapping) else None
            yield self._fault("segment malformed", index, entry, problem, segment_id)
        for position, segment in sound.items():
            number, category = segment["id"], segment["category_id"]
            if category not in categories:
                detail = f"category_id={category}"
                yield self._fault("category unknown", index, entry, detail, number)
            if number in segments:
                place = ("an earlier one has it", number, ("segments_info", position))
                yield self._fault("segment id twice", index, entry, *place)
            else:
                segments[number] = (position, segment)
        return segments

    def check_pngs(self, annotation: Annotation, labels: Labels | None) -> list[Fault]:
        """Return what is wrong with the PNGs of an image."""
        index, entry, sizes, segments = annotation
        facts, pixels = read_pixels(os.path.join(self.png_root, entry["file_name"]), "RGB")
        details = facts.findings("panoptic PNG", sizes)
        faults = [self._fault(reason, index, entry, detail) for reason, detail in details]
        expected = None
        if pixels is not None and facts.size in sizes:
            ids = rgb_to_id(pixels)
            faults += self._check_ids(annotation, ids)
            if self.stuff_root is not None and labels is not None:
                expected = _expected_labels(ids, segments, labels)
        if self.stuff_root is not None:
            faults += self._check_stuff_png(annotation, labels, expected)
        return faults

    def _check_ids(self, annotation: Annotation, ids: np.ndarray) -> Iterator[Fault]:
        """Compare the pixels of a panoptic PNG with the segments of the json."""
        index, entry, _, segments = annotation
        extents = segment_extents(ids)
        extents.pop(0, None)  # void
        for number, (position, segment) in segments.items():
            if number not in extents:
                detail = "0 is void" if number == 0 else "no pixel has its id"
                place = (detail, number, ("segments_info", position))
                yield self._fault("segment in the json alone", index, entry, *place)
                continue
            for reason, detail in _compare(segment, *extents[number]):
                yield self._fault(reason, index, entry, detail, number)
        strangers = [number for number in extents if number not in segments]
        for number in strangers[:_LISTED]:
            detail = f"{extents[number][0]} pixels have its id"
            yield self._fault("segment in the PNG alone", index, entry, detail, number)
        if len(strangers) > _LISTED:
            detail = f"and {len(strangers) - _LISTED} more ids; was the PNG resized or made a JPEG?"
            yield self._fault("segment in the PNG alone", index, entry, detail)

    def _check_stuff_png(
        self, annotation: Annotation, labels: Labels | None, expected: np.ndarray | None
    ) -> Iterator[Fault]:
        index, entry, sizes, _ = annotation
        facts, values = read_pixels(os.path.join(self.stuff_root, entry["file_name"]), "L")
        for reason, detail in facts.findings("stuff PNG", sizes):
            yield self._fault(reason, index, entry, detail)
        if values is None or labels is None:
            return
        count = max(labels.values()) + 1
        if unknown := [label for label in np.unique(values).tolist() if count <= label != VOID]:
            listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            detail = f"{listed}; there are {count} stuff classes with 'things'"
            yield self._fault("stuff PNG label unknown", index, entry, detail)
        elif expected is not None and values.shape[:2] == expected.shape:
            share = np.mean((values.reshape(expected.shape) != expected) & (expected >= 0))
            if share > _OTHER_LABELS:
                detail = f"{share:.0%} of its pixels have another label than the panoptic PNG's"
                yield self._fault("stuff PNG of another image", index, entry, f"{detail} segments")


def _compare(segment: Mapping[str, Any], area: int, box: Box) -> Iterator[tuple[str, str]]:
    if "area" in segment and abs(segment["area"] - area) > TOLERANCE:
        yield "segment area differs", f"{segment['area']} in the json, {area} pixels in the PNG"
    if "bbox" in segment:
        stated = segment["bbox"]
        try:
            agrees = np.shape(stated) == (4,) and np.allclose(stated, box, rtol=0, atol=TOLERANCE)
        except (TypeError, ValueError):
            agrees = False
        if not agrees:
            yield "segment box differs", f"{stated} in the json, {list(box)} in the PNG"


def _expected_labels(ids: np.ndarray, segments: Segments, labels: Labels) -> np.ndarray:
    """Return the stuff labels that a panoptic PNG leads to, -1 where its own faults hide them."""
    expected = np.where(ids == 0, VOID, -1)
    for number, (_, segment) in segments.items():
        expected[ids == number] = labels.get(segment["category_id"], -1)
    return expected


def segment_extents(ids: np.ndarray) -> dict[int, tuple[int, Box]]:
    """Measure every segment of a panoptic PNG, ``(H, W)``: its pixels and its box.

    Works on runs of equal pixels, which are few.

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
    boxes = map(tuple, np.stack([x, y, right - x, bottom - y], axis=1).tolist())
    return dict(zip(numbers.tolist(), zip(areas.tolist(), boxes, strict=True), strict=True))
