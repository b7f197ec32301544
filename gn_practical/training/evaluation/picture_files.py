"""Where drawn pictures go: a folder that holds nothing else, or a window."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from gn_practical.atomic import replace_file

_QUALITY = 92  # texts stay readable
_LONGEST = 200  # bytes of a file's name, without its ending


class PictureFolder:
    """A folder for JPEG files, each whole or not there.

    Args:
        path: made where it does not exist.
        sources: folders that are read, which it must not be.

    Raises:
        ValueError: if it is one of the sources or cannot be written.
    """

    def __init__(self, path: str, sources: Iterable[str | None] = ()) -> None:
        self.path = path
        with _clear_error(path):
            os.makedirs(path, exist_ok=True)
        for source in filter(None, sources):
            if os.path.isdir(source) and os.path.samefile(source, path):
                raise ValueError(
                    f"the output must be another folder than that of the images, got {path}. "
                    "Name a new one."
                )

    def save(self, name: str, pixels: np.ndarray) -> str:
        """Write an RGB picture, (H, W, 3), under a name without ending; return the file's name."""
        file = f"{_fitting(name)}.jpg"
        path = os.path.join(self.path, file)
        with _clear_error(path), replace_file(path, durable=False) as temporary:
            picture = Image.fromarray(pixels)
            picture.save(temporary, format="JPEG", quality=_QUALITY, subsampling=0)
        return file

    def write(self, name: str, text: str) -> str:
        """Write a text file; return its path."""
        path = os.path.join(self.path, name)
        with _clear_error(path), replace_file(path) as temporary:
            Path(temporary).write_bytes(text.encode("utf-8", "replace"))
        return path


def show(title: str, pixels: np.ndarray) -> None:
    """Show an RGB picture in a window until a key is pressed.

    Raises:
        ValueError: if there is no display.
    """
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not display:  # there OpenCV ends the process
        raise ValueError("show must have a display, got none. Leave --show out to write files.")
    try:
        cv2.imshow("gn_practical", pixels[:, :, ::-1])
        cv2.setWindowTitle("gn_practical", title)
        cv2.waitKey()
    except cv2.error as error:  # OpenCV built without windows
        what = str(error).splitlines()[0]
        message = f"show must have windows, got {what}. Leave --show out to write files."
        raise ValueError(message) from None


def _fitting(name: str) -> str:
    """Return a name that any file system takes: no separators, not too long."""
    name = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name)
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    return name


@contextmanager
def _clear_error(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the output must be a folder that can be written, got {path}: {error}. Name another."
        ) from error
