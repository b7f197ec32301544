"""Ids of images, annotations and categories: any numbers or texts, each given once."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def numbered(ids: Iterable[Any], what: str) -> dict[Any, int]:
    """Number ids, of ``what``, from 1, in the order in which pycocotools sorts them.

    The evaluators of C++ and Rust count with these numbers: they fail, or even find nothing, where
    an id is negative, large or a text.

    Raises:
        ValueError: if one is given twice.

    Example:
        >>> numbered([2**70, -1, "frankfurt_000000"], "images")
        {-1: 1, 1180591620717411303424: 2, 'frankfurt_000000': 3}
    """
    order = sorted(ids, key=lambda value: (isinstance(value, str), value))
    twice = [a for a, b in itertools.pairwise(order) if a == b]
    if twice:
        raise ValueError(f"Ids of {what} must differ, got id={twice[0]!r} twice. Correct the file.")
    return {value: number for number, value in enumerate(order, start=1)}


def check_predicted_once(predicted: Iterable[Any], wanted: Iterable[Any], path: str) -> None:
    """Compare the images of all predictions with those of the annotation file at ``path``.

    Raises:
        ValueError: if an image is missing, unknown or predicted twice: any number would be wrong.
    """
    expected, counts = set(wanted), Counter(predicted)
    wrong = [i for i in expected if counts[i] != 1] + [i for i in counts if i not in expected]
    if wrong:
        raise ValueError(
            f"Each image of {path}, and no other, must be predicted once, got {counts[wrong[0]]} "
            f"predictions for image_id={wrong[0]!r} ({len(wrong)} such images). Make all files of "
            "the data set list the same images."
        )


def dataset_class(predicted: int, ids: Mapping[int, Any], of: str) -> Any:
    """Turn the contiguous class that a model predicts into the data set's id.

    Raises:
        ValueError: if there is no such class ``of`` the data set.
    """
    if predicted not in ids:
        raise ValueError(
            f"The predicted class must be one of the {len(ids)} {of}, got category_id={predicted}. "
            "Set MODEL.ROI_HEADS.NUM_CLASSES and MODEL.SEM_SEG_HEAD.NUM_CLASSES to the classes of "
            "the data set."
        )
    return ids[predicted]


def unused(name: str, used: set[str]) -> str:
    """Return a file name that no other has taken, whatever the case, and take it.

    Example:
        >>> used = set()
        >>> unused("a", used), unused("A", used), unused("a", used)
        ('a', 'A_2', 'a_3')
    """
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    free = next(candidate for candidate in names if candidate.casefold() not in used)
    used.add(free.casefold())
    return free
