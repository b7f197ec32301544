"""Checks of one data set's jsons against each other and against the config."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from PIL import Image

from gn_practical.training.data.coco_format import read_json
from gn_practical.training.data.entries import (
    IMAGE_KEYS,
    INSTANCE_KEYS,
    PANOPTIC_KEYS,
    SEGMENT_KEYS,
    lacking_keys,
    repeated,
    unknown_labels,
)
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.file_checks import check_listed_files, way_out

# Where each architecture keeps its numbers of classes.
_THING_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
_STUFF_KEYS = {
    "PanopticFPN": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "SemanticSegmentor": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
}
_STUFF_PNGS_LOOKED_AT = 4


class DatasetCheck:
    """The checks of one data set against its jsons and against the config.

    Args:
        cfg: the complete config.
        name: of the data set.
        is_train: whether the run trains on it.
    """

    def __init__(self, cfg: CfgNode, name: str, is_train: bool) -> None:
        self.cfg = cfg
        self.name = name
        self.is_train = is_train
        self.metadata = MetadataCatalog.get(name)
        self.architecture = cfg.MODEL.META_ARCHITECTURE

    def run(self) -> None:
        """Raise DatasetError for the first thing that is wrong."""
        self._check_has_stuff()
        kind = self.metadata.get("evaluator_type")
        if kind in ("coco", "coco_panoptic_seg"):
            if self.metadata.get("json_file"):
                self._check_instances(self.metadata.json_file)
            if self.metadata.get("panoptic_json"):
                self._check_panoptic(self.metadata.panoptic_json)
        self._check_num_classes(_THING_KEYS, "thing_classes", "thing classes")
        self._check_num_classes(_STUFF_KEYS, "stuff_classes", "stuff classes ('things' included)")

    def _check_has_stuff(self) -> None:
        if self.architecture == "PanopticFPN" and not self.metadata.get("sem_seg_root"):
            raise DatasetError(
                f"Data sets of a PanopticFPN must have stuff labels, got {self.name!r}. "
                "Take one whose name ends in '_panoptic_separated', or register yours with "
                "DATASETS.COCO_PANOPTIC."
            )

    def _check_num_classes(self, keys: dict[str, str], attribute: str, what: str) -> None:
        classes, key = self.metadata.get(attribute), keys.get(self.architecture)
        if classes is None or key is None:
            return
        value = self.cfg
        for part in key.split("."):
            value = value[part]
        if value != len(classes):
            raise DatasetError(
                f"{key} must be the number of {what} of data set {self.name!r}, {len(classes)}, "
                f"got {value}. Add the override: {key} {len(classes)}"
            )

    # Instances

    def _check_instances(self, path: str) -> None:
        content = read_json(path)
        images, annotations = _lists(content, path, ("images", "annotations"))
        self._check_images(images, path)
        names = _category_names(content, path)
        if self.metadata.get("thing_classes") is None:  # registered by the user's own code
            self.metadata.thing_classes = [names[key] for key in sorted(names)]
        self._check_category_names(names, path)
        _check_keys(annotations, self._needed_keys(), path)
        self._check_category_ids({a["category_id"] for a in annotations}, names, path)
        _check_unique_ids(annotations, path)
        self._check_masks([a for a in annotations if not a.get("iscrowd", 0)], path)
        self._check_not_empty(images, annotations, path)

    def _needed_keys(self) -> set[str]:
        keys = INSTANCE_KEYS
        return keys if self.is_train else keys | {"area"}  # AP by size needs the area

    def _check_images(self, images: list[dict[str, Any]], path: str) -> None:
        _check_keys(images, IMAGE_KEYS, path, what="image")
        check_listed_files(
            self.metadata.image_root,
            (image["file_name"] for image in images),
            path,
            "Copy them there, or remove them from the json.",
        )

    def _check_category_names(self, names: dict[int, str], path: str) -> None:
        ids = self.metadata.get("thing_dataset_id_to_contiguous_id") or {}
        for key in names.keys() & ids.keys():
            expected = self.metadata.thing_classes[ids[key]]
            if names[key] != expected:
                raise DatasetError(
                    f"{path} must name category id={key} as data set {self.name!r} does, "
                    f"{expected!r}, got {names[key]!r}. Register your own data under another name "
                    "with DATASETS.COCO_INSTANCES or DATASETS.COCO_PANOPTIC."
                )

    def _check_category_ids(self, used: set[int], names: dict[int, str], path: str) -> None:
        known = self.metadata.get("thing_dataset_id_to_contiguous_id") or names
        _check_known(used, set(known), path)

    def _check_masks(self, annotations: list[dict[str, Any]], path: str) -> None:
        if not self.cfg.MODEL.MASK_ON:
            return
        without = sum(not annotation.get("segmentation") for annotation in annotations)
        if without:
            raise DatasetError(
                f"All instances in {path} must have a segmentation while MODEL.MASK_ON is True, "
                f"got {without} of {len(annotations)} without. "
                "Add the override: MODEL.MASK_ON False"
            )
        is_rle = any(isinstance(annotation["segmentation"], dict) for annotation in annotations)
        if self.is_train and is_rle and self.cfg.INPUT.MASK_FORMAT != "bitmask":
            raise DatasetError(
                f"INPUT.MASK_FORMAT must be 'bitmask' as {path} has masks in RLE, "
                f"got {self.cfg.INPUT.MASK_FORMAT!r}. Add the override: INPUT.MASK_FORMAT bitmask"
            )

    def _check_not_empty(
        self, images: list[dict[str, Any]], annotations: list[dict[str, Any]], path: str
    ) -> None:
        if not images:
            raise DatasetError(f"{path} must list at least one image, got none.")
        used = {a["image_id"] for a in annotations if not a.get("iscrowd", 0)}
        filters = self.is_train and self.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        if filters and not used & {image["id"] for image in images}:
            raise DatasetError(
                f"{path} must have an image with an instance that is no crowd to train on, got "
                f"none in {len(images)} images. Are the annotations' image_id those of the images?"
            )

    # Panoptic

    def _check_panoptic(self, path: str) -> None:
        content = read_json(path)
        images, annotations = _lists(content, path, ("images", "annotations"))
        self._check_images(images, path)
        _check_keys(annotations, PANOPTIC_KEYS, path)
        if not annotations:
            raise DatasetError(f"{path} must have at least one annotation, got none.")
        strangers = {a["image_id"] for a in annotations} - {image["id"] for image in images}
        if strangers:
            raise DatasetError(
                f"{path} must list the image of every annotation, got {len(strangers)} without, "
                f"the first is image_id={min(strangers)}."
            )
        segments = [
            segment for annotation in annotations for segment in annotation["segments_info"]
        ]
        _check_keys(segments, SEGMENT_KEYS, path, what="segment")
        known = {
            key
            for kind in ("thing", "stuff")
            for key in self.metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {}
        }
        _check_known({segment["category_id"] for segment in segments}, known, path)
        self._check_pngs([annotation["file_name"] for annotation in annotations], path)

    def _check_pngs(self, names: list[str], path: str) -> None:
        check_listed_files(
            self.metadata.panoptic_root, names, path, "Unpack the panoptic PNGs again."
        )
        root = self.metadata.get("sem_seg_root")
        if root is None:
            return
        check_listed_files(root, names, path, way_out("sem_seg_root", root, self.metadata))
        for name in names[:_STUFF_PNGS_LOOKED_AT]:
            self._check_labels(os.path.join(root, name))

    def _check_labels(self, path: str) -> None:
        """Find stuff PNGs of another data set, whose labels would crash the loss."""
        try:
            labels = np.asarray(Image.open(path).convert("L"))
        except Exception:  # whatever a damaged file makes Pillow raise; the mapper names it
            return
        unknown = unknown_labels(labels, len(self.metadata.stuff_classes))
        if unknown:
            raise DatasetError(
                f"{path} must have labels below {len(self.metadata.stuff_classes)}, the number of "
                f"stuff classes of data set {self.name!r}, got {unknown[-1]}. "
                + way_out("sem_seg_root", self.metadata.sem_seg_root, self.metadata)
                + " --overwrite"
            )


# Pieces of a json -------------------------------------------------------------------------------


def _lists(content: dict[str, Any], path: str, keys: Sequence[str]) -> list[list[dict[str, Any]]]:
    for key in keys:
        if not isinstance(content.get(key), list):
            raise DatasetError(
                f"{path} must have a list {key!r} at its top level, got the keys "
                f"{', '.join(content) or 'none'}. See cocodataset.org/#format-data."
            )
    return [content[key] for key in keys]


def _category_names(content: dict[str, Any], path: str) -> dict[int, str]:
    (categories,) = _lists(content, path, ("categories",))
    _check_keys(categories, {"id", "name"}, path, what="category")
    return {category["id"]: category["name"] for category in categories}


def _check_keys(
    entries: list[dict[str, Any]], needed: set[str], path: str, what: str = "annotation"
) -> None:
    for index, entry in enumerate(entries):
        lacking = lacking_keys(entry, needed)
        if lacking:
            raise DatasetError(
                f"Every {what} in {path} must have {', '.join(sorted(needed))}, "
                f"got number {index} without {', '.join(lacking)}."
            )


def _check_known(used: set[int], known: set[int], path: str) -> None:
    unknown = used - known
    if unknown:
        raise DatasetError(
            f"Annotations in {path} must use only ids of its categories, got "
            f"category_id={min(unknown)}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + f"; the {len(known)} known ids lie between {min(known, default=None)} and "
            f"{max(known, default=None)}. Add the category or correct the annotations."
        )


def _check_unique_ids(annotations: list[dict[str, Any]], path: str) -> None:
    ids = [annotation["id"] for annotation in annotations]
    if any(True for _ in repeated(ids)):
        raise DatasetError(
            f"Annotations in {path} must have ids of their own, "
            f"got {len(ids)} annotations with {len(set(ids))} ids. Number them anew."
        )
