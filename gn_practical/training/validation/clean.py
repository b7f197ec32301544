"""The json without what is at fault, to train on what is sound."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from gn_practical.atomic import refuse_overwriting, write_json
from gn_practical.training.data.coco_format import is_id, read_json
from gn_practical.training.data.errors import writing
from gn_practical.training.validation.findings import ERROR, Entry, Fault


class Removed(NamedTuple):
    """Numbers of images and annotations that a clean json lacks, and of errors that remain."""

    images: int
    annotations: int
    kept: int


def write_clean(source: str, faults: Sequence[Fault], output: str | os.PathLike) -> Removed:
    """Write a json without the images, annotations and panoptic segments that have errors.

    Warnings are left. Where several images share an id the first stays, with its annotations. A
    panoptic annotation goes as a whole, unless its segment is only in the json. Faults of other
    jsons than `source` are left out of account.

    Raises:
        ValueError: if `output` is `source`, another json validated, or cannot be written.
    """
    entries = {fault.entry for fault in faults if fault.json == source and fault.severity == ERROR}
    content = read_json(source)
    removed = _remove(content, entries)
    with writing(output):
        refuse_overwriting([output], [source, *(fault.json for fault in faults)])
        write_json(output, content)
    return removed


def _remove(content: dict[str, Any], entries: set[Entry]) -> Removed:
    """Remove parts of a COCO json in place."""
    images, annotations = content["images"], content["annotations"]
    for _, index, key, position in sorted((e for e in entries if len(e) == 4), reverse=True):
        del annotations[index][key][position]
    content["images"] = [image for i, image in enumerate(images) if ("images", i) not in entries]
    gone = [image for i, image in enumerate(images) if ("images", i) in entries]
    lost = {image["id"] for image in gone if isinstance(image, dict) and is_id(image.get("id"))}
    lost -= {image["id"] for image in content["images"]}
    rest = [a for i, a in enumerate(annotations) if ("annotations", i) not in entries]
    content["annotations"] = [a for a in rest if a["image_id"] not in lost]
    return Removed(
        len(images) - len(content["images"]),
        len(annotations) - len(content["annotations"]),
        sum(entry[:1] not in (("images",), ("annotations",)) for entry in entries),
    )
