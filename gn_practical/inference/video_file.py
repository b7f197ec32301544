"""A video that predictions are drawn into."""

import os
from contextlib import ExitStack

import cv2
import numpy as np

from gn_practical.atomic import replace_file
from gn_practical.inference.sources import Source


class VideoFile:
    """An .mp4 file, which is there when it is closed.

    Args:
        folder: of the results.
        name: of the file in it.
        source: that is predicted.
        rate: frames a second.
    """

    def __init__(self, folder: str, name: str, source: Source, rate: float) -> None:
        self.name, self.source, self._rate = name, source, rate
        self._path = os.path.join(folder, name)
        self._stack = ExitStack()
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def add(self, picture: np.ndarray) -> None:
        """Add a frame, RGB; one of another size than the first is brought to that.

        Raises:
            OSError: if no video can be written here.
        """
        if self._writer is None:
            self._begin(picture)
        if picture.shape[1::-1] != self._size:
            picture = cv2.resize(picture, self._size)
        self._writer.write(np.ascontiguousarray(picture[..., ::-1]))

    def _begin(self, picture: np.ndarray) -> None:
        self._size = picture.shape[1::-1]
        temporary = self._stack.enter_context(replace_file(self._path, durable=False))
        hidden = f"{temporary}.mp4"  # by whose ending OpenCV chooses the format
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(hidden, code, self._rate, self._size)
        if not self._writer.isOpened():
            raise OSError(f"OpenCV can write no video to {self._path}")
        self._stack.callback(os.replace, hidden, temporary)

    def close(self) -> None:
        """Complete the file."""
        if self._writer is not None:
            self._writer.release()
        self._stack.close()
