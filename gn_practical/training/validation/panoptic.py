"""Faults of a panoptic json, its PNGs, and the PNGs of stuff labels made from them."""

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
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
from gn_practical.training.validation.coco import Coco, Names, Session, Sound, describe_size, split
from gn_practical.training.validation.files import Decoded, Size, read_pixels
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
Part = tuple[str, tuple[str | int, ...], Any, str]  # reason, rest of the entry, segment id, detail
Segments = dict[int, tuple[int, dict[str, Any]]]  # position and segment, by id


class Task(NamedTuple):
    """One annotation: its file name, the sizes of its image, its sound segments."""

    name: str
    sizes: Sequence[Size]
    segments: Segments


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
            annotation = coco.annotations[index]
            yield self._fault("annotation malformed", index, annotation, detail=problem)
        yield from self._check_images(sound, coco, session.images.get(self.instances_json))
        tasks, known = {}, coco.category_ids
        for index, annotation in sound.items():
            if annotation["image_id"] in coco.by_id:
                parts, segments = _check_segments(annotation["segments_info"], known, self.area)
                yield from self._faults(index, annotation, parts)
                sizes = coco.sizes[annotation["image_id"]]
                tasks[index] = Task(annotation["file_name"], sizes, segments)
        if self.files and session.pool is None:
            yield from self._check_present(sound, session)
            yield from self._look_at_labels(sound, tasks, labels)
        elif self.files:
            check = partial(_check_pngs, target=self, labels=labels)
            title = f"Panoptic PNGs of {os.path.basename(self.json)}"
            results = session.pool.map(check, list(tasks.values()), title, 16)
            for index, parts in zip(tasks, results, strict=True):
                yield from self._faults(index, sound[index], parts)

    def _check_images(
        self, sound: Sound, coco: Coco, others: dict[Any, str] | None
    ) -> Iterator[Fault]:
        """Compare the images that are annotated with those listed, here and in the other json."""
        for index in repeated({index: a["image_id"] for index, a in sound.items()}):
            detail = "an earlier one is of the same image"
            yield self._fault("panoptic annotation twice", index, sound[index], detail=detail)
        annotated = {annotation["image_id"]: index for index, annotation in sound.items()}
        for image_id, index in annotated.items():
            if coco.lacks(image_id):
                detail = f"{image_id=} is not among the images"
                reason = "panoptic annotation of unknown image"
                yield self._fault(reason, index, sound[index], detail=detail)
        for image_id in coco.by_id:
            if image_id not in annotated:
                detail = "no annotation has its id: it is neither trained nor tested on"
                yield self._image_fault("image without annotation", coco, image_id, detail)
        if others is None:
            return
        for image_id in [key for key in annotated if key not in others]:
            detail = f"{self.instances_json} does not list it"
            yield self._image_fault("images differ", coco, image_id, detail)
        for image_id, name in others.items():
            listed = coco.by_id.get(image_id, {}).get("file_name", name)
            if image_id not in annotated:
                detail = f"{self.instances_json} lists {name}, no annotation of this json is of it"
                yield self._image_fault("images differ", coco, image_id, detail)
            elif name and os.path.basename(listed) != os.path.basename(name):
                detail = f"{self.instances_json} has {name} under this id"
                yield self._image_fault("images differ", coco, image_id, detail)

    def _check_present(self, sound: Sound, session: Session) -> Iterator[Fault]:
        names = [annotation["file_name"] for annotation in sound.values()]
        for what, root in (("panoptic PNG", self.png_root), ("stuff PNG", self.stuff_root)):
            looks = session.look_at(root, names, what) if root else [Decoded()] * len(names)
            for index, facts in zip(sound, looks, strict=True):
                if facts.state:
                    reason = f"{what} {facts.state}"
                    yield self._fault(reason, index, sound[index], detail=facts.detail)

    def _look_at_labels(
        self, sound: Sound, tasks: Mapping[int, Task], labels: dict[int, int] | None
    ) -> Iterator[Fault]:
        for index, task in islice(tasks.items(), _LOOKED_AT if self.stuff_root else 0):
            parts = _check_stuff_png(self, task, labels, None)
            told = [part for part in parts if part[0] == "stuff PNG label unknown"]
            yield from self._faults(index, sound[index], told)

    def _image_fault(self, reason: str, coco: Coco, image_id: object, detail: str) -> Fault:
        return Fault(reason, self.json, (), coco.file(image_id), image_id, None, detail)

    def _faults(self, index: int, annotation: object, parts: Iterable[Part]) -> Iterator[Fault]:
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


