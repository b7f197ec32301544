"""Which errors cost how much AP: TIDE's six kinds (Bolya et al. 2020, arXiv:2008.08115)."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO

POSITIVE, BACKGROUND = 0.5, 0.1  # IoU from which a detection counts, up to which it hits nothing

# "missed" are the annotations that no detection means, not even one of the wrong place or class.
ERRORS = ("classification", "localization", "both", "duplicate", "background", "missed")
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)
_CORRECT = -1
_RECALLS = np.linspace(0, 1, 101)  # as in COCO's AP


class Judged(NamedTuple):
    """All detections that count, by image and falling score, and all annotations but crowds.

    Of a detection: ``ids``, ``classes``, ``scores``; ``kinds``, an index of ``ERRORS`` or -1 where
    it is correct; ``targets``, the annotation's index that it would match with another place or
    class, -1 for none; ``mended``, whether it would: no other detection has the annotation, or is
    a better candidate. Of an annotation: ``true_classes``, ``found``, and ``missed``.
    """

    ids: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    kinds: np.ndarray
    targets: np.ndarray
    mended: np.ndarray
    true_classes: np.ndarray
    found: np.ndarray
    missed: np.ndarray


class MissingAp(NamedTuple):
    """AP50 and what each kind of error takes from it, in percent; NaN where there is no AP.

    ``overall``: "AP50", the kinds of ``ERRORS``, "false_positives", "false_negatives". ``classes``:
    the same of each class. ``counts``: how many detections, or annotations, are of each kind.
    """

    overall: dict[str, float]
    classes: dict[int, dict[str, float]]
    counts: dict[str, int]


def judge(truth: COCO, detections: list[dict[str, Any]], task: str, max_dets: int = 100) -> Judged:
    """Match detections with annotations as pycocotools does at IoU 0.5, and name every error.

    Args:
        truth: annotations whose ids are numbers from 1.
        detections: COCO's dicts, with these numbers; "bbox" or, as RLE, "segmentation" is read.
        task: "bbox" or "segm".
        max_dets: how many detections of a class count in an image.
    """
    by_image: dict[int, list[int]] = defaultdict(list)
    for index, detection in enumerate(detections):
        by_image[detection["image_id"]].append(index)
    rows: list[tuple] = []
    true_classes: list[int] = []
    for image in sorted(truth.imgs):
        annotations = truth.imgToAnns.get(image, [])
        own = sorted(by_image[image], key=lambda i: -detections[i]["score"])
        start, counted = len(true_classes), [a for a in annotations if not a["iscrowd"]]
        true_classes += [a["category_id"] for a in counted]
        own = list(_first_of_each_class(own, detections, max_dets))
        found = [detections[i] for i in own]
        judged = _judge_image(truth, annotations, found, task)
        rows += [
            (own[i], found[i]["category_id"], found[i]["score"], kind, start + t if t >= 0 else -1)
            for i, kind, t in judged
        ]
    columns = zip(*rows, strict=True) if rows else [()] * 5
    types = (int, int, float, int, int)
    arrays = [np.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    return _with_candidates(*arrays, np.array(true_classes, int))


def missing_ap(judged: Judged) -> MissingAp:
    """Mend the errors of one kind after the other, and see how much AP50 rises.

    A detection in the wrong place, or of the wrong class, is moved to the annotation that it means
    if that is free, and dropped if it is not; what is duplicate, background, or wrong in both, is
    dropped; an annotation that was missed is not asked for. "false_positives": the AP if all wrong
    detections had score 0. "false_negatives": if none but the annotations found were asked for.

    The kinds overlap, so that what they cost does not add up to 100 - AP50. Numbers are those of
    tidecv 1.0.1, but for detections on crowds (they are left out, there they count as errors), for
    classes without annotations (left out as in COCO's AP, there 0), and for detections of equal
    score (in COCO's order).
    """
    classes = judged.classes.copy()
    moved = judged.kinds == _CLASSIFICATION
    classes[moved] = judged.true_classes[judged.targets[moved]]
    correct, wanted = judged.kinds == _CORRECT, np.ones(len(judged.true_classes), bool)
    known = np.unique(judged.true_classes).tolist()

    def ap(is_correct: np.ndarray, kept: np.ndarray, asked: np.ndarray, **other: Any) -> dict:
        at, scores = other.get("classes", judged.classes), other.get("scores", judged.scores)
        return {c: _ap(scores[s], is_correct[s], int((judged.true_classes[asked] == c).sum()))
                for c in known for s in [kept & (at == c)]}  # fmt: skip

    everything = np.ones(len(correct), bool)
    before = ap(correct, everything, wanted)
    after: dict[str, dict[int, float]] = {}
    for number, error in enumerate(ERRORS[:-1]):
        wrong = judged.kinds == number
        mended = wrong & judged.mended
        places = {"classes": np.where(mended, classes, judged.classes)}
        after[error] = ap(correct | mended, ~wrong | mended, wanted, **places)
    after["missed"] = ap(correct, everything, ~judged.missed)
    after["false_positives"] = ap(correct, everything, wanted, scores=correct.astype(float))
    after["false_negatives"] = ap(correct, everything, judged.found)
    counts = [int((judged.kinds == number).sum()) for number in range(5)]
    return MissingAp(
        _differences({k: _mean(v) for k, v in after.items()}, _mean(before)),
        {c: _differences({k: v[c] for k, v in after.items()}, before[c]) for c in known},
        dict(zip(ERRORS, [*counts, int(judged.missed.sum())], strict=True)),
    )


def _first_of_each_class(order: list[int], detections: list[dict], most: int) -> Iterator[int]:
    seen: dict[int, int] = defaultdict(int)
    for index in order:
        seen[detections[index]["category_id"]] += 1
        if seen[detections[index]["category_id"]] <= most:
            yield index


def _judge_image(
    truth: COCO, annotations: list[dict], found: list[dict], task: str
) -> Iterator[tuple[int, int, int]]:
    """Yield (detection, kind, target) of an image, without detections on crowds."""
    counted = [a for a in annotations if not a["iscrowd"]]
    crowds = [a for a in annotations if a["iscrowd"]]
    classes = np.array([d["category_id"] for d in found], int)[:, None]
    same = classes == np.array([a["category_id"] for a in counted], int)[None]
    overlaps = _overlaps(truth, found, counted, task)
    matched = _match(overlaps * same)
    on_crowd = _overlaps(truth, found, crowds, task) >= POSITIVE
    on_crowd &= classes == np.array([a["category_id"] for a in crowds], int)[None]
    taken = np.isin(np.arange(len(counted)), matched)
    for index in range(len(found)):
        if matched[index] >= 0:
            yield index, _CORRECT, matched[index]
        elif not on_crowd[index].any():
            yield index, *_kind(overlaps[index], same[index], taken)


def _overlaps(truth: COCO, found: list[dict], annotations: list[dict], task: str) -> np.ndarray:
    if not found or not annotations:
        return np.zeros((len(found), len(annotations)))
    crowds = [a["iscrowd"] for a in annotations]
    if task == "bbox":
        return masks.iou([d["bbox"] for d in found], [a["bbox"] for a in annotations], crowds)
    shapes = [truth.annToRLE(a) for a in annotations]
    return masks.iou([d["segmentation"] for d in found], shapes, crowds)


def _match(overlaps: np.ndarray) -> list[int]:
    """Give each detection in turn the annotation that it overlaps most, -1 for none left."""
    left, matched = overlaps.copy(), []
    for row in left:
        best = int(row.argmax()) if row.size else -1
        hit = best >= 0 and row[best] >= POSITIVE
        matched.append(best if hit else -1)
        if hit:
            left[:, best] = 0
    return matched


def _kind(overlaps: np.ndarray, same: np.ndarray, taken: np.ndarray) -> tuple[int, int]:
    """Return kind and target of a wrong detection, from its overlap with each annotation."""
    if not overlaps.size:
        return _BACKGROUND, -1
    own, other = overlaps * same, overlaps * ~same
    if BACKGROUND <= own.max() <= POSITIVE:
        return _LOCALIZATION, int(own.argmax())
    if other.max() >= POSITIVE:
        return _CLASSIFICATION, int(other.argmax())
    if (own * taken).max() >= POSITIVE:
        return _DUPLICATE, -1
    return (_BACKGROUND if overlaps.max() <= BACKGROUND else _BOTH), -1


def _with_candidates(
    ids: np.ndarray, classes: np.ndarray, scores: np.ndarray, kinds: np.ndarray,
    targets: np.ndarray, true_classes: np.ndarray,
) -> Judged:  # fmt: skip
    """Add which annotations are found, and the best detection that means one which is not."""
    found = np.zeros(len(true_classes), bool)
    found[targets[kinds == _CORRECT]] = True
    best: dict[int, int] = {}
    for index in np.flatnonzero((kinds >= 0) & (targets >= 0)):
        target = targets[index]
        if not found[target] and scores[index] > scores[best.setdefault(target, index)]:
            best[target] = index
    mended = np.zeros(len(kinds), bool)
    mended[list(best.values())] = True
    missed = ~found
    missed[list(best)] = False
    return Judged(ids, classes, scores, kinds, targets, mended, true_classes, found, missed)


def _ap(scores: np.ndarray, correct: np.ndarray, asked: int) -> float:
    """Return COCO's AP of a class; NaN where nothing is asked for and nothing was detected."""
    if asked == 0:
        return 0.0 if len(scores) else float("nan")
    hits = correct[np.argsort(-scores, kind="stable")].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(hits / asked, _RECALLS)
    return 100 * float(np.append(precision, 0)[np.minimum(reached, len(hits))].mean())


def _mean(by_class: dict[int, float]) -> float:
    values = np.array([value for value in by_class.values() if value == value])
    return float(values.mean()) if values.size else float("nan")


def _differences(after: dict[str, float], before: float) -> dict[str, float]:
    return {"AP50": before, **{k: v if v != v else max(v - before, 0.0) for k, v in after.items()}}
