"""How far an exported model agrees with the one it was made of."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

BOX_TOLERANCE = 1e-3  # pixels of the original picture
SCORE_TOLERANCE = 1e-4
LEAST_EQUAL = 0.999  # of a picture's pixels, in each mask and in the panoptic map
_FAR = 1.0  # pixels: boxes further apart are two detections
_MOST_ROUNDING = 2.0  # of what PyTorch's own float32 differs from float64


class Rounding(NamedTuple):
    """How far boxes and scores of both models are from those of the first in float64."""

    box: tuple[float, float]
    score: tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """What differs between two predictions of a picture.

    Attributes:
        detections: how many both found.
        box: largest difference of a coordinate, in pixels.
        score: largest difference of a score.
        masks: least share of equal pixels in a mask, None without masks.
        panoptic: share of pixels of the same segment, None without a panoptic map.
        alone: what one of both found alone, in words, but for what is as close to a threshold as
            scores may differ.
        rounding: distances from float64, where they were measured.
    """

    detections: int
    box: float
    score: float
    masks: float | None
    panoptic: float | None
    alone: list[str]
    rounding: Rounding | None = None

    @property
    def is_close(self) -> bool:
        """Whether boxes and scores are within the tolerances."""
        return self.box <= BOX_TOLERANCE and self.score <= SCORE_TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether all differences are within the tolerances, or are those of rounding.

        Of a large model float32 itself may be further off than the tolerance. The export may then
        be twice as far from float64 as PyTorch is.
        """
        shares = [each for each in (self.masks, self.panoptic) if each is not None]
        rounded = self.rounding is not None and all(
            theirs <= max(_MOST_ROUNDING * ours, tolerance)
            for (ours, theirs), tolerance in zip(
                self.rounding, (BOX_TOLERANCE, SCORE_TOLERANCE), strict=True
            )
        )
        same = not self.alone and all(each >= LEAST_EQUAL for each in shares)
        return same and (self.is_close or rounded)

    def beside(self, exact: "Agreement", of_export: "Agreement") -> "Agreement":
        """Return this agreement with those of both models with float64."""
        box, score = (exact.box, of_export.box), (exact.score, of_export.score)
        return replace(self, rounding=Rounding(box, score))


def agreement(
    expected: dict[str, Any], found: dict[str, Any], thresholds: dict[str, float]
) -> Agreement:
    """Compare two predictions of a picture.

    Args:
        expected: as a model of Detectron2 returns it.
        found: likewise.
        thresholds: those that both went through, "score" and "detections".
    """
    ours, theirs = expected["instances"].to("cpu"), found["instances"]
    pairs = _pairs(ours, theirs)
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    boxes = ours.pred_boxes.tensor[first] - theirs.pred_boxes.tensor[second]
    masks = None
    if ours.has("pred_masks"):
        equal = (ours.pred_masks[first] == theirs.pred_masks[second]).flatten(1).float()
        masks = float(equal.mean(1).min()) if pairs else 1.0
    panoptic = None
    if "panoptic_seg" in expected:
        panoptic = panoptic_agreement(expected["panoptic_seg"], found["panoptic_seg"])
    lowest = max(_lowest(each, thresholds) for each in (ours, theirs))
    return Agreement(
        detections=len(pairs),
        box=_largest(boxes),
        score=_largest(ours.scores[first] - theirs.scores[second]),
        masks=masks,
        panoptic=panoptic,
        alone=_alone("PyTorch", ours, first, lowest) + _alone("the export", theirs, second, lowest),
    )


def panoptic_agreement(
    expected: tuple[Tensor, list[dict[str, Any]]], found: tuple[Tensor, list[dict[str, Any]]]
) -> float:
    """Return the share of pixels that belong to the same segment, whatever its number.

    Segments are the same if they share more pixels than either shares with any other.

    Example:
        >>> a, b = torch.tensor([[1, 1, 2, 0]]), torch.tensor([[2, 2, 1, 0]])
        >>> of_a = [{"id": 1, "category_id": 5, "isthing": True},
        ...         {"id": 2, "category_id": 6, "isthing": True}]
        >>> of_b = [{**of_a[0], "id": 2}, {**of_a[1], "id": 1}]
        >>> panoptic_agreement((a, of_a), (b, of_b)), panoptic_agreement((a, of_a), (b, of_a))
        (1.0, 0.25)
    """
    (ours, our_segments), (theirs, their_segments) = expected, found
    both = torch.stack([ours.cpu().long().flatten(), theirs.cpu().long().flatten()])
    pairs, counts = both.unique(dim=1, return_counts=True)
    kinds = [{0: None}, {0: None}]
    for kind, segments in zip(kinds, (our_segments, their_segments), strict=True):
        kind.update((each["id"], (each["isthing"], each["category_id"])) for each in segments)
    taken, equal = (set(), set()), 0
    for i in counts.argsort(descending=True).tolist():
        a, b = pairs[:, i].tolist()
        if kinds[0][a] == kinds[1][b] and a not in taken[0] and b not in taken[1]:
            taken[0].add(a)
            taken[1].add(b)
            equal += int(counts[i])
    return equal / both.shape[1]


def _pairs(ours: Instances, theirs: Instances) -> list[tuple[int, int]]:
    """Pair detections of a class, the best first, each with the nearest that is left."""
    if not (len(ours) and len(theirs)):
        return []
    boxes = ours.pred_boxes.tensor[:, None] - theirs.pred_boxes.tensor[None]
    distance = boxes.abs().amax(2)
    distance[ours.pred_classes[:, None] != theirs.pred_classes[None]] = float("inf")
    pairs = []
    for i in ours.scores.argsort(descending=True).tolist():
        nearest = int(distance[i].argmin())
        if distance[i, nearest] <= _FAR:
            pairs.append((i, nearest))
            distance[:, nearest] = float("inf")
    return pairs


def _lowest(found: Instances, thresholds: dict[str, float]) -> float:
    """Return the score that a detection must have to be among those that were kept."""
    full = len(found) >= thresholds["detections"] > 0
    return float(found.scores.min()) if full else thresholds["score"]


def _alone(who: str, found: Instances, paired: list[int], lowest: float) -> list[str]:
    left = [found[i] for i in range(len(found)) if i not in set(paired)]
    return [
        f"{who} alone found class {int(each.pred_classes)} with score {float(each.scores):.5f}"
        for each in left
        if abs(float(each.scores) - lowest) > SCORE_TOLERANCE
    ]


def _largest(differences: Tensor) -> float:
    return float(differences.abs().max()) if differences.numel() else 0.0
