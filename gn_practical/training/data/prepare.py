"""What a panoptic FPN needs beside COCO's panoptic files: stuff PNGs and an instances json."""

import logging
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gn_practical.atomic import PathLike, refuse_overwriting, replace_file, write_json
from gn_practical.training.data.coco_format import (
    VOID,
    mask_annotation,
    read_json,
    rgb_to_id,
    sort_categories,
    stuff_labels,
)
from gn_practical.training.data.errors import DatasetError, writing
from gn_practical.training.data.pool import Pool

_logger = logging.getLogger(__name__)

_MODES = ("RGB", "RGBA", "P")  # that keep the three channels of an id


class _Task(NamedTuple):
    image_id: int | str
    panoptic_png: Path
    name: str  # of the PNG
    size: tuple[int, int]  # width, height, as the json has them
    segments: list[dict[str, Any]]


def prepare_coco(root: PathLike, workers: int | None = None, overwrite: bool = False) -> None:
    """Make COCO 2017's stuff PNGs, where Detectron2's ``coco_2017_*_panoptic_separated`` look.

    Reads ``coco/annotations/panoptic_{train,val}2017.json`` and ``coco/panoptic_{train,val}2017``
    under `root`, writes ``coco/panoptic_stuff_{train,val}2017``; see `prepare_stuff`.

    Raises:
        DatasetError: if neither json is there, or as `prepare_stuff`.
    """
    coco = Path(root) / "coco"
    jsons = {s: coco / "annotations" / f"panoptic_{s}.json" for s in ("train2017", "val2017")}
    found = {split: path for split, path in jsons.items() if path.is_file()}
    if not found:
        raise DatasetError(
            f"COCO's panoptic annotations must be in {(coco / 'annotations').absolute()}, got "
            "neither panoptic_train2017.json nor panoptic_val2017.json. Unpack "
            "panoptic_annotations_trainval2017.zip of cocodataset.org there, "
            "or set DETECTRON2_DATASETS to the folder that contains coco."
        )
    for split in jsons.keys() - found.keys():
        _logger.warning("%s is not there: %s is left out.", jsons[split], split)
    for split, path in found.items():
        folder, archive = coco / f"panoptic_{split}", path.with_suffix(".zip")
        if archive.is_file() and not folder.is_dir():
            raise DatasetError(f"{folder} must exist. Run: unzip -q {archive} -d {coco}")
        prepare_stuff(path, folder, coco / f"panoptic_stuff_{split}", workers, overwrite)


