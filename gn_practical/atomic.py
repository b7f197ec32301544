"""Files that are whole or not there: what is written takes the place of its path in one step."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike


@contextmanager
def replace_file(path: PathLike, durable: bool = True) -> Iterator[str]:
    """Name a new file to write, which replaces ``path`` whole at the end of the block, or never.

    What is there before stays readable until then, and for good where the block raises. A link is
    replaced: the file that it shares stays as it is.

    Args:
        path: the file to write or replace; its folder must exist.
        durable: sync file and folder; False for thousands of small files that can be made again.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "a")
        >>> with replace_file(path) as temporary:
        ...     _ = Path(temporary).write_text("whole")
        >>> Path(path).read_text()
        'whole'
    """
    path = os.fspath(path)
    temporary = f"{path}.tmp"
    with suppress(FileNotFoundError):
        os.remove(temporary)  # what a killed process left
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    if durable:
        with suppress(OSError):  # not every file system can sync a folder
            _sync(os.path.dirname(path) or ".")


def write_json(path: PathLike, content: Any, **options: Any) -> None:
    """Write a json file whole, with options of ``json.dumps``; its folder is made.

    Raises:
        OSError: if it cannot be written; ``path`` is then as it was.
    """
    text = json.dumps(content, **options)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replace_file(path) as temporary:
        Path(temporary).write_text(f"{text}\n", encoding="utf-8")


def refuse_overwriting(paths: Iterable[PathLike], sources: Iterable[PathLike]) -> None:
    """Check that nothing that is read would be written over, by whatever link or spelling.

    Args:
        paths: of files that will be written by `replace_file`.
        sources: files that are read.

    Raises:
        ValueError: naming the first file that is both.
    """
    known = {key: source for source in sources if (key := _identity(source))}
    for path in map(os.fspath, paths):
        source = known.get(_identity(path)) or known.get(_identity(f"{path}.tmp"))
        if source:
            raise ValueError(
                f"What is written must be another file than what is read, got {path} for "
                f"{source}. Choose another place for the output."
            )


def _identity(path: PathLike) -> tuple[int, int] | None:
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
