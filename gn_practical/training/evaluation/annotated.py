"""Images and what is annotated on them, from a registered data set or from files."""

import os
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image

from gn_practical.inference.drawing import with_colors
from gn_practical.training.data import DatasetError
from gn_practical.training.data.coco_format import (
    instances_metadata,
    panoptic_metadata,
    read_categories,
    read_json,
    rgb_to_id,
)
from gn_practical.training.data.registration import contiguous, ensure_registered
from gn_practical.training.evaluation.panels import Shape
from gn_practical.training.evaluation.sem_seg import read_label_image

Record = dict[str, Any]


class Classes:
    """Names and colours of the classes of a data set."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = with_colors(metadata)

    def name(self, category: int, thing: bool = True) -> str:
        """Return the name of a class by its contiguous id; its number where it has none."""
        names = self.metadata.get(f"{_kind(thing)}_classes") or ()
        return str(names[category]) if 0 <= category < len(names) else f"class {category}"

    def color(self, category: int, thing: bool = True) -> tuple[float, float, float]:
        """Return its colour, RGB from 0 to 255."""
        colors = self.metadata.get(f"{_kind(thing)}_colors")
        return tuple(colors[category]) if 0 <= category < len(colors) else (128, 128, 128)

    @cached_property
    def by_dataset_id(self) -> dict[Any, tuple[int, bool]]:
        """The data set's id of each class → contiguous id, whether it is a thing."""
        known: dict[Any, tuple[int, bool]] = {}
        for thing in (False, True):  # a thing wins: 0 is what stands for things among stuff
            ids = self.metadata.get(f"{_kind(thing)}_dataset_id_to_contiguous_id")
            if ids is None:
                first = 1 if self.metadata.get("evaluator_type") == "lvis" else 0
                names = self.metadata.get(f"{_kind(thing)}_classes") or ()
                ids = {first + index: index for index in range(len(names))} if thing else {}
            known |= {key: (index, thing) for key, index in ids.items()}
        return known


class AnnotatedImages(NamedTuple):
    """Images with their annotations, as Detectron2's records have them."""

    name: str
    classes: Classes
    records: list[Record]


def from_catalog(names: Iterable[str]) -> AnnotatedImages:
    """Load registered data sets, which share their classes.

    Raises:
        DatasetError: if one is not registered or cannot be loaded.
    """
    names = list(names)
    ensure_registered(names)
    records: list[Record] = []
    for name in names:
        try:
            records += _with_panoptic(DatasetCatalog.get(name), MetadataCatalog.get(name))
        except (DatasetError, ImportError):
            raise
        except Exception as error:  # whatever a loader raises at a file that it cannot take
            raise _unloadable(name, error) from error
    return AnnotatedImages(", ".join(names), Classes(MetadataCatalog.get(names[0])), records)


def from_instances(path: str, images: str) -> AnnotatedImages:
    """Load a json of instances in COCO's format, with the folder of its images.

    Raises:
        DatasetError: if it cannot be loaded.
    """
    metadata = Metadata(name=path, **instances_metadata(read_categories(path)))
    try:
        records = load_coco_json(path, images)
        for annotation in (a for record in records for a in record["annotations"]):
            known = metadata.thing_dataset_id_to_contiguous_id
            annotation["category_id"] = known[annotation["category_id"]]
    except Exception as error:  # KeyError, AssertionError, ... of Detectron2 and pycocotools
        raise _unloadable(path, error) from error
    return AnnotatedImages(path, Classes(metadata), records)


def from_panoptic(path: str, png_dir: str, images: str) -> AnnotatedImages:
    """Load a panoptic json in COCO's format, with the folders of its PNGs and images.

    Raises:
        DatasetError: if it cannot be loaded.
    """
    metadata = Metadata(name=path, **panoptic_metadata(read_categories(path), path))
    try:
        content = read_json(path)
        annotations = {a["image_id"]: a for a in content["annotations"]}
        records = [
            {
                "file_name": os.path.join(images, image["file_name"]),
                **{"image_id": image["id"], "width": image["width"], "height": image["height"]},
                **_panoptic_keys(annotations[image["id"]], png_dir, metadata),
            }
            for image in content["images"]
            if image["id"] in annotations
        ]
    except (KeyError, TypeError) as error:
        raise _unloadable(path, error) from error
    return AnnotatedImages(path, Classes(metadata), records)


