"""The json without what is at fault, to train on what is sound."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from gn_practical.training.atomic import refuse_overwriting, write_json
from gn_practical.training.data.coco_format import read_json
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.validation.findings import ERROR, Fault
from gn_practical.training.validation.images import is_id


class Removed(NamedTuple):
    """What a clean json lacks.

    Attributes:
        images: number of images.
        annotations: number of annotations, those of the images with them.
        kept: errors that no removal corrects, such as those of the categories.
    """

    images: int
    annotations: int
    kept: int


def write_clean(source: str, faults: Sequence[Fault], output: str | os.PathLike) -> Removed:
    """Write a json without the images, annotations and panoptic segments that have errors.

    Warnings are left. Where several images share an id the first stays, with its annotations. A
    panoptic annotation goes as a whole, unless its segment is only in the json.

    Args:
        source: the json.
        faults: those of this json; others are left out of account.
        output: the json to write.

    Raises:
        ValueError: if `output` is `source`, another json validated, or cannot be written.
    """
    entries = {fault.entry for fault in faults if fault.json == source and fault.severity == ERROR}
    content = read_json(source)
    removed = remove_entries(content, entries)
    try:
        refuse_overwriting([output], [source, *(fault.json for fault in faults)])
        write_json(output, content)
    except OSError as error:
        raise DatasetError(f"{output} must be writable, got: {error}.") from None
    return removed


def remove_entries(content: dict[str, Any], entries: set[tuple[str | int, ...]]) -> Removed:
    """Remove parts of a COCO json in place; see `write_clean`.

    Args:
        content: the json.
        entries: the keys and indices that lead to each part.
    """
    before = len(content["images"]), len(content["annotations"])
    at_fault = {entry[1] for entry in entries if entry[:1] == ("images",)}
    gone = [content["images"][index] for index in at_fault]
    content["images"] = _without(content["images"], at_fault)
    _remove_segments(content["annotations"], entries)
    at_fault = {e[1] for e in entries if e[:1] == ("annotations",) and len(e) == 2}
    rest = _without(content["annotations"], at_fault)
    left = {image["id"] for image in content["images"]}
    lost = {image["id"] for image in gone if isinstance(image, dict) and is_id(image.get("id"))}
    lost -= left
    content["annotations"] = [a for a in rest if a["image_id"] not in lost]
    kept = sum(entry[:1] not in (("images",), ("annotations",)) for entry in entries)
    after = len(content["images"]), len(content["annotations"])
    return Removed(before[0] - after[0], before[1] - after[1], kept)


def _remove_segments(annotations: list[Any], entries: set[tuple[str | int, ...]]) -> None:
    for entry in sorted((e for e in entries if len(e) == 4), reverse=True):
        _, index, key, position = entry
        del annotations[index][key][position]


def _without(values: Sequence[Any], indices: set[int]) -> list[Any]:
    return [value for index, value in enumerate(values) if index not in indices]
