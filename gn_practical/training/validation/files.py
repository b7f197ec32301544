"""Whole decoding of image files, as Detectron2 reads them, with the reason where it fails."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

Size = tuple[int, int]  # width, height

_ORIENTATION = 274  # the tag of EXIF


class Decoded(NamedTuple):
    """What a file turned out to be: its size after and before EXIF rotation, and what is wrong.

    The sizes are None if it cannot be decoded; `state` is "missing", "truncated" and so on, empty
    if nothing is wrong, and `detail` says it in words.
    """

    size: Size | None = None
    stored_size: Size | None = None
    state: str = ""
    detail: str = ""

    def findings(self, what: str, sizes: Sequence[Size]) -> Iterator[tuple[str, str]]:
        """Yield reason and detail of what is wrong; one of `sizes`, if there are, is expected."""
        if self.state:
            yield f"{what} {self.state}", self.detail
        if sizes and self.size not in (None, *sizes):
            stated = f"{sizes[0][0]}x{sizes[0][1]}"
            text = f"the file has {self.size[0]}x{self.size[1]}, the json {stated}"
            if self.stored_size == sizes[0]:
                text += ", which is the size before the rotation that the file's EXIF orders"
            yield f"{what} of another size", text


def decode_file(path: str) -> Decoded:
    """Decode an image file; see `read_pixels`.

    Example:
        >>> decode_file("no.jpg").state
        'missing'
    """
    return read_pixels(path, "RGB")[0]


def read_pixels(path: str, mode: str) -> tuple[Decoded, np.ndarray | None]:
    """Decode an image file to its last pixel, and check what no decoder raises for.

    Any format and mode that Detectron2 can convert to `mode` is sound. The pixels are those of its
    ``read_image``, None if it has none.
    """
    try:
        path = PathManager.get_local_path(path)
        if os.path.getsize(path) == 0:
            return Decoded(state="of zero bytes", detail="0 bytes"), None
        pixels = read_image(path, mode)
        with Image.open(path) as image:
            size, stored, kind = pixels.shape[1::-1], image.size, image.format
            # A PNG's may stand behind the pixels, which would be decoded again for it.
            turn = 1 if kind == "PNG" else image.getexif().get(_ORIENTATION, 1)
            if kind == "PNG":  # Pillow decodes without a look at the checksums
                image.verify()
                if _is_cut_png(path):
                    raise OSError("the file is truncated within its last chunk")
    except Exception as error:  # whatever a damaged file makes Pillow raise
        return Decoded(None, None, *_explain(error, path)), None
    state, detail = _jpeg_damage(path) if kind in ("JPEG", "MPO") else ("", "")
    if not state and size == stored and turn in range(2, 9):
        state = "turned by EXIF"  # by 180 degrees, say: no size tells whether the annotations are
        detail = f"orientation {turn}: do the annotations lie on the image as it is shown?"
    return Decoded(size, stored, state, detail), pixels


def _explain(error: Exception, path: str) -> tuple[str, str]:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return "missing", "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "of unknown format", f"{os.path.getsize(path)} bytes that no decoder knows"
    if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
        return "unreadable", text
    is_cut = "truncated" in text.lower() or _is_cut_png(path)
    return "truncated" if is_cut else "corrupt", text


def _is_cut_png(path: str) -> bool:
    """Whether a file begins as a PNG and lacks its last chunk or a part of it."""
    with open(path, "rb") as file:
        data = file.read()
    return data.startswith(b"\x89PNG") and not re.search(rb"IEND.{4}", data, re.DOTALL)


def _jpeg_damage(path: str) -> tuple[str, str]:
    """Hear what libjpeg says of damaged data, which Pillow discards and fills with grey.

    OpenCV lets libjpeg write to the standard error; decoding an eighth of the size reads all data.
    """
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            cv2.imread(path, cv2.IMREAD_REDUCED_GRAYSCALE_8)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        file.seek(0)
        text = file.read().decode(errors="replace")
    damage = re.search(r"Corrupt JPEG data: (.*)|Premature end of JPEG.*", text)
    if damage is None:
        return "", ""
    return "with stray bytes" if "extraneous" in damage[0] else "corrupt", damage[0]
