"""What a fault is, and which kinds there are."""

from collections.abc import Iterator
from typing import Any, NamedTuple

ERROR, WARNING = "error", "warning"

Finding = tuple[str, str]  # a reason, one of REASONS, and what was found
Findings = Iterator[Finding]

_OF_A_FILE = {
    "missing": ERROR,
    "unreadable": ERROR,
    "of zero bytes": ERROR,
    "of unknown format": ERROR,
    "truncated": ERROR,
    "corrupt": ERROR,
    "of another size": ERROR,
    "with stray bytes": WARNING,
    "turned by EXIF": WARNING,
}

# Every kind of fault, with its severity. A warning neither stops training nor changes a metric in
# the main: it leaves the exit code alone and is not cleaned away.
REASONS = {
    "json unusable": ERROR,
    "json key twice": ERROR,
    "category malformed": ERROR,
    "category id twice": ERROR,
    "category name twice": WARNING,
    "category of another name": ERROR,
    "image entry malformed": ERROR,
    "image id twice": ERROR,
    "image ids of mixed kinds": ERROR,
    "image file twice": WARNING,
    "images differ": ERROR,
    "nothing to train on": ERROR,
    "crowds alone": ERROR,
    **{f"image {state}": severity for state, severity in _OF_A_FILE.items()},
    "annotation malformed": ERROR,
    "annotation id twice": ERROR,
    "annotation id is 0": WARNING,
    "annotation repeated": ERROR,
    "annotation of unknown image": ERROR,
    "category unknown": ERROR,
    "box malformed": ERROR,
    "box not finite": ERROR,
    "box empty": ERROR,
    "box outside the image": ERROR,
    "boxes between 0 and 1": ERROR,
    "boxes of corners": ERROR,
    "box and mask differ": ERROR,
    "area not positive": ERROR,
    "area missing": ERROR,
    "area and mask differ": WARNING,
    "mask missing": ERROR,
    "mask malformed": ERROR,
    "polygon malformed": ERROR,
    "polygon not finite": ERROR,
    "polygon of fewer than 3 points": ERROR,
    "polygon outside the image": ERROR,
    "RLE but no bitmask": ERROR,
    "RLE malformed": ERROR,
    "RLE of another size": ERROR,
    "RLE counts do not sum up": ERROR,
    "RLE without a pixel": ERROR,
    "keypoints malformed": ERROR,
    **{f"panoptic PNG {state}": severity for state, severity in _OF_A_FILE.items()},
    "panoptic annotation twice": ERROR,
    "panoptic annotation of unknown image": ERROR,
    "image without annotation": WARNING,
    "segment malformed": ERROR,
    "segment id twice": ERROR,
    "segment in the json alone": ERROR,
    "segment in the PNG alone": ERROR,
    "segment area differs": ERROR,
    "segment box differs": WARNING,
    **{f"stuff PNG {state}": severity for state, severity in _OF_A_FILE.items()},
    "stuff PNG label unknown": ERROR,
    "stuff PNG of another image": ERROR,
}

# Those that end a run before it begins, with what to do: Detectron2 or an evaluator would stop, or
# learn or measure something else. The others are warned of.
_CORRECT = "Correct the json."
STOPPING = {
    "json unusable": "Write it again.",
    "category malformed": _CORRECT,
    "category id twice": _CORRECT,
    "category of another name": "Register your own data under another name with "
    "DATASETS.COCO_INSTANCES or DATASETS.COCO_PANOPTIC.",
    "image entry malformed": _CORRECT,
    "image id twice": _CORRECT,
    "image ids of mixed kinds": "Make them all numbers or all texts.",
    "images differ": "Make both jsons list the same images.",
    "nothing to train on": "Are the annotations' image_id those of the images?",
    "image missing": "Copy the images there, or remove them from the json.",
    "annotation malformed": _CORRECT,
    "annotation id twice": "Number the annotations anew.",
    "category unknown": "Add the category or correct the annotations.",
    "box malformed": _CORRECT,
    "box not finite": _CORRECT,
    "area missing": "Add it: the evaluation of small and large objects needs it.",
    "mask missing": "Add the override: MODEL.MASK_ON False",
    "mask malformed": _CORRECT,
    "polygon malformed": _CORRECT,
    "polygon not finite": _CORRECT,
    "RLE but no bitmask": "Add the override: INPUT.MASK_FORMAT bitmask",
    "RLE malformed": _CORRECT,
    "RLE of another size": _CORRECT,
    "RLE counts do not sum up": _CORRECT,
    "keypoints malformed": _CORRECT,
    "panoptic PNG missing": "Unpack the panoptic PNGs again.",
    "panoptic annotation twice": _CORRECT,
    "panoptic annotation of unknown image": "Add the image to the list or drop the annotation.",
    "segment malformed": _CORRECT,
    "segment id twice": _CORRECT,
    "stuff PNG missing": "Run: python tools/prepare_panoptic_coco.py",
    "stuff PNG label unknown": "Run: python tools/prepare_panoptic_coco.py --overwrite",
}

# Those of a file: found for every json that lists it, told once.
REASONS_OF_FILES = {
    f"{file} {state}" for file in ("image", "panoptic PNG", "stuff PNG") for state in _OF_A_FILE
}

Entry = tuple[str | int, ...]  # where in a json: ("annotations", 3, "segments_info", 0)


class Fault(NamedTuple):
    """One thing that is wrong with a data set.

    Attributes:
        reason: its kind, one of `REASONS`.
        json: the json that is wrong or that lists the file; a data set's name if it has none.
        entry: the keys and indices that lead to the part at fault of the json.
        file: the image or PNG at fault or annotated; empty if none is.
        image_id: None if it has none.
        annotation_id: of an instance or of a panoptic segment; None if it has none.
        detail: what was found.
    """

    reason: str
    json: str
    entry: Entry = ()
    file: str = ""
    image_id: Any = None
    annotation_id: Any = None
    detail: str = ""

    @property
    def severity(self) -> str:
        """``"error"`` or ``"warning"``."""
        return REASONS[self.reason]
