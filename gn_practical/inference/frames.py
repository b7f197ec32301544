"""Pictures one after the other, from files, videos and cameras."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np

from gn_practical.inference.predictor import Loaded
from gn_practical.inference.sources import Source

T = TypeVar("T")
_END = object()
_LACKING = 0.02  # share of a video's frames by which its header may be wrong
_RATE = 25.0  # frames a second of a video that does not say


@dataclass(frozen=True)
class Frame:
    """A picture that was read.

    Attributes:
        source: where it comes from.
        loaded: its pixels, ready for the model.
        number: of the frame in its video, from 0; None of a picture.
        rate: frames a second of the video.
    """

    source: Source
    loaded: Loaded
    number: int | None = None
    rate: float = _RATE


@dataclass(frozen=True)
class Failure:
    """What could not be read, in words."""

    reason: str


def read_frames(
    sources: Iterable[Source], load: Callable[[Any], Loaded]
) -> Iterator[Frame | Failure]:
    """Read all pictures; a failure takes the place of what cannot be read.

    Args:
        sources: of the pictures.
        load: :meth:`gn_practical.inference.Predictor.load`.
    """
    for source in sources:
        if source.kind != "picture":
            yield from _read_video(source, load)
            continue
        try:
            yield Frame(source, load(source.path))
        except ValueError as error:
            yield Failure(str(error))


def count_frames(sources: Iterable[Source]) -> int | None:
    """Return how many pictures are to come, as videos say it; None where nobody knows."""
    total = 0
    for source in sources:
        if source.kind == "camera":
            return None
        total += 1 if source.kind == "picture" else _stated(cv2.VideoCapture(source.path))
    return total


def _read_video(source: Source, load: Callable[[Any], Loaded]) -> Iterator[Frame | Failure]:
    is_camera = source.kind == "camera"
    video = cv2.VideoCapture(int(source.path) if is_camera else source.path)
    try:
        if not video.isOpened():
            what = "camera must be there" if is_camera else "video must be whole and readable"
            yield Failure(f"a {what}, got {source.path}. Check it, or leave it out.")
            return
        number, stated, rate = 0, _stated(video), video.get(cv2.CAP_PROP_FPS)
        while True:
            there, pixels = video.read()
            if not there:
                break
            try:
                loaded = load(np.ascontiguousarray(pixels[..., ::-1]))
            except ValueError as error:
                yield Failure(f"{source.path}, frame {number}: {error}")
                break
            yield Frame(source, loaded, number, rate if 0 < rate < 1000 else _RATE)
            number += 1
        if number < stated - max(1, _LACKING * stated) or number == 0:
            yield Failure(
                f"a video must be whole, got {source.path}, which ends after {number} of {stated} "
                "frames. What was read is predicted; restore the file for the rest."
            )
        elif is_camera:
            yield Failure(f"camera {source.path} has stopped.")
    finally:
        video.release()


def _stated(video: cv2.VideoCapture) -> int:
    count = video.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 0 < count < 1e9 else 0


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield items that a thread makes in advance.

    Args:
        items: made one after the other.
        depth: how many are made before they are asked for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        waiting = deque(pool.submit(next, items, _END) for _ in range(max(1, depth)))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(next, items, _END))
                yield item
        finally:
            for each in waiting:
                each.cancel()


class Behind:
    """Does work in a thread, in order, a few pieces behind; an error comes at the next piece.

    Args:
        depth: how many pieces may wait.

    Example:
        >>> with Behind(2) as behind:
        ...     behind.do(print, "written")
        written
    """

    def __init__(self, depth: int) -> None:
        self._depth, self._waiting = depth, deque[Future]()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")

    def do(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Have a piece of work done; waits while too many are before it."""
        while self._waiting and (len(self._waiting) >= self._depth or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work, *arguments))

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            for each in self._waiting:
                each.result()
