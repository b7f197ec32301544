"""What a detector gets wrong: kinds of errors, confused classes, precision against recall."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import hotcoco
import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from gn_practical.training.evaluation.error_pictures import draw_confusion, draw_errors, mean_curves
from gn_practical.training.evaluation.missing_ap import POSITIVE, MissingAp, judge, missing_ap
from gn_practical.training.evaluation.results import write_results

logger = logging.getLogger(__name__)

MIN_SCORE = 0.5  # of the detections in the confusion matrix, and in the pictures of an evaluation

_MEANINGS = {
    "classification": "right place, wrong class",
    "localization": "right class, IoU 0.1 to 0.5",
    "both": "wrong class, and IoU 0.1 to 0.5",
    "duplicate": "a better detection has it already",
    "background": "nothing is there (IoU below 0.1)",
    "missed": "annotations that nothing means",
    "false_positives": "all wrong detections",
    "false_negatives": "all annotations not found",
}


def analyse_errors(
    truth: COCO,
    detections: list[dict[str, Any]],
    task: str,
    class_names: Sequence[str],
    precision: np.ndarray,
    folder: str | None,
    max_dets: int = 100,
) -> dict[str, float]:
    """Return what each kind of error takes from AP50, in percent, and write files with the rest.

    Into ``folder``, if there is one: ``<task>.json`` (errors of each class, confusion matrix,
    curves), ``<task>.png`` (errors and curves) and ``<task>_confusion.png``.

    Args:
        truth: annotations whose ids, and those of images and categories, are numbers from 1.
        detections: COCO's dicts with these numbers.
        task: "bbox" or "segm".
        class_names: of the categories 1, 2, ...
        precision: at 101 recalls, ``(2, 101, classes)`` for IoU 0.5 and 0.75, of the evaluation
            that gave AP; NaN where a class has no annotations.
        folder: of the files; None for none.
        max_dets: how many detections of a class count in an image.
    """
    judged = judge(truth, detections, task, max_dets)
    missing = missing_ap(judged)
    rows = [
        [name, _MEANINGS[name], missing.counts.get(name, ""), value]
        for name, value in list(missing.overall.items())[1:]
    ]
    headers = ["error", "what it is", "number", "AP50 that it costs"]
    logger.info(
        "Errors of %s, AP50 %.3f:\n%s",
        *(task, missing.overall["AP50"], tabulate(rows, headers, "pipe", ".3f")),
    )
    if folder:
        confusion = confusion_matrix(truth, [detections[i] for i in judged.ids], task)
        _write(folder, task, class_names, missing, confusion, precision)
    return missing.overall


def confusion_matrix(
    truth: COCO, detections: list[dict[str, Any]], task: str, min_score: float = MIN_SCORE
) -> np.ndarray:
    """Count, by class, what is annotated (rows) against what is detected (columns).

    Detections of any class, in the order of their scores, each take the annotation that they
    overlap most, at IoU 0.5 or more. The last column is for annotations that none took, the last
    row for detections that took none. Crowds are left out; detections on them are given by
    :func:`~gn_practical.training.evaluation.missing_ap.judge`.
    """
    kept = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    counted = [{key: a[key] for key in kept} for a in truth.dataset["annotations"]]
    counted = [annotation for annotation in counted if not annotation["iscrowd"]]
    if task == "segm":
        for annotation in counted:
            annotation["segmentation"] = truth.annToRLE(truth.anns[annotation["id"]])
    categories = [{"id": c["id"], "name": str(c["id"])} for c in truth.dataset["categories"]]
    images = [{k: v for k, v in i.items() if k in ("id", "height", "width")}
              for i in truth.dataset["images"]]  # fmt: skip
    known = hotcoco.COCO({"images": images, "annotations": counted, "categories": categories})
    # With a box, the mask would be left aside.
    unread = "bbox" if task == "segm" else "segmentation"
    found = [{k: v for k, v in d.items() if k != unread} for d in detections]
    evaluation = hotcoco.COCOeval(known, known.load_res(found), task)
    options = {"iou_thr": POSITIVE, "max_det": max(len(found), 1), "min_score": min_score}
    return np.asarray(evaluation.confusion_matrix(**options)["matrix"]).astype(int)


def _write(
    folder: str,
    task: str,
    names: Sequence[str],
    missing: MissingAp,
    confusion: np.ndarray,
    precision: np.ndarray,
) -> None:
    numbers = range(1, len(names) + 1)
    content = {
        "task": task,
        "errors": missing.overall,
        "counts": missing.counts,
        "classes": [
            {"name": name, **missing.classes.get(number, {})}
            for number, name in zip(numbers, names, strict=True)
        ],
        "confusion": {
            "classes": [*names, "background"],
            "rows_annotated_columns_detected": confusion.tolist(),
            "min_iou": POSITIVE,
            "min_score": MIN_SCORE,
        },
        "precision_at_recall": {
            "recall": np.linspace(0, 1, 101).round(2).tolist(),
            "min_iou": [POSITIVE, 0.75],
            "mean": mean_curves(precision).tolist(),
            "classes": np.moveaxis(precision, -1, 0).tolist(),
        },
    }
    write_results(content, os.path.join(folder, f"{task}.json"))
    title = f"scores from {MIN_SCORE:g}, IoU from {POSITIVE:g}"
    try:
        draw_errors(missing.overall, precision, names, os.path.join(folder, f"{task}.png"))
        draw_confusion(confusion, names, title, os.path.join(folder, f"{task}_confusion.png"))
    except Exception:  # whatever a font or a disk says, the numbers are there
        logger.warning("No pictures of the errors of %s", task, exc_info=True)
    logger.info("Errors of each class, curves and confused classes of %s are in %s", task, folder)
