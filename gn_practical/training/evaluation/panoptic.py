"""Panoptic quality of Detectron2 models without panopticapi."""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import PurePosixPath
from tempfile import TemporaryDirectory
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

from gn_practical.atomic import write_json
from gn_practical.training.data.coco_format import id_to_rgb, read_json, rgb_to_id
from gn_practical.training.evaluation.ids import (
    check_predicted_once,
    dataset_class,
    numbered,
    unused,
)
from gn_practical.training.evaluation.panoptic_sizes import SIZES, tallies_by_size

logger = logging.getLogger(__name__)

Annotation = dict[str, Any]


def panoptic_quality(tallies: np.ndarray) -> dict[str, float]:
    """PQ, SQ and RQ in percent, averaged over classes (Kirillov et al., arXiv:1801.00868, Eq. 1).

    Of one class, PQ = Σ IoU / (TP + FP/2 + FN/2), SQ = Σ IoU / TP, RQ = TP / (TP + FP/2 + FN/2).
    A class with neither ground truth nor prediction does not count; no class at all gives NaN.

    Args:
        tallies: of each class a row: Σ IoU of the matches, TP, FP, FN.

    Returns:
        Keys "PQ", "SQ", "RQ".

    Example:
        >>> panoptic_quality(np.array([[0.75, 1, 1, 1], [0, 0, 0, 0]]))
        {'PQ': 37.5, 'SQ': 75.0, 'RQ': 50.0}
    """
    tallies = tallies[tallies[:, 1:].any(axis=1)]
    if len(tallies) == 0:
        return dict.fromkeys(("PQ", "SQ", "RQ"), float("nan"))
    iou, matched, false_positive, false_negative = tallies.T
    size = matched + false_positive / 2 + false_negative / 2
    per_class = {"PQ": iou / size, "SQ": iou / np.maximum(matched, 1), "RQ": matched / size}
    return {name: 100 * float(values.mean()) for name, values in per_class.items()}


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ for all classes, things and stuff, as the official code computes them.

    The numbers are those of COCO's panopticapi, also in its ways: where an image has several
    crowds of one class, only the last one listed excuses predictions. Each rank matches its own
    images with ``hotcoco``: memory stays flat, and machines need no file system in common.

    Predictions go to ``output_dir/panoptic/*.png``, named as the ground truth's, and
    ``output_dir/predictions.json``, in COCO's panoptic format; without ``output_dir`` nowhere.

    Differences from ``COCOPanopticEvaluator``: areas are those of the PNGs, whatever the json says
    (where it is wrong, the official code finds an IoU above 1); ids of images and categories may be
    any numbers or texts; a group without classes (a data set without things, say) gives NaN where
    the official code stops with an error; the results hold "PQ-<class>" beside the nine official
    keys.

    Args:
        dataset_name: a registered data set with ``panoptic_json``, ``panoptic_root`` and the maps
            ``thing_dataset_id_to_contiguous_id``, ``stuff_dataset_id_to_contiguous_id``.
        output_dir: folder for the predictions.
        error_analysis: split PQ by size too, and into SQ and RQ by class: "panoptic_seg_errors" in
            the results.

    Raises:
        ValueError: if ids in the ground truth are unknown or given twice; from ``process``, if a
            predicted class or image is not in the ground truth, or its PNG is not RGB or has
            another size; from ``evaluate``, if an image was not predicted exactly once.

    Example:
        >>> evaluator = PanopticEvaluator("coco_2017_val_panoptic_separated")  # doctest: +SKIP
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, error_analysis: bool = False
    ) -> None:
        self._metadata = MetadataCatalog.get(dataset_name)
        self._name, self._output_dir = dataset_name, output_dir
        self._error_analysis = error_analysis
        self._path = self._metadata.panoptic_json
        self._content = read_json(PathManager.get_local_path(self._path))
        annotations = self._content["annotations"]
        self._truth = {annotation["image_id"]: annotation for annotation in annotations}
        images = [annotation["image_id"] for annotation in annotations]
        self._images = numbered(images, f"annotated images in {self._path}")
        ids = [category["id"] for category in self._content["categories"]]
        self._categories = numbered(ids, f"categories in {self._path}")
        things = self._metadata.thing_dataset_id_to_contiguous_id
        stuff = self._metadata.stuff_dataset_id_to_contiguous_id
        self._dataset_ids = {  # isthing → predicted id → the data set's
            True: {value: key for key, value in things.items()},
            False: {value: key for key, value in stuff.items()},
            None: dict(zip(ids, ids, strict=True)),  # the model predicts the data set's own
        }
        for annotation in annotations:
            self._check_segments(annotation)
        taken: set[str] = set()
        self._files = {i: f"{unused(_stem(a), taken)}.png" for i, a in self._truth.items()}
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: dict[Any, Annotation] = {}
        self._by_size = np.zeros((len(SIZES), len(self._categories), 4))
        # It removes itself with the last reference.
        self._temporary = None if self._output_dir else TemporaryDirectory(prefix="panoptic_")
        folder = self._temporary.name if self._temporary else self._output_dir
        self._png_dir = os.path.join(folder, "panoptic")

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Write the predictions of a batch, "panoptic_seg" of each output, by "image_id"."""
        for image, output in zip(inputs, outputs, strict=True):
            image_id = image["image_id"]
            if image_id not in self._truth or image_id in self._predictions:
                check_predicted_once([*self._predictions, image_id], self._predictions, self._path)
            segment_ids, segments = segments_of(*output["panoptic_seg"], self._metadata)
            self._check_png(self._truth[image_id]["file_name"], segment_ids.shape)
            file_name = self._files[image_id]
            path = os.path.join(self._png_dir, file_name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.fromarray(id_to_rgb(segment_ids)).save(path, compress_level=1)
            segments = [self._with_dataset_id(segment) for segment in segments]
            entry = {"image_id": image_id, "file_name": file_name, "segments_info": segments}
            self._predictions[image_id] = entry
            if self._error_analysis:
                truth = self._truth[image_id]
                pixels, own = self._read_png(truth["file_name"]), truth["segments_info"]
                sizes = tallies_by_size(pixels, own, segment_ids, segments, self._categories)
                self._by_size += sizes

    def evaluate(self) -> OrderedDict | None:
        """Percentages under "panoptic_seg" on the main rank, None on the others."""
        tallies = np.stack([self._tallies(), *self._by_size])
        gathered = comm.gather((list(self._predictions.values()), tallies))
        if self._temporary:
            self._temporary.cleanup()
        if not comm.is_main_process():
            return None
        predictions = [prediction for part, _ in gathered for prediction in part]
        check_predicted_once((p["image_id"] for p in predictions), self._truth, self._path)
        if self._output_dir:
            path = os.path.join(self._output_dir, "predictions.json")
            write_json(path, {**self._content, "annotations": predictions})
            logger.info("Panoptic predictions saved to %s and %s", path, self._png_dir)
        tallies, *by_size = sum(part for _, part in gathered)
        results = OrderedDict(panoptic_seg=self._summarize(tallies))
        if self._error_analysis:
            results["panoptic_seg_errors"] = self._split(tallies, by_size)
        return results

    def _check_segments(self, annotation: Annotation) -> None:
        segments = annotation["segments_info"]
        numbered((s["id"] for s in segments), f"segments of image {annotation['image_id']!r}")
        for segment in segments:
            number, category = segment["id"], segment["category_id"]
            fits_png = isinstance(number, int) and 0 < number < 2**24
            if not fits_png or category not in self._categories:
                raise ValueError(
                    f"Segments in {self._path} must have an id from 1 to {2**24 - 1} and a known "
                    f"category, got id={number!r} with category_id={category!r} in image "
                    f"{annotation['image_id']!r}. Correct the file."
                )

    def _check_png(self, file_name: str, shape: tuple[int, int]) -> None:
        path = os.path.join(self._metadata.panoptic_root, file_name)
        try:
            with PathManager.open(path, "rb") as file, Image.open(file) as png:  # its header alone
                found = f"mode={png.mode} size={png.size}"
                fits = png.mode in ("RGB", "RGBA") and png.size == shape[::-1]
        except OSError as error:
            found, fits = str(error), False
        if not fits:
            raise ValueError(
                f"A panoptic PNG must be RGB with the prediction's size {shape[::-1]}, got "
                f"{found} in {path}. Restore the file or prepare the data set again."
            )

    def _read_png(self, file_name: str) -> np.ndarray:
        path = os.path.join(self._metadata.panoptic_root, file_name)
        with PathManager.open(path, "rb") as file:
            return rgb_to_id(np.array(Image.open(file).convert("RGB")))

    def _with_dataset_id(self, segment: dict) -> dict:
        segment = dict(segment)
        is_thing = segment.pop("isthing", None)
        of = f"{'thing' if is_thing else 'stuff'} classes of {self._name}"
        ids = self._dataset_ids[None if is_thing is None else bool(is_thing)]
        return {**segment, "category_id": dataset_class(segment["category_id"], ids, of)}

    def _tallies(self) -> np.ndarray:
        """(Σ IoU, TP, FP, FN) of each class, by its number, over the images of this rank."""
        if not self._predictions:
            return np.zeros((len(self._categories), 4))
        evaluation = PanopticEval(
            self._numbered(self._truth[image_id] for image_id in self._predictions),
            self._numbered(self._predictions.values()),
            gt_folder=PathManager.get_local_path(self._metadata.panoptic_root),
            pred_folder=self._png_dir,
        )
        evaluation.evaluate()
        rows = evaluation.results()["per_class"]
        keys = ("iou", "tp", "fp", "fn")
        return np.array([[rows[n][key] for key in keys] for n in self._categories.values()], float)

    def _numbered(self, annotations: Iterable[Annotation]) -> dict[str, list]:
        """Return what hotcoco reads, under numbers; areas left out, it counts pixels."""
        categories = [{"id": n, "name": str(n)} for n in self._categories.values()]
        content: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
        for annotation in annotations:
            number = self._images[annotation["image_id"]]
            segments = []
            for segment in annotation["segments_info"]:
                category = self._categories[segment["category_id"]]
                is_crowd = int(segment.get("iscrowd", 0) == 1)
                segments.append({"id": segment["id"], "category_id": category, "iscrowd": is_crowd})
            content["images"].append({"id": number})
            file = {"image_id": number, "file_name": annotation["file_name"]}
            content["annotations"].append({**file, "segments_info": segments})
        return content

    def _summarize(self, tallies: np.ndarray) -> dict[str, float]:
        entries = {category["id"]: category for category in self._content["categories"]}
        known = self._dataset_ids[True].values()
        things = np.array([entries[c].get("isthing", c in known) for c in self._categories], bool)
        groups = {"": tallies, "_th": tallies[things], "_st": tallies[~things]}
        by_group = {suffix: panoptic_quality(group) for suffix, group in groups.items()}
        by_class = {
            entries[category]["name"]: panoptic_quality(tallies[number - 1 : number])
            for category, number in self._categories.items()
        }
        rows = [*zip(("All", "Things", "Stuff"), by_group.values(), strict=True), *by_class.items()]
        lines = [[name, *row.values()] for name, row in rows if row["PQ"] == row["PQ"]]
        headers = ["", *by_group[""]]
        logger.info("Panoptic quality:\n%s", tabulate(lines, headers, "pipe", ".3f"))
        return {
            **{name + suffix: v for suffix, row in by_group.items() for name, v in row.items()},
            **{f"PQ-{name}": row["PQ"] for name, row in by_class.items()},
        }

    def _split(self, tallies: np.ndarray, by_size: list[np.ndarray]) -> dict[str, float]:
        """PQ, SQ and RQ by size, SQ and RQ by class."""
        sizes = {size: panoptic_quality(part) for size, part in zip(SIZES, by_size, strict=True)}
        rows = [
            [name, int(part[:, [1, 3]].sum()), int(part[:, 2].sum()), *quality.values()]
            for name, part, quality in zip(
                ("small", "medium", "large"), by_size, sizes.values(), strict=True
            )
        ]
        headers = ["segments", "annotated", "false positives", "PQ", "SQ", "RQ"]
        logger.info("Panoptic quality by size:\n%s", tabulate(rows, headers, "pipe", ".3f"))
        names = {category["id"]: category["name"] for category in self._content["categories"]}
        by_class = {
            f"{metric}-{names[category]}": value
            for category, number in self._categories.items()
            for metric, value in panoptic_quality(tallies[number - 1 : number]).items()
            if metric != "PQ"
        }
        by_metric = {
            f"{metric}{size}": row[metric] for metric in ("PQ", "SQ", "RQ")
            for size, row in sizes.items()
        }  # fmt: skip
        return {**by_metric, **by_class}


def segments_of(
    panoptic_seg: torch.Tensor, segments_info: list[dict] | None, metadata: Metadata
) -> tuple[np.ndarray, list[dict]]:
    """Return ids and info; without info, ids are ``class * label_divisor + instance``, void -1."""
    ids = panoptic_seg.cpu().numpy()
    if segments_info is not None:
        return ids, segments_info
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    segments = []
    for label in (int(label) for label in np.unique(ids) if label >= 0):
        category = label // metadata.label_divisor
        segments.append({"id": label + 1, "category_id": category, "isthing": category in things})
    return ids + 1, segments


def _stem(annotation: Annotation) -> str:
    """Path of the PNG without its ending, kept inside the folder of the predictions."""
    path = PurePosixPath(annotation["file_name"]).with_suffix("")
    return str(PurePosixPath(*(part for part in path.parts if part not in ("/", ".."))))
