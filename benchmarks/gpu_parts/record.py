"""What a section finds, on the disk as soon as it is found; needs no PyTorch."""

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FOLDERS = re.compile(r"(?<![\w.:/<…])/(?:[\w.+@ -]+/)+")  # of an absolute path, not of an address


class Record:
    """Collects the findings of a section and writes them after each.

    Args:
        path: the json file to write.
        output: folder of the report, for pictures.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self._path, self._output = path, output
        self.content: dict[str, Any] = {
            "values": {}, "tables": {}, "notes": [], "pictures": [], "data": {},
        }  # fmt: skip

    def value(self, goal: str, value: float | str | None) -> None:
        """Give the measured value of a goal; a text says why there is none."""
        self.content["values"][goal] = value
        self._write()

    def table(self, title: str, headers: list[str], rows: list[list]) -> None:
        """Add a table, or put it in the place of that with the same title."""
        self.content["tables"][title] = {"headers": headers, "rows": rows}
        self._write()

    def note(self, text: str) -> None:
        """Add a sentence."""
        self.content["notes"].append(text)
        self._write()

    def data(self, **content: Any) -> None:
        """Add what goes to the json file alone."""
        self.content["data"].update(content)
        self._write()

    def picture(self, name: str, draw: Callable[[Path], None]) -> None:
        """Let ``draw`` write a picture, which the report then shows."""
        draw(self._output / name)
        self.content["pictures"].append(name)
        self._write()

    def _write(self) -> None:
        write_whole(self._path, as_json(self.content))


def as_json(content: Any) -> str:
    """Return strict json, in which NaN and infinity are null."""
    plain = json.loads(json.dumps(content, default=float), parse_constant=lambda _: None)
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)


def write_whole(path: Path, text: str) -> None:
    """Write a file that a reader never sees half of."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(f"{text}\n", encoding="utf-8")
    os.replace(temporary, path)


def without_places(content: Any) -> Any:
    """Leave folders and the name of the machine out of all texts, which a report does not need."""
    if isinstance(content, dict):
        return {without_places(key): without_places(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_places(each) for each in content]
    if not isinstance(content, str):
        return content
    text, machine = _FOLDERS.sub("…/", content), socket.gethostname()
    return text.replace(machine, "<machine>") if len(machine) > 3 else text
