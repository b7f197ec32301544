"""What a fault is, and which kinds there are."""

from typing import Any, NamedTuple

ERROR, WARNING = "error", "warning"

_FILES = {
    "image": "Copy the images there, or remove them from the json.",
    "panoptic PNG": "Unpack the panoptic PNGs again.",
    "stuff PNG": "Run: python tools/prepare_panoptic_coco.py",
}
_STATES = ("unreadable", "of zero bytes", "of unknown format", "truncated", "corrupt")
_MINOR_STATES = ("with stray bytes", "turned by EXIF")
OF_FILES = {  # found for every json that lists the file, told once
    f"{file} {state}": kind
    for file, way_out in _FILES.items()
    for state, kind in {
        "missing": way_out,
        **dict.fromkeys((*_STATES, "of another size"), ERROR),
        **dict.fromkeys(_MINOR_STATES, WARNING),
    }.items()
}

# Every kind of fault. A warning neither stops training nor changes a metric in the main: it leaves
# the exit code alone and is not cleaned away. An error with a text ends a run before it begins, as
# Detectron2 or an evaluator would stop, or learn or measure something else; the text is what to do.
_CORRECT = "Correct the json."
_KINDS = {
    "json unusable": "Write it again.",
    "json key twice": ERROR,
    "category malformed": _CORRECT,
    "category id twice": _CORRECT,
    "category name twice": WARNING,
    "category of another name": "Register your own data under another name with "
    "DATASETS.COCO_INSTANCES or DATASETS.COCO_PANOPTIC.",
    "image entry malformed": _CORRECT,
    "image id twice": _CORRECT,
    "image ids of mixed kinds": "Make them all numbers or all texts.",
    "image file twice": WARNING,
    "images differ": "Make both jsons list the same images.",
    "nothing to train on": "Are the annotations' image_id those of the images?",
    "crowds alone": ERROR,
    **OF_FILES,
    "annotation malformed": _CORRECT,
    "annotation id twice": "Number the annotations anew.",
    "annotation id is 0": WARNING,
    "annotation repeated": ERROR,
    "annotation of unknown image": ERROR,
    "category unknown": "Add the category or correct the annotations.",
    "box malformed": _CORRECT,
    "box not finite": _CORRECT,
    "box empty": ERROR,
    "box outside the image": ERROR,
    "boxes between 0 and 1": ERROR,
    "boxes of corners": ERROR,
    "box and mask differ": ERROR,
    "area not positive": ERROR,
    "area missing": "Add it: the evaluation of small and large objects needs it.",
    "area and mask differ": WARNING,
    "mask missing": "Add the override: MODEL.MASK_ON False",
    "mask malformed": _CORRECT,
    "polygon malformed": _CORRECT,
    "polygon not finite": _CORRECT,
    "polygon of fewer than 3 points": ERROR,
    "polygon outside the image": ERROR,
    "RLE but no bitmask": "Add the override: INPUT.MASK_FORMAT bitmask",
    "RLE malformed": _CORRECT,
    "RLE of another size": _CORRECT,
    "RLE counts do not sum up": _CORRECT,
    "RLE without a pixel": ERROR,
    "keypoints malformed": _CORRECT,
    "panoptic annotation twice": _CORRECT,
    "panoptic annotation of unknown image": "Add the image to the list or drop the annotation.",
    "image without annotation": WARNING,
    "segment malformed": _CORRECT,
    "segment id twice": _CORRECT,
    "segment in the json alone": ERROR,
    "segment in the PNG alone": ERROR,
    "segment area differs": ERROR,
    "segment box differs": WARNING,
    "stuff PNG label unknown": "Run: python tools/prepare_panoptic_coco.py --overwrite",
    "stuff PNG of another image": ERROR,
}
REASONS = {reason: WARNING if kind == WARNING else ERROR for reason, kind in _KINDS.items()}
STOPPING = {reason: kind for reason, kind in _KINDS.items() if kind not in (ERROR, WARNING)}

Entry = tuple[str | int, ...]  # where in a json: ("annotations", 3, "segments_info", 0)


class Fault(NamedTuple):
    """One thing that is wrong with a data set."""

    reason: str  # its kind, one of `REASONS`
    json: str  # that is wrong or lists the file; a data set's name if it has none
    entry: Entry = ()  # the keys and indices that lead to the part at fault of the json
    file: str = ""  # the image or PNG at fault or annotated
    image_id: Any = None
    annotation_id: Any = None  # of an instance or of a panoptic segment
    detail: str = ""  # what was found

    @property
    def severity(self) -> str:
        """``"error"`` or ``"warning"``."""
        return REASONS[self.reason]
