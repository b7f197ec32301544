"""Predictions in COCO's formats, read back and held against the data set that was predicted."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from gn_practical.training.data.coco_format import is_number
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.evaluation.annotated import (
    AnnotatedImages,
    Record,
    as_rle,
    read_segment_ids,
)

_INSTANCES, _PANOPTIC = "coco_instances_results.json", "predictions.json"  # as evaluations leave
_WAY_OUT = "Name the data set that was predicted, with --dataset or --config-file."


class Predictions(NamedTuple):
    """What a file says of each image, with contiguous class ids; nothing of others."""

    path: str
    panoptic: bool
    by_image: dict[Any, list[Record]]  # instances, or segments
    pngs: dict[Any, str]  # of panoptic predictions

    def segment_ids(self, record: Record) -> np.ndarray:
        """Read the panoptic map of an image.

        Raises:
            DatasetError: if the PNG cannot be read, or its segments are not those of the json.
        """
        image_id = record["image_id"]
        ids = read_segment_ids(self.pngs[image_id])
        stated = {segment["id"] for segment in self.by_image[image_id]}
        difference = (set(np.unique(ids).tolist()) - {0}) ^ stated
        if difference:
            number = min(difference)
            where = "the json alone" if number in stated else "the PNG alone"
            raise DatasetError(
                f"segments must be in both {self.path} and {self.pngs[image_id]}, got id={number} "
                f"of image_id={image_id!r} in {where}. They are of two runs: predict again."
            )
        return ids


def find_predictions(path: str, images: AnnotatedImages, kind: str | None = None) -> str:
    """Return the file of predictions in a folder; a file's own path.

    Args:
        path: a file, or a folder where an evaluation left its results.
        images: that are predicted; of two files the panoptic one is taken where they have segments.
        kind: "panoptic" or "instances", to take that.

    Raises:
        DatasetError: if there is none.
    """
    if not os.path.isdir(path):
        return path
    has_segments = any("pan_seg_file_name" in record for record in images.records[:1])
    by_kind = {"panoptic": [_PANOPTIC], "instances": [_INSTANCES]}
    names = by_kind.get(kind, [_PANOPTIC, _INSTANCES] if has_segments else [_INSTANCES])
    for folder in (path, os.path.join(path, "inference")):
        for name in names:
            if os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
    there = ", ".join(sorted(os.listdir(path))[:10]) or "nothing"
    raise DatasetError(
        f"input must be a json of predictions or a folder with {' or '.join(names)}, got {path} "
        f"with {there}. Name the file."
    )


def read_predictions(path: str, images: AnnotatedImages, png_dir: str | None = None) -> Predictions:
    """Read predictions and check that they are of these images and classes.

    Args:
        path: a list of instances (COCO's results) or a panoptic json.
        images: the data set.
        png_dir: of panoptic predictions; by default "panoptic" beside the json, or its folder.

    Raises:
        DatasetError: naming the first image, class or size that does not fit.
    """
    content = _read(path)
    records = {record["image_id"]: record for record in images.records}
    if isinstance(content, list):
        return _instances(path, content, records, images)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if isinstance(annotations, list) and all("segments_info" in a for a in annotations):
        return _panoptic(path, annotations, records, images, png_dir)
    raise DatasetError(
        f"predictions must be a list of instances or a panoptic json, got another content in "
        f"{path}. An evaluation leaves {_INSTANCES} and {_PANOPTIC}."
    )


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"predictions must be a readable json, got {path}: {error}. Check the path."
        ) from None


def _instances(
    path: str, content: list[Any], records: dict[Any, Record], images: AnnotatedImages
) -> Predictions:
    for number, entry in enumerate(content):
        lacking = {"image_id", "category_id", "score"} - entry.keys() if _is_dict(entry) else {"{}"}
        if _is_dict(entry) and not lacking and not entry.keys() & {"bbox", "segmentation"}:
            lacking = {"bbox"}
        if lacking:
            raise DatasetError(
                f"instances must have image_id, category_id, score and a bbox or segmentation, got "
                f"entry {number} of {path} without {', '.join(sorted(lacking))}. Predict again."
            )
    _check_images(path, (entry["image_id"] for entry in content), records, images)
    by_image: dict[Any, list[Record]] = {image_id: [] for image_id in records}
    for entry in content:
        category = _category(path, entry, images)[0]
        found = {"category_id": category, "score": _score(path, entry)}
        by_image[entry["image_id"]].append(found | _outline(path, entry, records))
    return Predictions(path, False, by_image, {})


def _outline(path: str, entry: Record, records: dict[Any, Record]) -> Record:
    """Return the box, and the mask as RLE if there is one."""
    record, outline = records[entry["image_id"]], {}
    size = [record.get("height"), record.get("width")]
    segmentation, box = entry.get("segmentation"), entry.get("bbox")
    if segmentation:
        if isinstance(segmentation, dict) and None not in size and segmentation["size"] != size:
            raise DatasetError(
                f"masks must have the size of their image, {size}, got "
                f"size={segmentation['size']} of image_id={entry['image_id']!r} in {path}. "
                f"{_WAY_OUT}"
            )
        outline["rle"] = as_rle(segmentation, tuple(size))
        box = mask_util.toBbox(outline["rle"]).tolist() if box is None else box
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        raise DatasetError(
            f"a bbox must be [x, y, width, height], got bbox={box!r} of "
            f"image_id={entry['image_id']!r} in {path}. Predict again."
        )
    keypoints = entry.get("keypoints")
    if keypoints:
        if not (len(keypoints) % 3 == 0 and all(map(is_number, keypoints))):
            raise DatasetError(
                f"keypoints must be x, y, score in turn, got keypoints={keypoints!r} of "
                f"image_id={entry['image_id']!r} in {path}. Predict again."
            )
        outline["keypoints"] = np.reshape(keypoints, (-1, 3))
    return {**outline, "bbox": box}


def _panoptic(
    path: str,
    annotations: list[Record],
    records: dict[Any, Record],
    images: AnnotatedImages,
    png_dir: str | None,
) -> Predictions:
    _check_images(path, (a["image_id"] for a in annotations), records, images)
    folder = png_dir or _png_folder(path)
    pngs = {a["image_id"]: os.path.join(folder, a["file_name"]) for a in annotations}
    by_image = {}
    for annotation in annotations:
        image_id = annotation["image_id"]
        if image_id in by_image:
            raise DatasetError(
                f"an image must be predicted once, got image_id={image_id!r} twice in {path}."
            )
        segments = []
        for segment in annotation["segments_info"]:
            category, thing = _category(path, {**segment, "image_id": image_id}, images)
            segments.append({**segment, "category_id": category, "isthing": thing})
        by_image[image_id] = segments
        _check_png(pngs[image_id], records[image_id])
    return Predictions(path, True, by_image, pngs)


def _png_folder(path: str) -> str:
    """Return the folder of the PNGs that belong to a panoptic json."""
    beside = os.path.dirname(path) or "."
    own = os.path.splitext(path)[0]
    folders = [os.path.join(beside, "panoptic"), own, beside]
    return next(folder for folder in folders if os.path.isdir(folder))


def _check_png(path: str, record: Record) -> None:
    stated = (record["width"], record["height"])
    try:
        with Image.open(path) as png:  # its header alone
            found = f"{png.width}x{png.height}" if png.size != stated else ""
    except OSError as error:
        found = str(error)
    if found:
        raise DatasetError(
            f"the PNG of image_id={record['image_id']!r} must be {stated[0]}x{stated[1]} pixels as "
            f"its image, got {found} in {path}. Name the folder with --png-dir, or predict again."
        )


def _check_images(
    path: str, ids: Iterator[Any], records: dict[Any, Record], images: AnnotatedImages
) -> None:
    unknown = list(dict.fromkeys(each for each in ids if _hashable(each) not in records))
    if unknown:
        example = f" (one of them is {next(iter(records))!r})" if records else ""
        raise DatasetError(
            f"predictions must be of the {len(records)} images of {images.name}{example}, got "
            f"image_id={unknown[0]!r} in {path}, and {len(unknown) - 1} other unknown ones. "
            f"{_WAY_OUT}"
        )


def _category(path: str, entry: Record, images: AnnotatedImages) -> tuple[int, bool]:
    known = images.classes.by_dataset_id
    category = _hashable(entry.get("category_id"))
    if category not in known:
        raise DatasetError(
            f"predicted classes must be among the {len(known)} of {images.name}, got "
            f"category_id={category!r} of image_id={entry['image_id']!r} in {path}. {_WAY_OUT}"
        )
    return known[category]


def _score(path: str, entry: Record) -> float:
    if not is_number(entry["score"]):
        raise DatasetError(
            f"scores must be numbers, got score={entry['score']!r} of "
            f"image_id={entry['image_id']!r} in {path}. Predict again."
        )
    return float(entry["score"])


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else repr(value)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)