def _check_segments(
    entries: Sequence[Any], known: frozenset, area: bool
) -> tuple[list[Part], Segments]:
    """Return what is wrong with the segments of an image, and the sound ones."""
    segments: Segments = {}
    needed = {**_SEGMENT, "area": _AREA} if area else _SEGMENT
    sound, wrong = split(entries, needed, {"area": _AREA, "iscrowd": FLAG})
    ids = {i: entries[i].get("id") if isinstance(entries[i], Mapping) else None for i in wrong}
    parts = [("segment malformed", (), ids[i], problem) for i, problem in wrong.items()]
    for position, segment in sound.items():
        number, category = segment["id"], segment["category_id"]
        if category not in known:
            parts.append(("category unknown", (), number, f"category_id={category}"))
        if number in segments:
            rest = ("segments_info", position)
            parts.append(("segment id twice", rest, number, "an earlier one has it"))
        else:
            segments[number] = (position, segment)
    return parts, segments


# One image, in a worker -------------------------------------------------------------------------


def _check_pngs(task: Task, target: PanopticTarget, labels: dict[int, int] | None) -> list[Part]:
    return list(_parts(task, target, labels))  # a generator cannot come back from a worker


def _parts(task: Task, target: PanopticTarget, labels: dict[int, int] | None) -> Iterator[Part]:
    ids = yield from _check_panoptic_png(os.path.join(target.png_root, task.name), task)
    if target.stuff_root is not None:
        has_labels = ids is not None and labels is not None
        expected = _expected_labels(ids, task.segments, labels) if has_labels else None
        yield from _check_stuff_png(target, task, labels, expected)


def _check_panoptic_png(path: str, task: Task) -> Generator[Part, None, np.ndarray | None]:
    """Yield what is wrong with a panoptic PNG; return its ids."""
    facts, pixels = read_pixels(path, "RGB")
    yield from _file_parts("panoptic PNG", facts, task.sizes)
    if pixels is None or facts.size not in task.sizes:
        return None
    ids = rgb_to_id(pixels)
    extents = segment_extents(ids)
    extents.pop(0, None)  # void
    for number, (position, segment) in task.segments.items():
        if number not in extents:
            rest = ("segments_info", position)
            detail = "0 is void" if number == 0 else "no pixel has its id"
            yield "segment in the json alone", rest, number, detail
        else:
            yield from _compare(segment, *extents[number])
    strangers = [number for number in extents if number not in task.segments]
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
    target: PanopticTarget,
    task: Task,
    labels: dict[int, int] | None,
    expected: np.ndarray | None,
) -> Iterator[Part]:
    facts, values = read_pixels(os.path.join(target.stuff_root, task.name), "L")
    yield from _file_parts("stuff PNG", facts, task.sizes)
    if values is None or labels is None:
        return
    count = max(labels.values()) + 1
    if unknown := [label for label in np.unique(values).tolist() if count <= label != VOID]:
        listed = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        detail = f"{listed}; there are {count} stuff classes with 'things'"
        yield "stuff PNG label unknown", (), None, detail
    elif expected is not None and values.shape[:2] == expected.shape:
        share = np.mean((values.reshape(expected.shape) != expected) & (expected >= 0))
        if share > _OTHER_LABELS:
            detail = f"{share:.0%} of its pixels have another label than the panoptic PNG's"
            yield "stuff PNG of another image", (), None, f"{detail} segments"


def _file_parts(what: str, facts: Decoded, sizes: Sequence[Size]) -> Iterator[Part]:
    if facts.state:
        yield f"{what} {facts.state}", (), None, facts.detail
    if facts.size is not None and facts.size not in sizes:
        yield f"{what} of another size", (), None, describe_size(facts, sizes[0])


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
    boxes = np.stack([x, y, right - x, bottom - y], axis=1).tolist()
    return {
        number: (area, tuple(box))
        for number, area, box in zip(numbers.tolist(), areas.tolist(), boxes, strict=True)
    }
