"""COCO's files: reading the jsons, their categories, panoptic ids, masks.

The metadata made here has the names and meaning that Detectron2 gives them for
``coco_2017_train_panoptic_separated``: things and stuff have contiguous ids of their own, in the
order of the categories' ids, and stuff begins with an extra class "things" at 0.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.utils.colormap import colormap

from gn_practical.training.data.errors import DatasetError

VOID = 255  # label of no class in a stuff PNG

_LARGE_FILE = 50_000_000  # bytes; reading a larger one takes more than a second or so
_logger = logging.getLogger(__name__)

Category = dict[str, Any]


def read_json(path: str | os.PathLike, repeated_keys: list[str] | None = None) -> dict[str, Any]:
    """Read a json file whose top level is an object.

    ``repeated_keys`` is filled with the keys that an object has twice; json keeps the last value.

    Raises:
        DatasetError: if it is missing or no json object; names the file and the position.
    """
    text = _read_text(path)
    # The hook costs as much time again as reading does.
    hook = None if repeated_keys is None else partial(_to_dict, repeated_keys)
    try:
        content = json.loads(text, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:  # also of too many digits, of too many brackets
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, json.JSONDecodeError):
            where = f"line {error.lineno}, column {error.colno} (character {error.pos} of"
            what = f"an error at {where} {len(text)}): {error.msg}"
        raise DatasetError(
            f"{path} must be valid json, got {what}. "
            "The file may be incomplete: copy, download or write it again."
        ) from None
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path} must hold a json object, got {type(content).__name__}. "
            "COCO's format has the keys images, annotations and categories at its top level."
        )
    return content


def _to_dict(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return result


def _read_text(path: str | os.PathLike) -> str:
    try:
        size = os.path.getsize(path)
        if size > _LARGE_FILE:
            _logger.info("Reading %s (%.0f MB) ...", path, size / 1e6)
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatasetError(f"{path} must exist. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} must be a readable text file, got: {error}.") from None


# Entries of a json ------------------------------------------------------------------------------

Kind = tuple[Callable[[Any], bool], str]  # whether a value will do, and what it must be


def is_id(value: object) -> bool:
    """Whether a value can identify: a whole number of any size or a text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a number that fits a float, infinite or not, and no bool."""
    return type(value) is float or (type(value) is int and abs(value) < 1e300)


def _is_file_name(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


ID: Kind = (is_id, "a whole number or a text")
WHOLE: Kind = (lambda value: type(value) is int, "a whole number")
SIDE: Kind = (lambda value: type(value) is int and 0 < value < 2**31, "a whole number above 0")
NUMBER: Kind = (is_number, "a number")
FLAG: Kind = (lambda value: value in (0, 1), "0 or 1")
TEXT: Kind = (lambda value: isinstance(value, str), "a text")
LIST: Kind = (lambda value: isinstance(value, list), "a list")
FILE_NAME: Kind = (_is_file_name, "the name of a file")
ANYTHING: Kind = (lambda value: True, "anything")

CATEGORY = {"id": WHOLE, "name": TEXT}


def malformed(
    entry: object, needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None
) -> str:
    """Say what makes an entry of a json unusable; nothing if it is sound.

    Example:
        >>> malformed({"id": "3", "name": "car"}, CATEGORY)
        "id='3', which must be a whole number"
    """
    keys = entry.keys() if isinstance(entry, Mapping) else set()
    if lacking := needed.keys() - keys:
        return f"it lacks {', '.join(sorted(lacking))}"
    return "; ".join(
        f"{key}={entry[key]!r}, which must be {what}"
        for key, (will_do, what) in {**needed, **(optional or {})}.items()
        if key in keys and not will_do(entry[key])
    )


def repeated(values: Mapping[int, Hashable]) -> Iterator[int]:
    """Yield the key of every value that came before."""
    seen = set()
    for key, value in values.items():
        if value in seen:
            yield key
        seen.add(value)


# Categories -------------------------------------------------------------------------------------


def read_categories(path: str | os.PathLike) -> list[Category]:
    """Read the categories of a COCO json, sorted by id, without parsing the rest of the file.

    Raises:
        DatasetError: if there are none, or one lacks its id or name, or two share an id.
    """
    text, position = _read_text(path), -1
    while (position := text.find('"categories"', position + 1)) >= 0:
        start = text.find("[", position)
        try:
            categories = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
        except json.JSONDecodeError:
            break
        if _are_categories(categories):
            return sort_categories(categories, path)
    return sort_categories(read_json(path).get("categories"), path)


def _are_categories(value: object) -> bool:
    keys = dict.fromkeys(CATEGORY, ANYTHING)
    return isinstance(value, list) and bool(value) and not any(malformed(c, keys) for c in value)


def sort_categories(categories: object, path: str | os.PathLike) -> list[Category]:
    """Check the ``categories`` of the json at `path` and sort them by id."""
    if not _are_categories(categories):
        raise DatasetError(
            f"{path} must have a key 'categories' with a list of objects that have 'id' and 'name'."
        )
    if problem := next(filter(None, (malformed(c, CATEGORY) for c in categories)), ""):
        raise DatasetError(f"All categories of {path} must be sound, got {problem}. Correct them.")
    ids = [category["id"] for category in categories]
    for index in repeated(dict(enumerate(ids))):
        raise DatasetError(
            f"{path} must give every category its own id, got id={ids[index]} twice. Correct it."
        )
    return sorted(categories, key=lambda category: category["id"])


def instances_metadata(categories: list[Category]) -> dict[str, Any]:
    """Make the metadata of a data set of instances from its categories, sorted by id."""
    return {
        "thing_classes": [category["name"] for category in categories],
        "thing_colors": _colours(categories),
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(categories)},
    }


def panoptic_metadata(categories: list[Category], path: str | os.PathLike) -> dict[str, Any]:
    """Make the metadata of a panoptic data set from the categories of its json at `path`.

    Raises:
        DatasetError: if a category lacks ``isthing``, there are no things or no stuff, or more
            than 254 stuff classes.
    """
    if without := [c["name"] for c in categories if c.get("isthing") not in (0, 1)]:
        raise DatasetError(
            f"{path} must say for every category whether it is a thing (isthing 0 or 1), "
            f"missing for {len(without)}, the first is {without[0]!r}. "
            "Is it an instances json? COCO_INSTANCES is for those."
        )
    things = [category for category in categories if category["isthing"]]
    stuff = [category for category in categories if not category["isthing"]]
    if not things or not 0 < len(stuff) < VOID:
        raise DatasetError(
            f"{path} must have at least one thing and 1 to {VOID - 1} stuff categories, "
            f"got {len(things)} and {len(stuff)}."
        )
    ids = [category["id"] for category in categories]
    of_things = 0 if 0 not in ids else min(ids) - 1  # 0 in Detectron2: taken here by a category
    stuff_ids = [of_things, *(category["id"] for category in stuff)]
    return {
        **instances_metadata(things),
        "stuff_classes": ["things", *(category["name"] for category in stuff)],
        "stuff_colors": [(82, 18, 128), *_colours(stuff)],
        "stuff_dataset_id_to_contiguous_id": {key: index for index, key in enumerate(stuff_ids)},
    }


def _colours(categories: list[Category]) -> list[tuple[int, int, int]]:
    """Take the categories' own RGB colours, or else distinct ones that depend on the id alone."""
    palette = colormap(rgb=True).astype(int).tolist()
    return [
        tuple(c["color"] if _is_rgb(c.get("color")) else palette[c["id"] % len(palette)])
        for c in categories
    ]


