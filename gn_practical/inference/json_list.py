"""A json file with a list that grows, and is whole after every addition."""

import json
import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any


class JsonList:
    """A list in a json file, for more entries than shall be kept in memory.

    The end of the list is written with every addition, over the end before: a process that is
    killed leaves a file that can be read.

    Args:
        path: of the file, which is written anew.
        key: of the list in an object; "" for a list alone.
        head: what stands before it in that object.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "a.json")
        >>> with JsonList(path, "annotations", {"categories": []}) as entries:
        ...     entries.add([{"id": 1}, {"id": 2}])
        >>> json.load(open(path))
        {'categories': [], 'annotations': [{'id': 1}, {'id': 2}]}
    """

    def __init__(
        self, path: str | os.PathLike, key: str = "", head: Mapping[str, Any] | None = None
    ) -> None:
        start, self._end = "[", "\n]\n"
        if key:
            before = json.dumps(dict(head or {}))[:-1]
            start = f"{before}{', ' if head else ''}{json.dumps(key)}: ["
            self._end = "\n]}\n"
        self._separator = "\n"
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by close)
        self._write(start)

    def add(self, entries: Iterable[Any]) -> None:
        """Add entries; returns when the file has them.

        Raises:
            ValueError: for what json cannot express, NaN among it.
        """
        lines = [json.dumps(each, allow_nan=False) for each in entries]
        if lines:
            self._file.seek(-len(self._end), os.SEEK_END)
            self._write(self._separator + ",\n".join(lines))
            self._separator = ",\n"

    def _write(self, text: str) -> None:
        rest = memoryview((text + self._end).encode())
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "JsonList":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()
