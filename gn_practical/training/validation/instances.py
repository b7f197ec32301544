"""Faults of a json of instances."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gn_practical.training.data.coco_format import ANYTHING, FLAG, ID, NUMBER, repeated
from gn_practical.training.validation.annotations import boxes_of, check_instances
from gn_practical.training.validation.coco import Coco, Names, Session, Sound, split
from gn_practical.training.validation.findings import Fault
from gn_practical.training.validation.masks import TOLERANCE

_AT_ONCE = 50_000  # annotations whose numbers are in memory together
_NEEDED = {"id": ID, "image_id": ID, "category_id": ID, "bbox": ANYTHING}
_OPTIONAL = {
    "iscrowd": FLAG,  # Detectron2 leaves crowds (1) out, stops at what is ignored, and counts on 0
    "ignore": (lambda value: value == 0, "0: Detectron2 refuses others"),
    "area": NUMBER,
}


class InstancesTarget(NamedTuple):
    """A json of instances with its images."""

    json: str
    image_root: str | None = None  # None to check the json alone
    names: Names | None = None  # id and name of the categories; by default those of the json
    masks: bool | None = None  # whether every instance needs a mask; None: where others have one
    area: bool = False  # whether every instance needs its area
    rle: bool = True  # whether masks that are trained on may be RLE
    trains: bool = False  # whether an instance is needed to train on

    def check(self, session: Session) -> Iterator[Fault]:
        """Yield all faults.

        Raises:
            DatasetError: if the json is missing or no json.
        """
        coco = Coco(self.json, self.image_root, self.names)
        if not (yield from coco.check(session)):
            return
        sound, wrong = split(coco.annotations, _NEEDED, _OPTIONAL)
        found = [("annotation malformed", index, detail) for index, detail in wrong.items()]
        found += _check_list(sound, coco)
        for reason, index, detail in found:
            yield _fault(coco, reason, index, detail)
        known = [index for index, a in sound.items() if a["image_id"] in coco.by_id]
        annotations = [sound[index] for index in known]
        sizes = np.array([coco.sizes[a["image_id"]] for a in annotations]).reshape(-1, 2, 2)
        for reason, detail in self._check_together(annotations, sizes):
            yield Fault(reason, self.json, detail=detail)
        needs_mask = self.masks
        if needs_mask is None:
            listed = (a for a in coco.annotations if isinstance(a, Mapping))
            needs_mask = any(a.get("segmentation") for a in listed)
        asked = (coco.category_ids, _num_keypoints(coco), needs_mask, self.area)
        for start in range(0, len(known), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            for index, reason, detail in check_instances(annotations[part], sizes[part], *asked):
                yield _fault(coco, reason, known[start + index], detail)

    def _check_together(
        self, annotations: Sequence[dict[str, Any]], sizes: np.ndarray
    ) -> Iterator[tuple[str, str]]:
        """Yield what only a look at all annotations shows."""
        singles = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
        if self.trains and not singles:
            yield "nothing to train on", "no image has an instance that is no crowd"
        elif annotations and not singles:
            detail = f"all {len(annotations)} instances are crowds: AP is of no instance"
            yield "crowds alone", detail
        if not self.rle and (rle := sum(isinstance(a.get("segmentation"), dict) for a in singles)):
            yield "RLE but no bitmask", f"{rle} masks that INPUT.MASK_FORMAT 'polygon' cannot hold"
        if annotations:
            yield from _check_form(boxes_of(annotations), sizes[:, 1] + TOLERANCE)


def _num_keypoints(coco: Coco) -> dict[int, int]:
    lists = {category["id"]: category.get("keypoints") for category in coco.categories}
    return {key: len(names) for key, names in lists.items() if isinstance(names, list)}


def _fault(coco: Coco, reason: str, index: int, detail: str) -> Fault:
    annotation = coco.annotations[index]
    values = annotation if isinstance(annotation, Mapping) else {}
    image_id = values.get("image_id")
    place = (("annotations", index), coco.file(image_id), image_id, values.get("id"))
    return Fault(reason, coco.path, *place, detail)


def _check_list(annotations: Sound, coco: Coco) -> Iterator[tuple[str, int, str]]:
    """Yield what one annotation is among the others: of no image, or there already."""
    for index, annotation in annotations.items():
        image_id = annotation["image_id"]
        if annotation["id"] == 0:
            yield "annotation id is 0", index, "pycocotools counts its match as none"
        if coco.lacks(image_id):
            yield "annotation of unknown image", index, f"{image_id=} is not among the images"
    twice = set(repeated({index: annotation["id"] for index, annotation in annotations.items()}))
    yield from (("annotation id twice", index, "an earlier one has it") for index in sorted(twice))
    first: dict[tuple, dict[str, Any]] = {}
    for index, annotation in annotations.items():
        key = (annotation["image_id"], annotation["category_id"], str(annotation["bbox"]))
        earlier = first.setdefault(key, annotation)
        if earlier is annotation or index in twice:
            continue
        if all(earlier.get(part) == annotation.get(part) for part in ("segmentation", "keypoints")):
            yield "annotation repeated", index, "an earlier one is of the same class, box and mask"


def _check_form(boxes: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield in which other form than x, y, width, height all boxes are."""
    if not np.isfinite(boxes).all():  # which is told of each
        return
    if boxes.max() <= 1 and (boxes % 1).any() and sizes.min() > 2 + TOLERANCE:
        yield "boxes between 0 and 1", f"all {len(boxes)}: bbox must be in pixels"
    low, high = boxes[:, :2], boxes[:, 2:]
    beyond = (low + high > sizes).any(axis=1)
    if beyond.any() and ((high > low) & (high <= sizes)).all():
        detail = f"{beyond.sum()} of {len(boxes)} reach beyond their images as x, y, width, height,"
        yield "boxes of corners", f"{detail} and none as x1, y1, x2, y2"
