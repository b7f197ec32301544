"""Panoptic quality of Detectron2 models without panopticapi."""

import json
import logging
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from hotcoco.panoptic import PanopticEval
from PIL import Image
from tabulate import tabulate

from gn_practical.training.data.coco_format import id_to_rgb

logger = logging.getLogger(__name__)

Annotation = dict[str, Any]
Tallies = dict[int, np.ndarray]


def split_panoptic_labels(labels: np.ndarray, metadata: Metadata) -> tuple[np.ndarray, list[dict]]:
    """Turn labels ``class * label_divisor + instance`` (-1: void) into segment ids and their info.

    Args:
        labels: as Detectron2's models without ``segments_info`` return them.
        metadata: with ``label_divisor`` and ``thing_dataset_id_to_contiguous_id``.

    Returns:
        Segment ids, 0 for void, and Detectron2's ``segments_info``.

    Shape:
        ``(H, W)`` → ``(H, W)``.
    """
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    present = [int(label) for label in np.unique(labels) if label >= 0]
    classes = [label // metadata.label_divisor for label in present]
    segments = [
        {"id": label + 1, "category_id": category, "isthing": category in things}
        for label, category in zip(present, classes, strict=True)
    ]
    return labels + 1, segments


def panoptic_quality(tallies: Iterable[np.ndarray]) -> dict[str, float]:
    """PQ, SQ and RQ in percent, averaged over classes (Kirillov et al., arXiv:1801.00868, Eq. 1).

    Of one class, PQ = Σ IoU / (TP + FP/2 + FN/2), SQ = Σ IoU / TP, RQ = TP / (TP + FP/2 + FN/2).
    A class with neither ground truth nor prediction does not count; no class at all gives NaN.

    Args:
        tallies: of each class, (Σ IoU of the matches, TP, FP, FN).

    Returns:
        Keys "PQ", "SQ", "RQ".

    Example:
        >>> panoptic_quality([np.array([0.75, 1, 1, 1]), np.zeros(4)])
        {'PQ': 37.5, 'SQ': 75.0, 'RQ': 50.0}
    """
    table = np.array([tally for tally in tallies if tally[1:].any()]).reshape(-1, 4)
    if len(table) == 0:
        return dict.fromkeys(("PQ", "SQ", "RQ"), float("nan"))
    iou, matched, false_positive, false_negative = table.T
    size = matched + false_positive / 2 + false_negative / 2
    per_class = {"PQ": iou / size, "SQ": iou / np.maximum(matched, 1), "RQ": matched / size}
    return {name: 100 * float(values.mean()) for name, values in per_class.items()}


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ for all classes, things and stuff, as the official code computes them.

    The numbers are those of COCO's panopticapi, also in its ways: where an image has several
    crowds of one class, only the last one listed excuses predictions. Matching is done by
    ``hotcoco``, on each rank for its own images, and the classes' tallies are summed on the main
    rank: memory stays flat, and machines need no file system in common.

    Predictions go to ``output_dir/panoptic/*.png`` while they come, and to
    ``output_dir/predictions.json`` at the end, in COCO's panoptic format; without ``output_dir``
    they are dropped.

    Differences from ``COCOPanopticEvaluator``: a group without classes (a data set without
    things, say) gives NaN where the official code stops with an error, and the results hold
    "PQ-<class>" beside the nine official keys.

    Args:
        dataset_name: a registered data set with ``panoptic_json``, ``panoptic_root`` and the maps
            ``thing_dataset_id_to_contiguous_id``, ``stuff_dataset_id_to_contiguous_id``.
        output_dir: folder for the predictions.

    Raises:
        ValueError: from ``evaluate``, if an image of the ground truth was not predicted exactly
            once; from ``process``, if a predicted class is not one of the data set's.

    Example:
        >>> evaluator = PanopticEvaluator("coco_2017_val_panoptic_separated")
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        self._dataset_name = dataset_name
        self._metadata = MetadataCatalog.get(dataset_name)
        self._thing_ids = _inverse(self._metadata.thing_dataset_id_to_contiguous_id)
        self._stuff_ids = _inverse(self._metadata.stuff_dataset_id_to_contiguous_id)
        self._output_dir = output_dir

    def reset(self) -> None:
        """Forget all predictions."""
        self._annotations: list[Annotation] = []
        self._temporary_dir = None
        if self._output_dir is not None:
            self._png_dir = os.path.join(self._output_dir, "panoptic")
        else:
            self._temporary_dir = tempfile.TemporaryDirectory(prefix="panoptic_")
            self._png_dir = self._temporary_dir.name

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Write the predictions of a batch.

        Args:
            inputs: dicts with "file_name" and "image_id".
            outputs: dicts with "panoptic_seg": ``(ids, segments_info)``; where ``segments_info``
                is None, ids are ``class * label_divisor + instance``, -1 for void.
        """
        for image, output in zip(inputs, outputs, strict=True):
            segment_ids, segments = self._to_coco(*output["panoptic_seg"])
            file_name = self._png_name(image["file_name"])
            path = os.path.join(self._png_dir, file_name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.fromarray(id_to_rgb(segment_ids)).save(path, compress_level=1)
            self._annotations.append(
                {
                    "image_id": image["image_id"],
                    "file_name": file_name,
                    "segments_info": segments,
                }
            )

    def evaluate(self) -> OrderedDict | None:
        """Percentages under "panoptic_seg" on the main rank, None on the others."""
        with PathManager.open(self._metadata.panoptic_json) as f:
            ground_truth = json.load(f)
        gathered = comm.gather((self._annotations, self._tallies(ground_truth)))
        if self._temporary_dir is not None:
            self._temporary_dir.cleanup()
        if not comm.is_main_process():
            return None
        annotations = [annotation for part, _ in gathered for annotation in part]
        self._check_complete(annotations, ground_truth["annotations"])
        self._write_predictions(annotations, ground_truth)
        categories = ground_truth["categories"]
        zero = np.zeros(4)
        sums = {
            c["id"]: sum((part.get(c["id"], zero) for _, part in gathered), zero)
            for c in categories
        }
        return OrderedDict(panoptic_seg=self._summarize(sums, categories))

    def _to_coco(
        self, panoptic_seg: torch.Tensor, segments_info: list[dict] | None
    ) -> tuple[np.ndarray, list[dict]]:
        segment_ids = panoptic_seg.cpu().numpy()
        if segments_info is None:
            segment_ids, segments_info = split_panoptic_labels(segment_ids, self._metadata)
        return segment_ids, [self._with_dataset_id(segment) for segment in segments_info]

    def _with_dataset_id(self, segment: dict) -> dict:
        segment = dict(segment)
        is_thing = segment.pop("isthing", None)
        if is_thing is None:  # the model predicts the data set's own ids
            return segment
        ids = self._thing_ids if is_thing else self._stuff_ids
        if segment["category_id"] not in ids:
            raise ValueError(
                f"The predicted class must be one of the {len(ids)} "
                f"{'thing' if is_thing else 'stuff'} classes of {self._dataset_name}, got "
                f"category_id={segment['category_id']}. Set MODEL.ROI_HEADS.NUM_CLASSES and "
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES to the classes of the data set."
            )
        return {**segment, "category_id": ids[segment["category_id"]]}

    def _png_name(self, image_file: str) -> str:
        # Keep the folders below the image root: two images may have the same base name.
        root = self._metadata.get("image_root") or os.path.dirname(image_file)
        name = os.path.relpath(image_file, root)
        if name.startswith(os.pardir):
            name = os.path.basename(name)
        return os.path.splitext(name)[0] + ".png"

    def _tallies(self, ground_truth: dict) -> Tallies:
        """(Σ IoU, TP, FP, FN) of each class over the images of this rank."""
        wanted = {annotation["image_id"] for annotation in ground_truth["annotations"]}
        predictions = [a for a in self._annotations if a["image_id"] in wanted]
        if not predictions:
            return {}
        evaluation = PanopticEval(
            _restrict(ground_truth, {a["image_id"] for a in predictions}),
            {"annotations": predictions},
            gt_folder=PathManager.get_local_path(self._metadata.panoptic_root),
            pred_folder=self._png_dir,
        )
        evaluation.evaluate()
        return {
            category: np.array([row["iou"], row["tp"], row["fp"], row["fn"]], dtype=np.float64)
            for category, row in evaluation.results()["per_class"].items()
        }

    def _check_complete(
        self, predictions: list[Annotation], ground_truth: list[Annotation]
    ) -> None:
        counts = Counter(annotation["image_id"] for annotation in predictions)
        wrong = [a["image_id"] for a in ground_truth if counts[a["image_id"]] != 1]
        if wrong:
            raise ValueError(
                f"Each image of {self._metadata.panoptic_json} must be predicted once, got "
                f"{counts[wrong[0]]} predictions for image_id={wrong[0]} ({len(wrong)} such "
                "images). Make the data set's instances and panoptic files list the same images."
            )

    def _write_predictions(self, annotations: list[Annotation], ground_truth: dict) -> None:
        if self._output_dir is None:
            return
        path = os.path.join(self._output_dir, "predictions.json")
        with PathManager.open(path, "w") as f:
            json.dump({**ground_truth, "annotations": annotations}, f)
        logger.info("Panoptic predictions saved to %s and %s", path, self._png_dir)

    def _summarize(self, tallies: Tallies, categories: list[dict]) -> dict[str, float]:
        known_things = set(self._thing_ids.values())
        things = {c["id"] for c in categories if c.get("isthing", c["id"] in known_things)}
        groups = {
            "": tallies,
            "_th": {c: t for c, t in tallies.items() if c in things},
            "_st": {c: t for c, t in tallies.items() if c not in things},
        }
        results = {
            name + suffix: value
            for suffix, group in groups.items()
            for name, value in panoptic_quality(group.values()).items()
        }
        _log_groups(results, groups)
        per_class = {c["name"]: panoptic_quality([tallies[c["id"]]]) for c in categories}
        _log_classes(per_class)
        return {**results, **{f"PQ-{name}": row["PQ"] for name, row in per_class.items()}}


def _inverse(mapping: dict[int, int]) -> dict[int, int]:
    return {value: key for key, value in mapping.items()}


def _restrict(ground_truth: dict, image_ids: set) -> dict:
    return {
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "annotations": [a for a in ground_truth["annotations"] if a["image_id"] in image_ids],
        "categories": ground_truth["categories"],
    }


def _log_groups(results: dict[str, float], groups: dict[str, Tallies]) -> None:
    rows = [
        [
            title,
            *(results[key + suffix] for key in ("PQ", "SQ", "RQ")),
            sum(bool(tally[1:].any()) for tally in groups[suffix].values()),
        ]
        for title, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st"))
    ]
    headers = ["", "PQ", "SQ", "RQ", "#classes"]
    table = tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f")
    logger.info("Panoptic evaluation results:\n%s", table)


def _log_classes(per_class: dict[str, dict[str, float]]) -> None:
    rows = [[name, *row.values()] for name, row in per_class.items() if row["PQ"] == row["PQ"]]
    table = tabulate(rows, ["class", "PQ", "SQ", "RQ"], tablefmt="pipe", floatfmt=".3f")
    logger.info("Panoptic quality per class:\n%s", table)
