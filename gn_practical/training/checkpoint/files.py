"""Checkpoint files that are whole or not there: written, checked, found again and thinned out.

A checkpoint is what ``torch.save`` writes, a zip, and carries the SHA-256 of itself in the zip's
comment. So data and checksum arrive by one rename, there is no second file to lose or to mix up,
and every reader of zips, ``torch.load`` and Detectron2's tools among them, reads it as before.
The CRC-32 that a zip holds of each entry would not do: it leaves out headers and padding, and
``torch.load`` does not compare it.
"""

import hashlib
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch

from gn_practical.atomic import replace_file
from gn_practical.weights.safe_loading import load_torch

LAST = "last_checkpoint"  # Detectron2's file with the name of the checkpoint to resume from

# The end of a sealed file: the comment's length, which closes the zip's directory, and the comment.
_MARK = b"gn_practical sha256 "
_SEAL_START = struct.pack("<H", len(_MARK) + 64) + _MARK
_SEAL_SIZE = len(_SEAL_START) + 64
# The end of a zip without a comment: 22 bytes from this signature, the last two of them zero.
_DIRECTORY_END, _DIRECTORY_END_SIZE = b"PK\5\6", 22

_PERIODIC = re.compile(r"model_(\d{7})\.pth")
_PLAIN = re.compile(r"(?!\.\.?$)[^/\\\0]+")  # a name that leads to no other folder


def checkpoint_path(folder: str, name: str) -> str:
    """Return the path of a checkpoint in its folder; a ValueError if the name leads elsewhere."""
    if not _PLAIN.fullmatch(name):
        raise ValueError(
            f"a checkpoint must be named without a folder, got name={name!r}. "
            "Choose the folder with OUTPUT_DIR."
        )
    return os.path.join(folder, f"{name}.pth")


def write_checkpoint(state: Any, path: str) -> None:
    """Write a state with its checksum, and replace ``path`` by it in one step.

    Raises:
        OSError, RuntimeError: if the disk is full or gone; ``path`` is then as it was, and nothing
            half written is left.
    """
    with replace_file(path) as temporary:
        # By name, not as a Python file: its many small writes would each take the interpreter's
        # lock from the training. And of a file that is new: PyTorch keeps the lock while it closes
        # the file, and if it had to empty one first, ext4 begins to write all of it then.
        try:
            torch.save(state, temporary)
        except RuntimeError:
            _raise_if_full(temporary)
            raise
        _seal(temporary)


