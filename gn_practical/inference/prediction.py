"""What a model predicts of one picture."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from torch import Tensor

from gn_practical.inference.classes import Chosen, Classes
from gn_practical.inference.painting import paint

DRAWN = 0.5  # least score of what is drawn, where nobody says


class Segment(NamedTuple):
    """One segment of a panoptic map.

    Attributes:
        id: its value in the map, from 1.
        category: number of its class among the model's things or stuff.
        is_thing: which of these.
        name: of its class.
        score: of a thing's detection; None of stuff.
        area: pixels.
    """

    id: int
    category: int
    is_thing: bool
    name: str
    score: float | None
    area: int


@dataclass
class Prediction:
    """What a model predicts of one picture.

    Attributes:
        pixels: the picture, ``(H, W, 3)`` RGB, of its own size.
        classes: of the model.
        instances: detections, the highest score first, in pixels of the picture: Detectron2's
            ``Instances`` on the CPU with ``pred_boxes`` (x0, y0, x1, y1), ``scores``,
            ``pred_classes``, and of some models ``pred_masks``; None for a model without.
        panoptic: ``(H, W)`` ids of segments, 0 for none; None for a model without.
        segments: those of ``panoptic``.
        class_map: ``(H, W)`` numbers of stuff classes, of a model of semantic classes alone.
        file_name: where the picture was read from, if it was.
        least_score: of what :meth:`draw` draws.
    """

    pixels: np.ndarray
    classes: Classes
    instances: Instances | None = None
    panoptic: np.ndarray | None = None
    segments: list[Segment] = field(default_factory=list)
    class_map: np.ndarray | None = None
    file_name: str | None = None
    least_score: float = DRAWN

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @cached_property
    def names(self) -> list[str]:
        """The class of each instance, in words."""
        if self.instances is None or not self.instances.has("pred_classes"):
            return []
        return [self.classes.name(each) for each in self.instances.pred_classes.tolist()]

    def draw(self, scale: float | None = None) -> np.ndarray:
        """Return a picture of the prediction, ``(H, W, 3)`` RGB.

        Args:
            scale: of its sides; by default small pictures are enlarged until texts are readable.
        """
        return paint(self, scale)

    def coco_instances(self, image_id: Any = 0) -> list[dict[str, Any]]:
        """Return the instances in COCO's format of results: boxes, scores, masks as RLE.

        Args:
            image_id: of the picture in the data set.
        """
        if self.instances is None:
            return []
        if not self.instances.has("scores"):  # proposals
            return _proposals(self.instances, image_id)
        found = instances_to_coco_json(self.instances, image_id)
        ids = {each: self.classes.dataset_id(each) for each in {d["category_id"] for d in found}}
        return [{**each, "category_id": ids[each["category_id"]]} for each in found]

    def coco_segments(self) -> list[dict[str, Any]]:
        """Return the segments as the ``segments_info`` of COCO's panoptic format."""
        return [
            {
                "id": each.id,
                "category_id": self.classes.dataset_id(each.category, each.is_thing),
                "isthing": int(each.is_thing),
                "area": each.area,
                **({} if each.score is None else {"score": round(each.score, 5)}),
            }
            for each in self.segments
        ]


def make_prediction(
    output: Mapping[str, Any],
    pixels: np.ndarray,
    classes: Classes,
    *,
    threshold: float | None = None,
    chosen: Chosen | None = None,
    file_name: str | None = None,
) -> Prediction:
    """Return the prediction in a model's output for one picture.

    Args:
        output: as Detectron2's models give it.
        pixels: the picture in RGB.
        classes: of the model.
        threshold: least score of instances that are kept.
        chosen: classes that are kept; by default all.
        file_name: of the picture.
    """
    prediction = Prediction(pixels, classes, file_name=file_name)
    if threshold is not None:
        prediction.least_score = threshold
    if "instances" in output or "proposals" in output:
        found = output["instances" if "instances" in output else "proposals"].to("cpu")
        prediction.instances = _kept(found, threshold, chosen)
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        prediction.panoptic, prediction.segments = _panoptic(ids, segments, classes, chosen)
    elif "sem_seg" in output:
        prediction.class_map = _class_map(output["sem_seg"], chosen)
    return prediction


def _kept(instances: Instances, threshold: float | None, chosen: Chosen | None) -> Instances:
    if threshold is not None and instances.has("scores"):
        instances = instances[instances.scores >= threshold]
    if chosen is not None and instances.has("pred_classes"):
        kept = [(True, each) in chosen for each in instances.pred_classes.tolist()]
        instances = instances[torch.tensor(kept, dtype=torch.bool)]
    return instances


def _panoptic(
    ids: Tensor, found: list[dict[str, Any]], classes: Classes, chosen: Chosen | None
) -> tuple[np.ndarray, list[Segment]]:
    panoptic = ids.cpu().numpy().astype(np.int32)
    areas = np.bincount(panoptic.ravel())
    segments, dropped = [], np.zeros(len(areas), bool)
    for each in found:
        number, category, is_thing = each["id"], each["category_id"], bool(each["isthing"])
        if chosen is not None and (is_thing, category) not in chosen:
            dropped[number] = True
            continue
        name, score = classes.name(category, is_thing), each.get("score")
        score = None if score is None else float(score)
        segments.append(Segment(number, category, is_thing, name, score, int(areas[number])))
    if dropped.any():
        panoptic[dropped[panoptic]] = 0
    return panoptic, segments


def _class_map(scores: Tensor, chosen: Chosen | None) -> np.ndarray:
    classes = scores.argmax(dim=0).cpu().numpy().astype(np.int32)
    if chosen is not None:
        classes[~np.isin(classes, [each for thing, each in chosen.classes if not thing])] = -1
    return classes


def _proposals(proposals: Instances, image_id: Any) -> list[dict[str, Any]]:
    boxes = proposals.proposal_boxes.tensor.tolist()
    scores = proposals.objectness_logits.tolist()
    return [
        {"image_id": image_id, "category_id": 0, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True)
    ]