def read_pixels(record: Record) -> np.ndarray:
    """Read an image, RGB, as training does.

    Raises:
        DatasetError: naming the file, if it cannot be read or has another size than the json says.
    """
    path = record["file_name"]
    try:
        pixels = read_image(path, format="RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        what = " ".join(str(error).split())
        raise DatasetError(f"an image must be readable, got {path}: {what}.") from None
    stated = (record.get("height"), record.get("width"))
    if None not in stated and pixels.shape[:2] != stated:
        raise DatasetError(
            f"an image must have the size of its entry, got {path} of "
            f"{pixels.shape[1]}x{pixels.shape[0]} for {stated[1]}x{stated[0]}."
        )
    return pixels


def instance_shapes(record: Record, classes: Classes) -> list[Shape]:
    """Return the annotated instances of a record."""
    size = (record["height"], record["width"]) if "height" in record else None
    shapes = []
    for annotation in record.get("annotations", ()):
        category = annotation["category_id"]
        crowd = " (crowd)" if annotation.get("iscrowd") else ""
        segmentation, keypoints = annotation.get("segmentation"), annotation.get("keypoints")
        mask = mask_util.decode(as_rle(segmentation, size)) if segmentation and size else None
        points = np.reshape(keypoints, (-1, 3)) if keypoints else None
        text, color = classes.name(category) + crowd, classes.color(category)
        shapes.append(Shape(text, color, mask, _corners(annotation), points))
    return shapes


def found_shapes(instances: Instances, classes: Classes) -> list[Shape]:
    """Return the instances that a model predicts, on the CPU."""
    count = len(instances)
    scores = instances.scores.tolist()
    boxes = instances.pred_boxes.tensor.tolist() if instances.has("pred_boxes") else [None] * count
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else [None] * count
    points: Any = [None] * count
    if instances.has("pred_keypoints"):
        points = instances.pred_keypoints.numpy()
    return [
        Shape(f"{classes.name(c)} {100 * score:.0f}%", classes.color(c), *parts)
        for c, score, *parts in zip(
            instances.pred_classes.tolist(), scores, masks, boxes, points, strict=True
        )
    ]


def segment_shapes(ids: np.ndarray, segments: Iterable[Record], classes: Classes) -> list[Shape]:
    """Return the segments of a panoptic map, which may have a "score" and a "note"."""
    shapes = []
    for segment in segments:
        category, thing = segment["category_id"], bool(segment["isthing"])
        crowd = " (crowd)" if segment.get("iscrowd") else ""
        score = f" {100 * segment['score']:.0f}%" if segment.get("score") is not None else ""
        text = f"{classes.name(category, thing)}{score}{crowd}{segment.get('note', '')}"
        shapes.append(Shape(text, classes.color(category, thing), ids == segment["id"]))
    return shapes


def label_shapes(labels: np.ndarray, classes: Classes) -> list[Shape]:
    """Return the areas of the stuff classes of a label map; other labels are left out."""
    count = len(classes.metadata.get("stuff_classes") or ())
    return [
        Shape(classes.name(label, False), classes.color(label, False), labels == label)
        for label in np.unique(labels).tolist()
        if 0 <= label < count
    ]


def read_segment_ids(path: str) -> np.ndarray:
    """Read a panoptic PNG: (H, W) segment ids.

    Raises:
        DatasetError: naming the file, if it cannot be read.
    """
    try:
        with PathManager.open(path, "rb") as file:
            return rgb_to_id(np.array(Image.open(file).convert("RGB")))
    except (OSError, SyntaxError) as error:  # PIL's PNG reader raises SyntaxError
        raise DatasetError(f"a panoptic PNG must be readable, got {path}: {error}.") from error


def read_labels(record: Record) -> np.ndarray:
    """Read the stuff labels of a record: (H, W)."""
    return read_label_image(record["sem_seg_file_name"])


def as_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return polygons or any RLE as compressed RLE of a size (H, W)."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *size)
    return segmentation


def _with_panoptic(records: list[Record], metadata: Metadata) -> list[Record]:
    """Add the panoptic annotations that Detectron2's loader of a separated data set leaves out."""
    path = metadata.get("panoptic_json")
    if not path or not records or "annotations" not in records[0]:
        return records
    if "segments_info" in records[0]:
        return records
    content = read_json(PathManager.get_local_path(path))
    root, annotations = metadata.panoptic_root, {a["image_id"]: a for a in content["annotations"]}
    return [
        {**record, **_panoptic_keys(annotations[record["image_id"]], root, metadata)}
        for record in records
    ]


def _panoptic_keys(annotation: Record, root: str, metadata: Metadata) -> Record:
    segments = [contiguous(segment, metadata) for segment in annotation["segments_info"]]
    return {
        "pan_seg_file_name": os.path.join(root, annotation["file_name"]),
        "segments_info": segments,
    }


def _corners(annotation: Record) -> list[float]:
    """Return left, top, right and bottom; of a rotated box centre, size and angle."""
    box, mode = list(annotation["bbox"]), annotation["bbox_mode"]
    return box if mode == BoxMode.XYWHA_ABS else list(BoxMode.convert(box, mode, BoxMode.XYXY_ABS))


def _kind(thing: bool) -> str:
    return "thing" if thing else "stuff"


def _unloadable(name: str, error: Exception) -> DatasetError:
    if isinstance(error, OSError):
        return DatasetError(
            f"a data set must be there, got {error} for {name}. Check the path, or the environment "
            "variable DETECTRON2_DATASETS."
        )
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return DatasetError(
        f"a data set must be sound, got {what} in {name}. tools/validate_dataset.py tells what is "
        "wrong with which file and annotation."
    )
