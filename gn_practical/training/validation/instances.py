"""Faults of a json of instances."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gn_practical.training.validation.annotations import (
    TOLERANCE,
    Expected,
    Size,
    check_instance,
)
from gn_practical.training.validation.findings import Fault, Finding, Findings
from gn_practical.training.validation.images import (
    Images,
    Names,
    Session,
    category_ids,
    check_lists,
    is_id,
    lacking_keys,
    repeated,
    sound_categories,
)

Task = tuple[int, dict[str, Any], Sequence[Size]]  # index, annotation, sizes of its image


class InstancesTarget(NamedTuple):
    """A json of instances with its images.

    Attributes:
        json: path of the json.
        image_root: folder of the images; None to check the json alone.
        names: id and name of the categories; by default those of the json.
        masks: whether every instance needs a mask; None if it does where others have one.
        area: whether every instance needs its area.
        rle: whether masks that are trained on may be RLE.
        trains: whether an instance is needed to train on.
    """

    json: str
    image_root: str | None = None
    names: Names | None = None
    masks: bool | None = None
    area: bool = False
    rle: bool = True
    trains: bool = False

    def check(self, session: Session) -> Iterator[Fault]:
        """Yield all faults.

        Args:
            session: what the targets of one validation share.

        Raises:
            DatasetError: if the json is missing or no json.
        """
        opened = yield from check_lists(self.json, self.image_root, self.names, session)
        if not opened:
            return
        content, images = opened
        sound, tasks = {}, []
        for index, annotation in enumerate(content["annotations"]):
            if problem := _malformed(annotation):
                yield self._fault(images, "annotation malformed", index, annotation, problem)
                continue
            sound[index] = annotation
            if annotation["image_id"] in images.by_id:
                tasks.append((index, annotation, images.sizes[annotation["image_id"]]))
        for reason, index, detail in _check_list(sound, images):
            yield self._fault(images, reason, index, sound[index], detail)
        for reason, detail in self._check_together(tasks):
            yield Fault(reason, self.json, detail=detail)
        check = partial(_check_task, expected=self._expected(content, session.decode))
        title = f"Annotations of {os.path.basename(self.json)}"
        results = session.pool.map(check, tasks, title, 512)
        for (index, annotation, _), findings in zip(tasks, results, strict=True):
            for reason, detail in findings:
                yield self._fault(images, reason, index, annotation, detail)

    def _check_together(self, tasks: Sequence[Task]) -> Findings:
        """Yield what only a look at all annotations shows."""
        singles = [annotation for _, annotation, _ in tasks if not annotation.get("iscrowd", 0)]
        if self.trains and not singles:
            yield "nothing to train on", "no image has an instance that is no crowd"
        elif tasks and not singles:
            yield "crowds alone", f"all {len(tasks)} instances are crowds: AP is of no instance"
        if not self.rle and (rle := sum(isinstance(a.get("segmentation"), dict) for a in singles)):
            yield "RLE but no bitmask", f"{rle} masks that INPUT.MASK_FORMAT 'polygon' cannot hold"
        if tasks:
            yield from _check_boxes(tasks)

    def _expected(self, content: dict[str, Any], compare: bool) -> Expected:
        keypoints = {
            category["id"]: len(category["keypoints"])
            for category in sound_categories(content)
            if isinstance(category.get("keypoints"), list)
        }
        masks = self.masks
        if masks is None:
            annotations = content["annotations"]
            masks = any(isinstance(a, dict) and a.get("segmentation") for a in annotations)
        known = category_ids(content, self.names)
        return Expected(known, keypoints, masks, self.area, compare)

    def _fault(
        self, images: Images, reason: str, index: int, annotation: object, detail: str
    ) -> Fault:
        values = annotation if isinstance(annotation, Mapping) else {}
        image_id = values.get("image_id")
        place = (("annotations", index), images.file(image_id), image_id, values.get("id"))
        return Fault(reason, self.json, *place, detail)


def _check_task(task: Task, expected: Expected) -> list[Finding]:
    _, annotation, sizes = task
    return list(check_instance(annotation, sizes, expected))


def _malformed(annotation: object) -> str:
    if lacking := lacking_keys(annotation, "id", "image_id", "category_id", "bbox"):
        return lacking
    wrong = [key for key in ("id", "image_id", "category_id") if not is_id(annotation[key])]
    return ", ".join(f"{key}={annotation[key]!r}" for key in wrong)


def _check_list(
    annotations: Mapping[int, dict[str, Any]], images: Images
) -> Iterator[tuple[str, int, str]]:
    """Yield what one annotation is among the others: of no image, or there already."""
    for index, annotation in annotations.items():
        if annotation["id"] == 0:
            yield "annotation id is 0", index, "pycocotools counts its match as none"
        if images.lacks(annotation["image_id"]):
            image_id = annotation["image_id"]
            yield "annotation of unknown image", index, f"{image_id=} is not among the images"
    twice = set(repeated({index: annotation["id"] for index, annotation in annotations.items()}))
    yield from (("annotation id twice", index, "an earlier one has it") for index in twice)
    first: dict[tuple, dict[str, Any]] = {}
    for index, annotation in annotations.items():
        key = (annotation["image_id"], annotation["category_id"], str(annotation["bbox"]))
        earlier = first.setdefault(key, annotation)
        parts = ("segmentation", "keypoints")
        alike = all(earlier.get(part) == annotation.get(part) for part in parts)
        if alike and earlier is not annotation and index not in twice:
            yield "annotation repeated", index, "an earlier one is of the same class, box and mask"


def _check_boxes(tasks: Sequence[Task]) -> Findings:
    """Yield what all boxes together show: that they are in another form."""
    try:
        boxes = np.array([annotation["bbox"] for _, annotation, _ in tasks], float)
        x, y, right, bottom = boxes.T
    except (TypeError, ValueError, OverflowError):  # malformed, which is told of each
        return
    width, height = np.array([sizes[-1] for _, _, sizes in tasks], float).T + TOLERANCE
    if not np.isfinite(boxes).all():
        return
    if boxes.max() <= 1 and (boxes % 1).any() and min(width.min(), height.min()) > 2 + TOLERANCE:
        yield "boxes between 0 and 1", f"all {len(boxes)}: bbox must be in pixels"
    beyond = (x + right > width) | (y + bottom > height)
    corners = (right > x) & (bottom > y) & (right <= width) & (bottom <= height)
    if beyond.any() and corners.all():
        detail = f"{beyond.sum()} of {len(boxes)} reach beyond their images as x, y, width, height,"
        yield "boxes of corners", f"{detail} and none as x1, y1, x2, y2"
