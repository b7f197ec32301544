"""Faults of the images that a json lists, found in the json and in the files."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from gn_practical.training.data.entries import IMAGE_KEYS, lacking_keys, repeated
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.annotations import Size
from gn_practical.training.validation.files import Decoded, decode_file
from gn_practical.training.validation.findings import Fault


class Images:
    """The images of one json.

    Args:
        path: the json.
        entries: its list ``images``.
        root: folder of the files; None to take the json's word for everything.
        decoded: what is known of files already, by path; filled here.

    Attributes:
        by_id: the sound entries by image id; of several with one id the first.
        malformed_ids: of the entries that are not; their annotations go with them.
        sizes: of each image, by id: the json's, and the file's where that is another.
    """

    def __init__(
        self, path: str, entries: Sequence[Any], root: str | None, decoded: dict[str, Decoded]
    ) -> None:
        self.path, self.entries, self.root, self.decoded = path, entries, root, decoded
        self.by_id: dict[Any, dict[str, Any]] = {}
        self.malformed_ids: set = set()
        self.sizes: dict[Any, list[Size]] = {}

    def check(self, pool: Pool) -> Iterator[Fault]:
        """Yield what is wrong with them; decodes every file once."""
        sound = []
        for index, entry in enumerate(self.entries):
            problem = malformed_image(entry)
            if problem:
                fault = self._fault("image entry malformed", index, problem)
                if is_id(fault.image_id):
                    self.malformed_ids.add(fault.image_id)
                yield fault
            else:
                sound.append(index)
        for index in reversed(sound):
            entry = self.entries[index]
            self.by_id[entry["id"]] = entry
            self.sizes[entry["id"]] = [(entry["width"], entry["height"])]
        for position in repeated(self.entries[index]["id"] for index in sound):
            first = self.file(self.entries[sound[position]]["id"])
            yield self._fault("image id twice", sound[position], f"{first} has it already")
        if self.root is not None:
            yield from self._check_files(sound, pool)

    def lacks(self, image_id: object) -> bool:
        """Whether no entry, sound or not, has an id."""
        return image_id not in self.by_id and image_id not in self.malformed_ids

    def file(self, image_id: object) -> str:
        """Return the path of an image's file; empty for an unknown image."""
        entry = self.by_id.get(image_id)
        return os.path.join(self.root or "", entry["file_name"]) if entry else ""

    def _check_files(self, sound: Sequence[int], pool: Pool) -> Iterator[Fault]:
        paths = {i: os.path.join(self.root, self.entries[i]["file_name"]) for i in sound}
        new = [path for path in dict.fromkeys(paths.values()) if path not in self.decoded]
        title = f"Images of {os.path.basename(self.path)}"
        for path, facts in zip(new, pool.map(decode_file, new, title), strict=True):
            self.decoded[path] = facts
        for index, path in paths.items():
            facts = self.decoded[path]
            if facts.state:
                yield self._fault(f"image {facts.state}", index, facts.detail, path)
            yield from self._check_size(index, path, facts)

    def _check_size(self, index: int, path: str, facts: Decoded) -> Iterator[Fault]:
        entry = self.entries[index]
        stated = (entry["width"], entry["height"])
        if facts.size is None or facts.size == stated:
            return
        self.sizes[entry["id"]].append(facts.size)
        yield self._fault("image of another size", index, describe_size(facts, stated), path)

    def _fault(self, reason: str, index: int, detail: str, path: str | None = None) -> Fault:
        entry = self.entries[index] if isinstance(self.entries[index], dict) else {}
        name = entry.get("file_name")
        if path is None:
            path = os.path.join(self.root or "", name) if isinstance(name, str) else ""
        return Fault(reason, self.path, ("images", index), path, entry.get("id"), None, detail)


def malformed_image(entry: object) -> str:
    """Say what makes an entry of ``images`` unusable; nothing if it is sound."""
    lacking = lacking_keys(entry, IMAGE_KEYS)
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    if not is_id(entry["id"]) or not isinstance(entry["file_name"], str):
        return f"id={entry['id']!r}, file_name={entry['file_name']!r}"
    for side in ("width", "height"):
        if type(entry[side]) not in (int, float) or not entry[side] > 0:
            return f"{side}={entry[side]!r}"
    return ""


def is_id(value: object) -> bool:
    """Whether a value can identify: a whole number or a text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def describe_size(facts: Decoded, stated: Size) -> str:
    """Compare the size of a file with that in the json."""
    text = f"the file has {facts.size[0]}x{facts.size[1]}, the json {stated[0]}x{stated[1]}"
    if facts.stored_size == stated:
        text += ", which is the size before the rotation that the file's EXIF orders"
    return text
