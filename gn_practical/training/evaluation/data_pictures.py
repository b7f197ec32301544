"""Pictures of training data: as it is annotated, and as the model is fed with it."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BitMasks, Instances, PolygonMasks

from gn_practical.training.data import DatasetError
from gn_practical.training.evaluation.annotated import (
    Classes,
    Record,
    instance_shapes,
    label_shapes,
    read_labels,
    read_pixels,
    read_segment_ids,
    segment_shapes,
)
from gn_practical.training.evaluation.ids import unused
from gn_practical.training.evaluation.panels import Shape, draw_shapes, side_by_side


class Picture(NamedTuple):
    """A picture to make, when it is wanted."""

    name: str  # of the file, without its ending
    draw: Callable[[], np.ndarray]


def of_records(records: Iterable[Record], classes: Classes) -> Iterator[Picture]:
    """Yield a picture of each record: a panel for each kind of annotation that it has."""
    taken: set[str] = set()
    for record in records:
        name = unused(_stem(record), taken)
        yield Picture(name, lambda record=record: draw_record(record, classes))


def of_samples(
    batches: Iterable[Sequence[Record]], classes: Classes, image_format: str, most: int
) -> Iterator[Picture]:
    """Yield a picture of each sample in the order of training, the first ``most``."""
    samples = (sample for batch in batches for sample in batch)
    for number, sample in enumerate(islice(samples, most), start=1):
        name = f"{number:04d}_{_stem(sample)}"
        yield Picture(name, lambda sample=sample: draw_sample(sample, classes, image_format))


def draw_record(record: Record, classes: Classes) -> np.ndarray:
    """Draw what is annotated: instances, panoptic segments, stuff labels, side by side.

    Raises:
        DatasetError: naming the file that cannot be used.
    """
    pixels = read_pixels(record)
    panels: dict[str, list[Shape]] = {}
    if "annotations" in record:
        shapes = instance_shapes(record, classes)
        panels[f"instances ({len(shapes)})"] = shapes
    if "pan_seg_file_name" in record:
        ids = read_segment_ids(record["pan_seg_file_name"])
        _check_size(record["pan_seg_file_name"], ids, pixels)
        segments = record["segments_info"]
        panels[f"panoptic ({len(segments)} segments)"] = segment_shapes(ids, segments, classes)
    if "sem_seg_file_name" in record:
        labels = read_labels(record)
        _check_size(record["sem_seg_file_name"], labels, pixels)
        panels["stuff labels"] = label_shapes(labels, classes)
    return _draw(pixels, panels, classes)


def draw_sample(sample: Record, classes: Classes, image_format: str) -> np.ndarray:
    """Draw an input of the model in training, as the mapper made it.

    Args:
        sample: with "image", and "instances" or "sem_seg".
        classes: of the data set.
        image_format: cfg.INPUT.FORMAT.
    """
    image = sample["image"].permute(1, 2, 0).numpy()
    pixels = np.ascontiguousarray(np.clip(convert_image_to_rgb(image, image_format), 0, 255))
    pixels = pixels.astype(np.uint8)
    panels: dict[str, list[Shape]] = {}
    if "instances" in sample:
        shapes = _target_shapes(sample["instances"], classes)
        panels[f"instances ({len(shapes)})"] = shapes
    if "sem_seg" in sample:
        panels["stuff labels"] = label_shapes(sample["sem_seg"].numpy(), classes)
    return _draw(pixels, panels, classes)


def _draw(pixels: np.ndarray, panels: dict[str, list[Shape]], classes: Classes) -> np.ndarray:
    height, width = pixels.shape[:2]
    panels = panels or {"nothing annotated": []}
    drawn = [draw_shapes(pixels, shapes, classes.metadata) for shapes in panels.values()]
    first, *others = panels
    return side_by_side(drawn, [f"{width}x{height}: {first}", *others])


def _target_shapes(instances: Instances, classes: Classes) -> list[Shape]:
    count = len(instances)
    categories = instances.gt_classes.tolist()
    boxes = instances.gt_boxes.tensor.tolist() if instances.has("gt_boxes") else [None] * count
    masks: Any = [None] * count
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        masks = masks.tensor.numpy()
    points: Any = [None] * count
    if instances.has("gt_keypoints"):
        points = instances.gt_keypoints.tensor.numpy()
    return [
        Shape(classes.name(category), classes.color(category), *parts)
        for category, *parts in zip(categories, masks, boxes, points, strict=True)
    ]


def _check_size(path: str, labels: np.ndarray, pixels: np.ndarray) -> None:
    if labels.shape != pixels.shape[:2]:
        raise DatasetError(
            f"a PNG of labels must have the size of its image, got {path} of "
            f"{labels.shape[1]}x{labels.shape[0]} for {pixels.shape[1]}x{pixels.shape[0]}."
        )


def _stem(record: Record) -> str:
    path = str(record.get("file_name", record.get("image_id", "image")))
    return os.path.splitext(os.path.basename(path))[0]