def _is_rgb(value: object) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == 3
    return is_list and all(type(channel) is int and 0 <= channel < 256 for channel in value)


def stuff_labels(categories: list[Category], path: str | os.PathLike) -> dict[int, int]:
    """Map every category id to its label in the stuff PNGs: 0 for all things, 1.. for stuff."""
    stuff = panoptic_metadata(categories, path)["stuff_dataset_id_to_contiguous_id"]
    return {c["id"]: 0 if c["isthing"] else stuff[c["id"]] for c in categories}


def rgb_to_id(rgb: np.ndarray) -> np.ndarray:
    """Decode a panoptic PNG, ``(H, W, 3)``, to ``(H, W)`` uint32: id = R + 256 G + 256² B.

    Example:
        >>> rgb_to_id(np.array([[[2, 1, 0]]], dtype=np.uint8)).tolist()
        [[258]]
    """
    return rgb.astype(np.uint32) @ np.array([1, 256, 65536], np.uint32)


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Encode segment ids as a panoptic PNG; the inverse of `rgb_to_id`."""
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def mask_annotation(mask: np.ndarray) -> dict[str, Any]:
    """Describe a mask that is not empty as COCO does: compressed RLE, box, area."""
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
        "bbox": mask_box(mask),
        "area": int(mask.sum()),
    }


def mask_box(mask: np.ndarray) -> list[int]:
    """Bound a mask that is not empty: ``[x, y, width, height]`` in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]