def prepare_stuff(
    panoptic_json: PathLike,
    panoptic_root: PathLike,
    output: PathLike,
    workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Make a stuff PNG from each panoptic PNG, as Detectron2's ``prepare_panoptic_fpn.py`` does.

    A pixel is 0 for all things, 1.. for stuff in the order of the category ids, 255 for void. PNGs
    that are there and hold what would be written are kept, so that an interrupted run goes on where
    it was, unless to ``overwrite``; what was written is read again. Nothing is written outside the
    folder ``output``, which is made if need be. The number of PNGs is returned.

    Raises:
        DatasetError: if the json or a PNG is missing or malformed, if ids of a PNG are not those of
            its segments, or if an output would overwrite a source; names the file.
    """
    output = Path(output)
    _, tasks, categories = _read_tasks(panoptic_json, panoptic_root)
    targets = [output / task.name for task in tasks]
    _make_folders(targets, output)
    with writing(output):
        refuse_overwriting(targets, [panoptic_json, *(task.panoptic_png for task in tasks)])
    labels = stuff_labels(categories, panoptic_json)
    convert = partial(_write_stuff, output=output, labels=labels, overwrite=overwrite)
    with Pool(workers) as pool:
        written = sum(pool.map(convert, tasks, f"Writing {output.name}"))
    _logger.info("%s: %d PNGs, %d of them written now, all whole.", output, len(tasks), written)
    if strangers := sorted(set(output.rglob("*.png")) - set(targets)):
        _logger.warning(
            "%s has %d other PNGs, the first is %s: left by another json? Training takes those "
            "alone that the json lists.",
            *(output, len(strangers), strangers[0].relative_to(output)),
        )
    return len(tasks)


def _make_folders(targets: list[Path], output: Path) -> None:
    """Make the folders of the targets; raise unless all lie in the output."""
    for folder in {output, *(target.parent for target in targets)}:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not folder.resolve().is_relative_to(output.resolve()):
            raise DatasetError(
                f"All stuff PNGs must be written below {output}, got the folder {folder}, a "
                "link to another place. Remove the link or choose another --output."
            )


def write_instances_json(
    panoptic_json: PathLike,
    panoptic_root: PathLike,
    output_json: PathLike,
    workers: int | None = None,
) -> int:
    """Write the instances json (boxes and RLE masks) of the things in panoptic PNGs.

    The images are those of the panoptic json, ``iscrowd`` is kept, segments without a pixel are
    left out. The masks are RLE: train with ``INPUT.MASK_FORMAT "bitmask"``. The number of instances
    is returned.

    Raises:
        DatasetError: if the json or a PNG is missing or malformed; names the file.
    """
    images, tasks, categories = _read_tasks(panoptic_json, panoptic_root)
    things = [category for category in categories if category["isthing"]]
    extract = partial(_extract_instances, thing_ids={category["id"] for category in things})
    with Pool(workers) as pool:
        found = [a for image in pool.map(extract, tasks, f"Making {output_json}") for a in image]
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(found, start=1)]
    content = {"images": images, "annotations": annotations, "categories": things}
    with writing(output_json):
        refuse_overwriting([output_json], [panoptic_json, *(task.panoptic_png for task in tasks)])
        write_json(output_json, content)
    return len(annotations)


def _read_tasks(
    panoptic_json: PathLike, panoptic_root: PathLike
) -> tuple[list[dict[str, Any]], list[_Task], list[dict[str, Any]]]:
    """Return the images, a task for each annotation, and the categories."""
    content, root = read_json(panoptic_json), Path(panoptic_root)
    categories = sort_categories(content.get("categories"), panoptic_json)
    known = set(stuff_labels(categories, panoptic_json))
    if not root.is_dir():
        raise DatasetError(f"The folder of panoptic PNGs must exist, got {root.absolute()}.")
    try:
        images = {image["id"]: image for image in content["images"]}
        tasks = [_task(annotation, images, root) for annotation in content["annotations"]]
        used = {segment["category_id"] for task in tasks for segment in task.segments}
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{panoptic_json} must be in COCO's panoptic format, got {type(error).__name__}: "
            f"{error} among its images or annotations. Is it an instances json?"
        ) from None
    if used - known:
        raise DatasetError(
            f"{panoptic_json} must use only ids of its categories, got "
            f"category_id={next(iter(used - known))}. Add the category or correct the segments."
        )
    for name, count in Counter(task.name for task in tasks).items():
        outside = os.path.isabs(name) or os.pardir in Path(name).parts or "\0" in name
        if outside or count > 1:
            raise DatasetError(
                f"Every annotation of {panoptic_json} must have a file_name of its own that stays "
                f"in the folder of panoptic PNGs, got file_name={name!r}"
                f"{f' {count} times' if count > 1 else ''}. Correct the json."
            )
    return content["images"], tasks, categories


def _task(annotation: dict[str, Any], images: dict[Any, dict[str, Any]], root: Path) -> _Task:
    image, name = images[annotation["image_id"]], annotation["file_name"]
    size = (image["width"], image["height"])
    return _Task(image["id"], root / name, name, size, list(annotation["segments_info"]))


def _read_ids(task: _Task) -> np.ndarray:
    """Read the segment ids of the pixels; raise unless they are ids of the json."""
    path = task.panoptic_png
    try:
        with Image.open(path) as png:
            mode, rgb = png.mode, np.asarray(png.convert("RGB"))
    except FileNotFoundError:
        raise DatasetError(f"{path} must exist. Unpack the panoptic PNGs.") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DatasetError(f"{path} must be a whole PNG, got: {error}. Unpack it again.") from None
    ids = rgb_to_id(rgb)
    if ids.shape[::-1] != task.size:
        raise DatasetError(
            f"{path} must be {task.size[0]}x{task.size[1]} pixels as the json says, "
            f"got {ids.shape[1]}x{ids.shape[0]}."
        )
    present = set(np.unique(ids).tolist()) - {0}
    listed = {segment["id"] for segment in task.segments}
    if mode not in _MODES or (present - listed and listed - present):
        raise DatasetError(
            f"{path} must hold the ids of its segments as R + 256 G + 65536 B in 8 bits a channel, "
            f"got mode {mode} with {len(present - listed)} ids that the json lacks, and "
            f"{len(listed - present)} of the json's {len(listed)} without a pixel. Was it "
            "converted, or are its channels swapped? Take the original PNG."
        )
    return ids


def _write_stuff(task: _Task, output: Path, labels: dict[int, int], overwrite: bool) -> bool:
    """Write the stuff PNG of an image unless it is there; say whether it was written."""
    ids, target = _read_ids(task), output / task.name
    stuff = np.full(ids.shape, VOID, np.uint8)
    for segment in task.segments:
        stuff[ids == segment["id"]] = labels[segment["category_id"]]
    if not overwrite and _holds(target, stuff):
        return False
    # Not ".png" until it is whole: Detectron2 loads every .png of the folder.
    with writing(target), replace_file(target, durable=False) as temporary:
        Image.fromarray(stuff).save(temporary, format="PNG")
    if not _holds(target, stuff):
        raise DatasetError(f"{target} must be whole after writing. Is the disk full? Run it again.")
    return True


def _holds(path: Path, labels: np.ndarray) -> bool:
    try:
        with Image.open(path) as png:
            return png.mode == "L" and np.array_equal(np.asarray(png), labels)
    except Exception:  # whatever a missing or damaged file makes Pillow raise
        return False


def _extract_instances(task: _Task, thing_ids: set[int]) -> list[dict[str, Any]]:
    ids, annotations = _read_ids(task), []
    for segment in task.segments:
        mask, category = ids == segment["id"], segment["category_id"]
        if category in thing_ids and mask.any():
            keys = {"image_id": task.image_id, "category_id": category}
            is_crowd = int(segment.get("iscrowd", 0))
            annotations.append({**keys, "iscrowd": is_crowd, **mask_annotation(mask)})
    return annotations
