"""What a panoptic FPN needs beside COCO's panoptic files: stuff PNGs and an instances json."""

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from gn_practical.training.data.coco_format import (
    VOID,
    mask_annotation,
    read_json,
    rgb_to_id,
    sort_categories,
    stuff_labels,
)
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.pool import Pool

_logger = logging.getLogger(__name__)

PathLike = str | os.PathLike
Result = TypeVar("Result")

_WORTH_PROCESSES = 500  # images; fewer are done before the processes have started


class _Task(NamedTuple):
    """One image: its panoptic PNG, its size in the json, and its segments."""

    image_id: int
    panoptic_png: Path
    size: tuple[int, int]  # width, height
    segments: list[dict[str, Any]]


def prepare_coco(root: PathLike, workers: int | None = None, overwrite: bool = False) -> None:
    """Make COCO 2017's stuff PNGs, where Detectron2's ``coco_2017_*_panoptic_separated`` look.

    Reads ``coco/annotations/panoptic_{train,val}2017.json`` and ``coco/panoptic_{train,val}2017``
    under `root`, writes ``coco/panoptic_stuff_{train,val}2017``.

    Args:
        root: folder of Detectron2's data sets.
        workers: processes; all cores by default.
        overwrite: make PNGs anew that are there and whole.

    Raises:
        DatasetError: if neither json is there, or as `prepare_stuff`.

    Example:
        >>> prepare_coco("datasets")  # doctest: +SKIP
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
        _check_unpacked(coco, split)
        output = coco / f"panoptic_stuff_{split}"
        prepare_stuff(path, coco / f"panoptic_{split}", output, workers, overwrite)


def _check_unpacked(coco: Path, split: str) -> None:
    folder, archive = coco / f"panoptic_{split}", coco / "annotations" / f"panoptic_{split}.zip"
    if archive.is_file() and not folder.is_dir():
        raise DatasetError(f"{folder} must exist. Run: unzip -q {archive} -d {coco}")


def prepare_stuff(
    panoptic_json: PathLike,
    panoptic_root: PathLike,
    output: PathLike,
    workers: int | None = None,
    overwrite: bool = False,
) -> int:
    """Make a stuff PNG from each panoptic PNG, as Detectron2's ``prepare_panoptic_fpn.py`` does.

    A pixel is 0 for all things, 1.. for stuff in the order of the category ids, 255 for void.
    PNGs that are there and whole are kept, so that an interrupted run goes on where it was; at
    the end every PNG is read again.

    Args:
        panoptic_json: COCO's panoptic annotations.
        panoptic_root: folder of the panoptic PNGs.
        output: folder to write; made if need be.
        workers: processes; all cores by default.
        overwrite: make PNGs anew that are there and whole.

    Returns:
        The number of PNGs.

    Raises:
        DatasetError: if the json or a PNG is missing or malformed; names the file.

    Example:
        >>> prepare_stuff("panoptic.json", "panoptic", "panoptic_stuff")  # doctest: +SKIP
        5000
    """
    output = Path(output)
    tasks, categories = _read_tasks(panoptic_json, panoptic_root)
    labels = stuff_labels(categories, panoptic_json)
    _make_folder(output)
    for folder in {task.panoptic_png.parent for task in tasks}:  # file names may have folders
        _make_folder(output / folder.relative_to(panoptic_root))
    common = {"root": Path(panoptic_root), "output": output, "labels": labels}
    convert = partial(_write_stuff, overwrite=overwrite, **common)
    written = sum(_map(convert, tasks, workers, f"Writing {output.name}"))
    whole = _map(partial(_is_whole_task, **common), tasks, workers, f"Verifying {output.name}")
    broken = [task for task, good in zip(tasks, whole, strict=True) if not good]
    if broken:
        raise DatasetError(
            f"{len(broken)} of {len(tasks)} PNGs in {output} must be whole after writing, the "
            f"first that is not is {broken[0].panoptic_png.name}. Is the disk full? Run it again."
        )
    _logger.info("%s: %d PNGs, %d of them written now, all whole.", output, len(tasks), written)
    return len(tasks)


def write_instances_json(
    panoptic_json: PathLike,
    panoptic_root: PathLike,
    output_json: PathLike,
    workers: int | None = None,
) -> int:
    """Write the instances json (boxes and RLE masks) of the things in panoptic PNGs.

    The images are those of the panoptic json, ``iscrowd`` is kept, segments without a pixel are
    left out. The masks are RLE: train with ``INPUT.MASK_FORMAT "bitmask"``.

    Args:
        panoptic_json: COCO's panoptic annotations.
        panoptic_root: folder of the panoptic PNGs.
        output_json: file to write.
        workers: processes; all cores by default.

    Returns:
        The number of instances.

    Raises:
        DatasetError: if the json or a PNG is missing or malformed; names the file.

    Example:
        >>> write_instances_json("panoptic.json", "panoptic", "instances.json")  # doctest: +SKIP
        36781
    """
    tasks, categories = _read_tasks(panoptic_json, panoptic_root)
    things = [category for category in categories if category["isthing"]]
    extract = partial(_extract_instances, thing_ids={category["id"] for category in things})
    found = _map(extract, tasks, workers, f"Making {Path(output_json).name}")
    annotations = [
        {"id": number, **annotation}
        for number, annotation in enumerate((a for image in found for a in image), start=1)
    ]
    images = read_json(panoptic_json)["images"]
    content = {"images": images, "annotations": annotations, "categories": things}
    _make_folder(Path(output_json).parent)
    temporary = Path(f"{output_json}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(output_json)
    return len(annotations)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"The folder {folder} must be writable, got: {error}.") from None


def _read_tasks(
    panoptic_json: PathLike, panoptic_root: PathLike
) -> tuple[list[_Task], list[dict[str, Any]]]:
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
            f"category_id={min(used - known)}. Add the category or correct the segments."
        )
    return tasks, categories


def _task(annotation: dict[str, Any], images: dict[int, dict[str, Any]], root: Path) -> _Task:
    image = images[annotation["image_id"]]
    size = (image["width"], image["height"])
    return _Task(
        image["id"], root / annotation["file_name"], size, list(annotation["segments_info"])
    )


def _map(
    function: Callable[[_Task], Result], tasks: list[_Task], workers: int | None, title: str
) -> list[Result]:
    """Apply a function to all tasks on all cores, with a progress bar; stop at an error."""
    if len(tasks) < _WORTH_PROCESSES:
        return [function(task) for task in tqdm(tasks, desc=title, unit="image")]
    with Pool(workers) as pool:
        return list(pool.map(function, tasks, title))


def _read_ids(task: _Task) -> np.ndarray:
    try:
        with Image.open(task.panoptic_png) as png:
            ids = rgb_to_id(np.asarray(png.convert("RGB")))
    except FileNotFoundError:
        raise DatasetError(f"{task.panoptic_png} must exist. Unpack the panoptic PNGs.") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DatasetError(
            f"{task.panoptic_png} must be a whole PNG, got: {error}. Unpack it again."
        ) from None
    if ids.shape[::-1] != task.size:
        raise DatasetError(
            f"{task.panoptic_png} must be {task.size[0]}x{task.size[1]} pixels as the json says, "
            f"got {ids.shape[1]}x{ids.shape[0]}."
        )
    return ids


def _write_stuff(
    task: _Task, root: Path, output: Path, labels: dict[int, int], overwrite: bool
) -> bool:
    """Write the stuff PNG of an image unless it is there and whole; say whether it was written."""
    if not overwrite and _is_whole_task(task, root, output, labels):
        return False
    ids = _read_ids(task)
    stuff = np.full(ids.shape, VOID, np.uint8)
    for segment in task.segments:
        stuff[ids == segment["id"]] = labels[segment["category_id"]]
    target = output / task.panoptic_png.relative_to(root)
    # Not ".png" until it is whole: Detectron2 loads every .png of the folder.
    temporary = Path(f"{target}.tmp")
    try:
        Image.fromarray(stuff).save(temporary, format="PNG")
        temporary.replace(target)
    except OSError as error:
        raise DatasetError(f"{target} must be writable, got: {error}.") from None
    return True


def _is_whole_task(task: _Task, root: Path, output: Path, labels: dict[int, int]) -> bool:
    """Whether the stuff PNG can be decoded and has the right size, mode and values."""
    try:
        with Image.open(output / task.panoptic_png.relative_to(root)) as png:
            values = np.asarray(png)
            if png.mode != "L" or png.size != task.size:
                return False
    except Exception:  # whatever a damaged file makes Pillow raise
        return False
    counts = np.bincount(values.ravel(), minlength=VOID + 1)
    return not counts[max(labels.values()) + 1 : VOID].any()


def _extract_instances(task: _Task, thing_ids: set[int]) -> list[dict[str, Any]]:
    ids, annotations = _read_ids(task), []
    for segment in task.segments:
        mask = ids == segment["id"]
        if segment["category_id"] in thing_ids and mask.any():
            annotations.append(
                {
                    "image_id": task.image_id,
                    "category_id": segment["category_id"],
                    "iscrowd": int(segment.get("iscrowd", 0)),
                    **mask_annotation(mask),
                }
            )
    return annotations
