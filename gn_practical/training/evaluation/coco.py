"""COCO's AP of boxes, masks and keypoints: the numbers of pycocotools, for ids of any kind."""

import contextlib
import io
import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from gn_practical.atomic import write_json
from gn_practical.training.data.coco_format import read_json
from gn_practical.training.evaluation.error_analysis import analyse_errors
from gn_practical.training.evaluation.ids import check_predicted_once, dataset_class, numbered

logger = logging.getLogger(__name__)

# Task → field of the predicted instances, and of the annotations that it is compared with.
_TASKS = {
    "bbox": ("pred_boxes", "bbox"),
    "segm": ("pred_masks", "segmentation"),
    "keypoints": ("pred_keypoints", "keypoints"),
}


class CocoEvaluator(DatasetEvaluator):
    """Box, mask and keypoint AP as pycocotools computes them.

    ``faster-coco-eval`` gives the same numbers 4 to 9 times faster and is used for boxes and masks
    where it is installed; a line in the log says so. Both see images, categories and annotations
    numbered from 1, whatever their ids: pycocotools itself stops at an annotation whose id is a
    text and never matches one whose id is 0. The files of predictions hold the data set's own ids.

    Differences from Detectron2's ``COCOEvaluator``: AP is 0, not NaN, where nothing at all was
    detected; annotations without "iscrowd" and "area" work; masks or keypoints that a model
    predicts are not evaluated where the data set has none; an image that was not predicted, or is
    not in the annotation file, is an error. Proposals are left to ``COCOEvaluator``.

    Args:
        dataset_name: a registered data set, in COCO's format or convertible to it.
        output_dir: folder for the predictions, and for the annotations if they are converted.
        max_dets_per_image: of which AP of boxes and masks is computed.
        use_fast_impl: False for pycocotools in any case.
        kpt_oks_sigmas: of the keypoints; those of COCO if empty.
        error_analysis: find out what keeps AP of boxes and masks from 100: "bbox_errors" and
            "segm_errors" in the results, and files in ``output_dir/errors``.

    Raises:
        ValueError: if two images, categories or annotations share an id; from ``evaluate``, if an
            image was not predicted exactly once or a predicted class is not the data set's.

    Example:
        >>> evaluator = CocoEvaluator("coco_2017_val", output_dir="output")  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int = 100,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        error_analysis: bool = False,
    ) -> None:
        self._path = _annotation_file(dataset_name, output_dir)
        content = read_json(PathManager.get_local_path(self._path))
        names = {c["id"]: c["name"] for c in content["categories"]}
        self._images = self._numbered(content, "images")
        self._categories = self._numbered(content, "categories")
        self._class_names = [names[category] for category in self._categories]
        known = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
        self._dataset_ids = {v: k for k, v in known.items()} if known else {c: c for c in names}
        self._of = f"classes of {dataset_name}"
        self._has_truth = "annotations" in content  # not in COCO's test sets
        self._truth = _coco(self._numbered_content(content))
        self._output_dir = output_dir
        self._max_dets, self._use_fast_impl = max_dets_per_image, use_fast_impl
        self._sigmas, self._error_analysis = kpt_oks_sigmas, error_analysis
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[dict[str, Any]] = []
        self._tasks: set[str] = set()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the "instances" of a batch by "image_id"; outputs without are passed over."""
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                instances = output["instances"].to("cpu")
                self._tasks |= {task for task, (field, _) in _TASKS.items() if instances.has(field)}
                found = instances_to_coco_json(instances, image["image_id"])
                self._predictions.append({"image_id": image["image_id"], "instances": found})

    def evaluate(self) -> OrderedDict | None:
        """Percentages under "bbox", "segm" and "keypoints" on the main rank, None on the others."""
        gathered = comm.gather((self._predictions, self._tasks))
        if not comm.is_main_process():
            return None
        predictions = [prediction for part, _ in gathered for prediction in part]
        if not predictions:
            logger.warning("No AP: the model returned no instances, not even an empty list.")
            return OrderedDict()
        check_predicted_once((p["image_id"] for p in predictions), self._images, self._path)
        detections = [
            {**d, "category_id": dataset_class(d["category_id"], self._dataset_ids, self._of)}
            for d in itertools.chain.from_iterable(p["instances"] for p in predictions)
        ]
        if self._output_dir is not None:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            write_json(path, detections)
            torch.save(predictions, os.path.join(self._output_dir, "instances_predictions.pth"))
            logger.info("Detections saved to %s", path)
        if not self._has_truth:
            logger.info("No AP: %s has no annotations", self._path)
            return OrderedDict()
        if not detections:
            logger.warning("The model detected nothing: AP is 0")
        for detection in detections:
            detection["image_id"] = self._images[detection["image_id"]]
            detection["category_id"] = self._categories[detection["category_id"]]
        tasks = self._annotated_tasks(set().union(*(tasks for _, tasks in gathered)))
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        for task in tasks:
            evaluation = self._evaluate(task, detections)
            results[task] = self._summarize(task, evaluation)
            if self._error_analysis and task != "keypoints":
                results[f"{task}_errors"] = self._errors(task, evaluation, detections)
        return results

    def _numbered(self, content: dict[str, Any], entries: str) -> dict[Any, int]:
        return numbered((entry["id"] for entry in content[entries]), f"{entries} in {self._path}")

    def _numbered_content(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the annotations that pycocotools counts, in place, under their numbers."""
        for image in content["images"]:
            sizes = {key: int(image[key]) for key in ("height", "width") if image.get(key)}
            image |= {"id": self._images[image["id"]], **sizes}
        known, entries = self._categories, content.get("annotations", [])
        entries = [
            a for a in entries if a["image_id"] in self._images and a["category_id"] in known
        ]
        content["annotations"] = entries
        numbers = self._numbered(content, "annotations")
        if 0 in numbers:
            logger.info("The annotation with id 0 counts; pycocotools itself would never match it")
        for annotation in entries:
            box = annotation.get("bbox")
            if not isinstance(box, list) or [isinstance(x, int | float) for x in box] != [True] * 4:
                raise ValueError(
                    f"A bbox in {self._path} must be [x, y, width, height], got bbox={box!r} in "
                    f"annotation {annotation['id']!r}. Correct the file."
                )
            annotation |= {
                "id": numbers[annotation["id"]],
                "image_id": self._images[annotation["image_id"]],
                "category_id": self._categories[annotation["category_id"]],
                "iscrowd": int(bool(annotation.get("iscrowd"))),
            }
            if annotation.get("area") is None:
                annotation["area"] = box[2] * box[3]
        return {**content, "categories": [{"id": n} for n in self._categories.values()]}

    def _annotated_tasks(self, predicted: set[str]) -> list[str]:
        annotations = self._truth.dataset["annotations"]
        tasks = [task for task in _TASKS if task in predicted]
        absent = [t for t in tasks[1:] if not all(a.get(_TASKS[t][1]) for a in annotations)]
        if absent:
            logger.warning("Not evaluated, as annotations of the data set lack it: %s", absent)
        return [task for task in tasks if task not in absent]

    def _evaluate(self, task: str, detections: list[dict]) -> COCOeval:
        evaluator, name = COCOeval, "pycocotools"
        if self._use_fast_impl and task != "keypoints":
            with contextlib.suppress(ImportError):
                from faster_coco_eval import COCOeval_faster

                evaluator, name = COCOeval_faster, "faster-coco-eval (the numbers of pycocotools)"
        logger.info("%s AP by %s", task, name)
        # With a box, pycocotools would take the box's area for that of the mask.
        left_out = "bbox" if task == "segm" else ""
        found = [{k: v for k, v in d.items() if k != left_out} for d in detections]
        nothing = {**self._truth.dataset, "annotations": []}  # loadRes refuses an empty list
        with contextlib.redirect_stdout(io.StringIO()):
            predicted = self._truth.loadRes(found) if found else _coco(nothing)
            evaluation = evaluator(self._truth, predicted, task)
            if task == "keypoints":
                self._set_sigmas(evaluation, detections)
            else:
                limits = (1, 10, self._max_dets)
                evaluation.params.maxDets = [min(limit, self._max_dets) for limit in limits]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation

    def _errors(self, task: str, evaluation: COCOeval, detections: list[dict]) -> dict[str, float]:
        folder = self._output_dir and os.path.join(self._output_dir, "errors")
        precision = evaluation.eval["precision"][[0, 5], :, :, 0, -1]
        precision = np.where(precision > -1, precision, np.nan)
        given = (self._truth, detections, task, self._class_names)
        return analyse_errors(*given, precision, folder, self._max_dets)

    def _set_sigmas(self, evaluation: COCOeval, detections: list[dict]) -> None:
        if self._sigmas:
            evaluation.params.kpt_oks_sigmas = np.array(self._sigmas)
        entries = itertools.chain(self._truth.dataset["annotations"], detections)
        counts = {len(entry["keypoints"]) // 3 for entry in entries}
        if counts - {len(evaluation.params.kpt_oks_sigmas)}:
            raise ValueError(
                "Keypoints must be as many in annotations, predictions and sigmas, got "
                f"{sorted(counts)} and {len(evaluation.params.kpt_oks_sigmas)} sigmas. Set "
                "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS and TEST.KEYPOINT_OKS_SIGMAS."
            )

    def _summarize(self, task: str, evaluation: COCOeval) -> dict[str, float]:
        # IoU threshold (0.5, 0.55, ..., 0.95), recall, class, area, number of detections
        precision = evaluation.eval["precision"][..., -1]
        overall = precision[..., 0]
        results = {"AP": _mean(overall), "AP50": _mean(overall[0]), "AP75": _mean(overall[5])}
        for index, label in enumerate(evaluation.params.areaRngLbl[1:], start=1):
            results[f"AP{label[0]}"] = _mean(precision[..., index])
        recall = evaluation.eval["recall"][:, :, 0]
        limits = enumerate(evaluation.params.maxDets)
        recalls = [f"{_mean(recall[..., i]):.3f} of {limit}" for i, limit in limits]
        logger.info(
            "Results of %s:\n%s\nAverage recall by the number of detections in an image: %s",
            *(task, create_small_table(results), ", ".join(recalls)),
        )
        if len(self._class_names) < 2:
            return results
        rows = [(name, _mean(overall[:, :, k])) for k, name in enumerate(self._class_names)]
        logger.info("AP of each class:\n%s", tabulate(rows, ["class", "AP"], "pipe", ".3f"))
        return {**results, **{f"AP-{name}": value for name, value in rows}}


def _mean(values: np.ndarray) -> float:
    """Return the mean percentage; NaN if there is no annotation, for which pycocotools puts -1."""
    valid = values[values > -1]
    return 100 * float(valid.mean()) if valid.size else float("nan")


def _coco(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _annotation_file(dataset_name: str, output_dir: str | None) -> str:
    metadata = MetadataCatalog.get(dataset_name)
    if not metadata.get("json_file"):
        if output_dir is None:
            raise ValueError(
                f"output_dir must be a folder where {dataset_name} is not in COCO's format, got "
                "output_dir=None. Name one for the converted annotations."
            )
        path = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
        convert_to_coco_json(dataset_name, path, allow_cached=False)
        metadata.json_file = path
    return metadata.json_file
