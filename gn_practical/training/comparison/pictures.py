"""The same validation pictures of several runs, small enough for one page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from gn_practical.training.comparison.runs import Run
from gn_practical.training.evaluation.panels import GAP

_WIDTH = 420  # px
_QUALITY = 72
_MOST_BYTES = 2_500_000  # of all pictures of a page


@dataclass
class Picture:
    """One validation picture: its annotations, and what each run predicts there."""

    name: str
    truth: str  # data: address of a JPEG
    predictions: dict[int, str] = field(default_factory=dict)  # number of the run → data: address


def same_pictures(runs: Sequence[Run], number: int) -> tuple[list[Picture], str]:
    """Read the first pictures that two runs or more have, or any if there is one run.

    Two runs have the same picture where name and drawn annotations are the same to the pixel, so
    another data set with the same file names stays apart.

    Returns:
        the pictures, and a note of what was left out, or an empty text.
    """
    names = sorted({name for run in runs for name in _names(run)})
    any_there, least = bool(names), min(2, len(runs))
    found: list[Picture] = []
    size, broken = 0, 0
    while names and len(found) < number and size < _MOST_BYTES:
        by_truth, wrong = _read(runs, names.pop(0))
        broken += wrong
        for picture in by_truth:
            if len(picture.predictions) >= least and len(found) < number:
                found.append(picture)
                size += sum(map(len, (picture.truth, *picture.predictions.values())))
    notes = [f"{len(names)} more are in the runs' folders."] if names and found else []
    notes += [f"{broken} files cannot be read and are left out."] if broken else []
    if any_there and number and not found:
        notes.append("No two runs have a picture with the same name and the same annotations.")
    return found, " ".join(notes)


def _names(run: Run) -> list[str]:
    folder = Path(run.folder, "pictures")
    return [str(path.relative_to(folder)) for path in folder.rglob("*.png")]


def _read(runs: Sequence[Run], name: str) -> tuple[list[Picture], int]:
    by_truth: dict[bytes, Picture] = {}
    broken = 0
    for index, run in enumerate(runs):
        path = Path(run.folder, "pictures", name)
        if not path.is_file():
            continue
        try:
            with Image.open(path) as file:
                prediction, truth = _halves(file.convert("RGB"))
        except (OSError, ValueError):
            broken += 1
            continue
        key = truth.tobytes()
        if key not in by_truth:
            by_truth[key] = Picture(name, _encode(truth))
        by_truth[key].predictions[index] = _encode(prediction)
    return list(by_truth.values()), broken


def _halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Cut a picture of :class:`PictureEvaluator` into prediction and ground truth."""
    width = (image.width - GAP) // 2
    if width < 1:
        raise ValueError(f"a picture must have two halves, got width={image.width}.")
    parts = (0, width), (width + GAP, 2 * width + GAP)
    left, right = (image.crop((begin, 0, end, image.height)) for begin, end in parts)
    return left, right


def _encode(image: Image.Image) -> str:
    image.thumbnail((_WIDTH, 2 * _WIDTH), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
