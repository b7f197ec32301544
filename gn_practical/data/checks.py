"""Checks of a run's data sets before the model is built: what is missing, and what to run."""

import difflib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm
from PIL import Image

from gn_practical.data.coco_format import VOID, read_json
from gn_practical.data.errors import DatasetError
from gn_practical.data.registration import DATASETS_ROOT, SCENES_ROOT
from gn_practical.data.scenes import ensure_scenes

_logger = logging.getLogger(__name__)

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
_FILES = {  # metadata keys, with what they are
    "image_root": "folder of images",
    "json_file": "instances json",
    "panoptic_json": "panoptic json",
    "panoptic_root": "folder of panoptic PNGs",
    "sem_seg_root": "folder of stuff PNGs",
}
_STUFF_PNGS_LOOKED_AT = 4


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check the data sets that a run will use; make the embedded scenes if it uses them.

    Checked for every name of ``DATASETS.TRAIN`` and ``DATASETS.TEST``: it is registered, its
    files exist, all images and PNGs that its jsons list are there, annotations use only known
    categories, the numbers of classes are those of the model, masks can be read as
    ``INPUT.MASK_FORMAT`` says, and all sets of the run have the same classes. Each json is read
    once. In a distributed run every rank must call this; one rank of each machine reads.

    Args:
        cfg: the complete config of the run.
        eval_only: check ``DATASETS.TEST`` alone.

    Raises:
        DatasetError: on all ranks, with what is wrong and what to do.

    Example:
        >>> check_datasets(cfg)  # doctest: +SKIP
    """
    train = () if eval_only else tuple(cfg.DATASETS.TRAIN)
    names = list(dict.fromkeys((*train, *cfg.DATASETS.TEST)))
    if not (cfg.DATASETS.TEST if eval_only else train):
        key = "TEST" if eval_only else "TRAIN"
        raise DatasetError(
            f"DATASETS.{key} must name at least one data set, got (). "
            f"""For example: DATASETS.{key} "('scenes_train_panoptic_separated',)"."""
        )
    for name in names:
        _check_registered(name)
    if any(_lies_in_scenes(MetadataCatalog.get(name)) for name in names):
        ensure_scenes(SCENES_ROOT)
    problem = None
    if comm.get_local_rank() == 0:
        try:
            _check_all(cfg, names, train)
        except DatasetError as error:
            problem = str(error)
    # A barrier that also tells: a rank that raised alone would leave the others waiting.
    problems = [text for text in comm.all_gather(problem) if text]
    if problems:
        raise DatasetError(problems[0])


def _check_registered(name: str) -> None:
    if name in DatasetCatalog:
        return
    known = DatasetCatalog.list()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if f"{name}_separated" in known:
        close = [f"{name}_separated"]
    raise DatasetError(
        f"A data set must be registered, got {name!r}. "
        + (f"Names close to it: {', '.join(close)}. " if close else "")
        + "Your own data is registered with DATASETS.COCO_INSTANCES or DATASETS.COCO_PANOPTIC."
    )


def _lies_in_scenes(metadata: Metadata) -> bool:
    return os.path.dirname(metadata.get("image_root", "")) == os.path.join(SCENES_ROOT, "images")


def _check_all(cfg: CfgNode, names: list[str], train: Sequence[str]) -> None:
    for name in names:
        _check_files_exist(name)
    for name in names:
        _DatasetCheck(cfg, name, name in train).run()
    _check_same_classes(names)


# Files ------------------------------------------------------------------------------------------


def _check_files_exist(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    for key, what in _FILES.items():
        path = metadata.get(key)
        if path is None or "://" in str(path):
            continue
        path = os.fspath(path)
        is_there = os.path.isfile(path) if "json" in key else os.path.isdir(path)
        if not is_there:
            raise DatasetError(
                f"The {what} of data set {name!r} must exist, got {os.path.abspath(path)}. "
                + _way_out(key, path, metadata)
            )


def _way_out(key: str, path: str, metadata: Metadata) -> str:
    coco = os.path.join(DATASETS_ROOT, "coco")
    in_coco = path.startswith(coco + os.sep)
    if key == "sem_seg_root":
        command = "python tools/prepare_panoptic_coco.py"
        if not in_coco:
            command += (
                f" --panoptic-json {metadata.panoptic_json}"
                f" --panoptic-root {metadata.panoptic_root} --output {path}"
            )
        return f"Run: {command}"
    archive = os.path.join(coco, "annotations", os.path.basename(path) + ".zip")
    if key == "panoptic_root" and in_coco and os.path.isfile(archive):
        return f"Run: unzip -q {archive} -d {coco}"
    if not path.startswith(os.path.join(DATASETS_ROOT, "")):
        return "Check its path in the config."
    source = "Download COCO from cocodataset.org and unpack it there, or set" if in_coco else "Set"
    state = "as it is set" if "DETECTRON2_DATASETS" in os.environ else "it is not set"
    return (
        f"{source} the environment variable DETECTRON2_DATASETS to the folder of your data sets "
        f"({state}, the folder is {os.path.abspath(DATASETS_ROOT)})."
    )


def _check_listed_files(root: str, names: Iterable[str], source: str, way_out: str) -> None:
    """Check that all files that a json lists are in a folder, with one listing of each folder."""
    by_folder: dict[str, set[str]] = defaultdict(set)
    for name in names:
        folder, base = os.path.split(name)
        by_folder[folder].add(base)
    missing = []
    for folder, wanted in by_folder.items():
        path = os.path.join(root, folder)
        present = set(os.listdir(path)) if os.path.isdir(path) else set()
        missing += [os.path.join(folder, base) for base in wanted - present]
    if missing:
        total = sum(map(len, by_folder.values()))
        raise DatasetError(
            f"All {total} files that {source} lists must be in {root}, got {len(missing)} missing: "
            f"{', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''}. {way_out}"
        )


# One data set -----------------------------------------------------------------------------------


class _DatasetCheck:
    """The checks of one data set against its jsons and against the config."""

    def __init__(self, cfg: CfgNode, name: str, is_train: bool) -> None:
        self.cfg = cfg
        self.name = name
        self.is_train = is_train
        self.metadata = MetadataCatalog.get(name)
        self.architecture = cfg.MODEL.META_ARCHITECTURE

    def run(self) -> None:
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
        keys = {"id", "image_id", "category_id", "bbox"}
        return keys if self.is_train else keys | {"area"}  # AP by size needs the area

    def _check_images(self, images: list[dict[str, Any]], path: str) -> None:
        _check_keys(images, {"id", "file_name", "height", "width"}, path, what="image")
        _check_listed_files(
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
        _check_keys(annotations, {"image_id", "file_name", "segments_info"}, path)
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
        _check_keys(segments, {"id", "category_id"}, path, what="segment")
        known = {
            key
            for kind in ("thing", "stuff")
            for key in self.metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {}
        }
        _check_known({segment["category_id"] for segment in segments}, known, path)
        self._check_pngs([annotation["file_name"] for annotation in annotations], path)

    def _check_pngs(self, names: list[str], path: str) -> None:
        _check_listed_files(
            self.metadata.panoptic_root, names, path, "Unpack the panoptic PNGs again."
        )
        root = self.metadata.get("sem_seg_root")
        if root is None:
            return
        _check_listed_files(root, names, path, _way_out("sem_seg_root", root, self.metadata))
        for name in names[:_STUFF_PNGS_LOOKED_AT]:
            self._check_labels(os.path.join(root, name))

    def _check_labels(self, path: str) -> None:
        """Find stuff PNGs of another data set, whose labels would crash the loss."""
        try:
            labels = np.unique(np.asarray(Image.open(path).convert("L")))
        except Exception:  # whatever a damaged file makes Pillow raise; the mapper names it
            return
        largest = int(labels[labels != VOID].max(initial=0))
        if largest >= len(self.metadata.stuff_classes):
            raise DatasetError(
                f"{path} must have labels below {len(self.metadata.stuff_classes)}, the number of "
                f"stuff classes of data set {self.name!r}, got {largest}. "
                + _way_out("sem_seg_root", self.metadata.sem_seg_root, self.metadata)
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
        if not isinstance(entry, dict) or not needed <= entry.keys():
            lacking = sorted(needed - entry.keys()) if isinstance(entry, dict) else sorted(needed)
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
    if len(set(ids)) != len(ids):
        raise DatasetError(
            f"Annotations in {path} must have ids of their own, "
            f"got {len(ids)} annotations with {len(set(ids))} ids. Number them anew."
        )


def _check_same_classes(names: list[str]) -> None:
    """Check that the sets of one run name the same classes in the same order."""
    for attribute in ("thing_classes", "stuff_classes"):
        known = {n: MetadataCatalog.get(n).get(attribute) for n in names}
        known = {name: classes for name, classes in known.items() if classes is not None}
        for name, classes in known.items():
            first = next(iter(known))
            if classes != known[first]:
                raise DatasetError(
                    f"All data sets of a run must have the same {attribute.replace('_', ' ')}, got "
                    f"{len(known[first])} in {first!r} and {len(classes)} in {name!r}; they differ "
                    f"in {_first_difference(known[first], classes)}. List the same categories in "
                    "both jsons."
                )


def _first_difference(first: list[str], second: list[str]) -> str:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return f"class {index}: {a!r} and {b!r}"
    return f"the classes from number {min(len(first), len(second))} on"