def copy_checkpoint(source: str, path: str) -> None:
    """Give a checkpoint a second name: as a link where the file system has them, else as a copy."""
    with replace_file(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_last(folder: str, file_name: str) -> None:
    """Make a checkpoint of the folder, by its name with suffix, the one to resume from."""
    with replace_file(os.path.join(folder, LAST)) as temporary:
        Path(temporary).write_text(file_name, encoding="utf-8")


def check_whole(path: str) -> None:
    """Compare a checkpoint with its checksum.

    A file without one, as other programs write, is compared with the CRC-32 of its entries.

    Raises:
        ValueError: with what is wrong.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "a.pth")
        >>> write_checkpoint({"model": {"weight": torch.zeros(3)}}, path)
        >>> check_whole(path)
        >>> os.truncate(path, 500)
        >>> check_whole(path)
        Traceback (most recent call last):
        ValueError: cut short or changed
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start != b"PK\3\4":
                raise ValueError("not a checkpoint" if start else "empty")
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _SEAL_SIZE))
            end = file.read()
            if not end.startswith(_SEAL_START):
                _check_unsealed(file, end)
            elif _sha256(file, size - _SEAL_SIZE) != end[len(_SEAL_START) :]:
                raise ValueError("its checksum differs")
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def newest_whole(folder: str) -> tuple[str, dict[str, str]]:
    """Find the checkpoint to resume from.

    It is the one that ``last_checkpoint`` names; where that file or its checkpoint is missing or
    damaged, the whole one of most iterations. Returns its path, empty if there is none, and
    {path: what is wrong} of those that were passed over.
    """
    damaged: dict[str, str] = {}
    named = _named_last(folder, damaged)
    for path in _candidates(folder, named):
        try:
            check_whole(path)
            if _iteration_inside(path) is None:
                raise ValueError("holds no state of a training")
        except ValueError as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    return "", damaged


def remove_old(newest: str, keep: int) -> None:
    """Remove the periodic checkpoints before the ``keep`` newest.

    Periodic ones are ``model_0000123.pth``; none else is touched, neither ``model_final`` nor
    ``model_best`` nor what is newer, of another run. Nothing is removed unless ``newest``, the path
    of the one just written, reads back whole, nor where ``keep`` is 0.
    """
    current = Path(newest)
    if not keep or not _PERIODIC.fullmatch(current.name):
        return
    periodic = filter(lambda path: _PERIODIC.fullmatch(path.name), current.parent.iterdir())
    earlier = sorted(path for path in periodic if path.name < current.name)
    old = earlier[: max(0, len(earlier) - keep + 1)]
    if old:
        check_whole(newest)
    for path in old:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: str) -> None:
    """Remove what writing left that was killed, from a folder in which nothing is being written."""
    for path in Path(folder).glob("*.pth.tmp"):
        path.unlink(missing_ok=True)


def _raise_if_full(path: str) -> None:
    """Raise what the system says to one more write, for PyTorch keeps it to itself."""
    with open(path, "ab") as file:
        file.write(bytes(1 << 20))


def _seal(path: str) -> None:
    """Write the checksum of a zip without a comment into its comment."""
    with open(path, "r+b") as file:
        file.seek(-_DIRECTORY_END_SIZE, os.SEEK_END)
        if not _ends_without_comment(file.read()):
            raise OSError("torch.save did not write the end of the file")
        size = file.tell() - 2
        checksum = _sha256(file, size)
        file.seek(size)
        file.write(_SEAL_START + checksum)


def _ends_without_comment(data: bytes) -> bool:
    end = data[-_DIRECTORY_END_SIZE:]
    return end.startswith(_DIRECTORY_END) and end.endswith(b"\0\0")


def _sha256(file: BufferedIOBase, size: int) -> bytes:
    """Return the SHA-256 of the first bytes; in large blocks, between which others may run."""
    file.seek(0)
    checksum, block = hashlib.sha256(), memoryview(bytearray(min(size, 1 << 23)))
    while size and (count := file.readinto(block[:size])):
        checksum.update(block[:count])
        size -= count
    return checksum.hexdigest().encode()


def _check_unsealed(file: BufferedIOBase, end: bytes) -> None:
    if not _ends_without_comment(end):
        raise ValueError("cut short or changed")
    try:
        wrong = zipfile.ZipFile(file).testzip()
    except Exception as error:  # zipfile raises many kinds on a damaged file
        raise ValueError(f"not a whole zip: {error}") from error
    if wrong:
        raise ValueError(f"the checksum of its part {wrong} differs")


def _named_last(folder: str, damaged: dict[str, str]) -> str:
    """Return the path that ``last_checkpoint`` names, or "" and why."""
    path = os.path.join(folder, LAST)
    try:
        name = Path(path).read_text(encoding="utf-8").strip()
        if _PLAIN.fullmatch(name):
            return os.path.join(folder, name)
        damaged[path] = f"must name a file of its folder, not {name[:80]!r}"
    except FileNotFoundError:
        pass  # of a run without checkpoints
    except (OSError, UnicodeDecodeError) as error:
        damaged[path] = f"cannot be read: {error}"
    return ""


def _candidates(folder: str, named: str) -> Iterator[str]:
    """Yield the named one, then the others of a training; last those that cannot be read."""
    if named:
        yield named
    iterations = {}
    for path in Path(folder).glob("*.pth"):
        periodic = _PERIODIC.fullmatch(path.name)
        try:
            iteration = int(periodic[1]) if periodic else _iteration_inside(str(path))
        except ValueError:
            iteration = -1
        if iteration is not None and str(path) != named:
            iterations[str(path)] = iteration
    yield from sorted(iterations, key=iterations.__getitem__, reverse=True)


def _iteration_inside(path: str) -> int | None:
    """Return a checkpoint's iteration, None if it is of no training."""
    state = load_torch(path, mmap=True)
    iteration = state.get("iteration") if isinstance(state, dict) and "model" in state else None
    return iteration if isinstance(iteration, int) else None
