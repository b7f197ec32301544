"""Rules on the lists of a COCO json; `check_datasets` and the validation share them."""

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set

import numpy as np

from gn_practical.training.data.coco_format import VOID

IMAGE_KEYS = {"id", "file_name", "height", "width"}
INSTANCE_KEYS = {"id", "image_id", "category_id", "bbox"}
PANOPTIC_KEYS = {"image_id", "file_name", "segments_info"}
SEGMENT_KEYS = {"id", "category_id"}


def lacking_keys(entry: object, needed: Set[str]) -> list[str]:
    """Return what an entry lacks of the keys that it needs; all if it is no object.

    Example:
        >>> lacking_keys({"id": 1}, {"id", "bbox"})
        ['bbox']
    """
    return sorted(needed - entry.keys()) if isinstance(entry, Mapping) else sorted(needed)


def repeated(values: Iterable[Hashable]) -> Iterator[int]:
    """Yield the index of every value that came before.

    Example:
        >>> list(repeated(["a", "b", "a", "a"]))
        [2, 3]
    """
    seen = set()
    for index, value in enumerate(values):
        if value in seen:
            yield index
        seen.add(value)


def missing_files(root: str, names: Iterable[str]) -> list[str]:
    """Return the names that are in no folder under `root`, with one listing of each folder."""
    by_folder: dict[str, set[str]] = defaultdict(set)
    for name in names:
        folder, base = os.path.split(name)
        by_folder[folder].add(base)
    missing = []
    for folder, wanted in by_folder.items():
        path = os.path.join(root, folder)
        present = set(os.listdir(path)) if os.path.isdir(path) else set()
        missing += [os.path.join(folder, base) for base in wanted - present]
    return sorted(missing)


def unknown_labels(labels: np.ndarray, num_classes: int, ignored: int = VOID) -> Sequence[int]:
    """Return the values of a stuff PNG that are neither a class nor void.

    Args:
        labels: uint8, of any shape.
        num_classes: the classes are 0 to ``num_classes - 1``.
        ignored: the label of void.

    Example:
        >>> unknown_labels(np.array([0, 4, 9, 255], np.uint8), 5)
        [9]
    """
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=VOID + 1))
    return [int(label) for label in present if label >= num_classes and label != ignored]
