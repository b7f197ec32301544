"""What is to be predicted: files, folders, patterns, videos, cameras."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".jp2", ".avif"),
)
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")


@dataclass(frozen=True)
class Source:
    """A picture, a video or a camera.

    Attributes:
        path: of the file; of a camera its number.
        kind: "picture", "video" or "camera".
    """

    path: str
    kind: str = "picture"

    @property
    def stem(self) -> str:
        """What files of its predictions are named after."""
        if self.kind == "camera":
            return f"camera_{self.path}"
        return os.path.splitext(os.path.basename(self.path))[0]


def find_sources(
    inputs: Iterable[str], recursive: bool = False, without: str | None = None
) -> tuple[list[Source], list[str]]:
    """Return what inputs stand for, each file once, and what is wrong with the others.

    A file is taken whatever its name; of a folder, those that are named as pictures or videos, in
    the order of their names. Digits are a camera's number, unless a file is named so.

    Args:
        inputs: files, folders, patterns ("*.png", "**/*.jpg"), cameras.
        recursive: take folders in folders too.
        without: folder whose files are left out, that of the results.

    Example:
        >>> find_sources(["0", "missing.jpg"])
        ([Source(path='0', kind='camera')], ['missing.jpg: there is no such file or folder'])
    """
    sources: dict[str, Source] = {}
    problems = []
    for each in inputs:
        try:
            found = list(_expand(each, recursive, without))
        except ValueError as error:
            problems.append(f"{each}: {error}")
            continue
        for source in found:
            key = source.path if source.kind == "camera" else os.path.realpath(source.path)
            sources.setdefault(key, source)
    return list(sources.values()), problems


def _expand(name: str, recursive: bool, without: str | None) -> Iterator[Source]:
    if os.path.isdir(name):
        yield from _in_folder(name, recursive, without)
    elif os.path.exists(name) or "://" in name:
        yield _of_file(name)
    elif name.isdecimal():
        yield Source(str(int(name)), "camera")
    elif any(letter in name for letter in "*?["):
        files = sorted(f for f in glob.glob(name, recursive=True) if os.path.isfile(f))
        files = [f for f in files if not _is_in(f, without)]
        if not files:
            raise ValueError("the pattern matches no file")
        yield from map(_of_file, files)
    else:
        raise ValueError("there is no such file or folder")


def _in_folder(folder: str, recursive: bool, without: str | None) -> Iterator[Source]:
    empty = True
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(folders) if recursive else []
        for name in sorted(names):
            path = os.path.join(root, name)
            if not name.lower().endswith((*PICTURES, *VIDEOS)) or _is_in(path, without):
                continue
            empty = False
            yield _of_file(path)
    if empty:
        hint = "" if recursive else "; --recursive looks into the folders in it"
        raise ValueError(f"the folder holds no picture and no video{hint}")


def _of_file(path: str) -> Source:
    return Source(path, "video" if path.lower().endswith(VIDEOS) else "picture")


def _is_in(path: str, folder: str | None) -> bool:
    if folder is None:
        return False
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))
