"""What a json lists: images and categories, and the images' files."""

import os
from collections import defaultdict
from collections.abc import Collection, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gn_practical.training.data.coco_format import malformed_category, read_json
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.annotations import Size
from gn_practical.training.validation.files import Decoded, decode_file
from gn_practical.training.validation.findings import Fault

Names = tuple[tuple[int, str], ...]  # id and name of categories, hashable


@dataclass
class Session:
    """What the targets of one validation share.

    Attributes:
        pool: the workers.
        decode: whether files are decoded, and masks compared with boxes and areas; False for what
            decides whether a run works, in a fraction of the time.
        decoded: what is known of image files, by path.
        images: file name by image id, by the json that lists them.
    """

    pool: Pool
    decode: bool = True
    decoded: dict[str, Decoded] = field(default_factory=dict)
    images: dict[str, dict[Any, str]] = field(default_factory=dict)

    def look_at(self, root: str, names: Collection[str], title: str) -> Iterator[Decoded]:
        """Yield what each file is, in order; every path is decoded once."""
        if not self.decode:
            missing = missing_files(root, names)
            absent = Decoded(state="missing", detail="there is no such file")
            yield from (absent if name in missing else Decoded() for name in names)
            return
        paths = [os.path.join(root, name) for name in names]
        new = [path for path in dict.fromkeys(paths) if path not in self.decoded]
        self.decoded.update(zip(new, self.pool.map(decode_file, new, title), strict=True))
        yield from (self.decoded[path] for path in paths)


def missing_files(root: str, names: Iterable[str]) -> set[str]:
    """Return the names that are in no folder under `root`, with one listing of each folder."""
    by_folder: dict[str, set[str]] = defaultdict(set)
    for name in names:
        by_folder[os.path.dirname(name)].add(name)
    missing = set()
    for folder, wanted in by_folder.items():
        path = os.path.join(root, folder)
        present = os.listdir(path) if os.path.isdir(path) else []
        missing |= wanted - {os.path.join(folder, name) for name in present}
    return missing


class Images:
    """The images of one json.

    Args:
        path: the json.
        entries: its list ``images``.
        root: folder of the files; None to take the json's word for everything.

    Attributes:
        by_id: the sound entries by image id; of several with one id the first.
        malformed_ids: of the entries that are not; their annotations go with them.
        sizes: of each image, by id: the json's, and the file's where that is another.
    """

    def __init__(self, path: str, entries: Sequence[Any], root: str | None) -> None:
        self.path, self.entries, self.root = path, entries, root
        self.by_id: dict[Any, dict[str, Any]] = {}
        self.malformed_ids: set = set()
        self.sizes: dict[Any, list[Size]] = {}

    def check(self, session: Session) -> Iterator[Fault]:
        """Yield what is wrong with them; looks at every file once."""
        sound = {}
        for index, entry in enumerate(self.entries):
            if problem := malformed_image(entry):
                fault = self._fault("image entry malformed", index, problem)
                if is_id(fault.image_id):
                    self.malformed_ids.add(fault.image_id)
                yield fault
            else:
                sound[index] = entry
        for entry in reversed(sound.values()):
            self.by_id[entry["id"]] = entry
            self.sizes[entry["id"]] = [(entry["width"], entry["height"])]
        names = {key: each["file_name"] for key, each in self.by_id.items()}
        session.images[self.path] = {**dict.fromkeys(self.malformed_ids, ""), **names}
        yield from self._check_unique(sound)
        if self.root is not None:
            yield from self._check_files(sound, session)

    def lacks(self, image_id: object) -> bool:
        """Whether no entry, sound or not, has an id."""
        return image_id not in self.by_id and image_id not in self.malformed_ids

    def file(self, image_id: object) -> str:
        """Return the path of an image's file; empty for an unknown image."""
        entry = self.by_id.get(image_id) if is_id(image_id) else None
        return os.path.join(self.root or "", entry["file_name"]) if entry else ""

    def _check_unique(self, sound: Mapping[int, dict[str, Any]]) -> Iterator[Fault]:
        twice = set(repeated({index: entry["id"] for index, entry in sound.items()}))
        for index in sorted(twice):
            first = self.file(sound[index]["id"])
            yield self._fault("image id twice", index, f"{first} has it already")
        others = {index: entry for index, entry in sound.items() if index not in twice}
        names = {index: os.path.normpath(entry["file_name"]) for index, entry in others.items()}
        for index in repeated(names):
            yield self._fault("image file twice", index, "an image with another id has this file")
        texts = {index: isinstance(entry["id"], str) for index, entry in sound.items()}
        if len(set(texts.values())) > 1:
            index = next(index for index, text in texts.items() if text)
            detail = f"id={sound[index]['id']!r} is a text, others are numbers"
            yield self._fault("image ids of mixed kinds", index, detail)

    def _check_files(
        self, sound: Mapping[int, dict[str, Any]], session: Session
    ) -> Iterator[Fault]:
        names = [entry["file_name"] for entry in sound.values()]
        title = f"Images of {os.path.basename(self.path)}"
        for index, facts in zip(sound, session.look_at(self.root, names, title), strict=True):
            entry = sound[index]
            stated = (entry["width"], entry["height"])
            if facts.state:
                yield self._fault(f"image {facts.state}", index, facts.detail)
            if facts.size not in (None, stated):
                self.sizes[entry["id"]].append(facts.size)
                yield self._fault("image of another size", index, describe_size(facts, stated))

    def _fault(self, reason: str, index: int, detail: str) -> Fault:
        entry = self.entries[index] if isinstance(self.entries[index], dict) else {}
        name = entry.get("file_name")
        path = os.path.join(self.root or "", name) if isinstance(name, str) else ""
        return Fault(reason, self.path, ("images", index), path, entry.get("id"), None, detail)


def malformed_image(entry: object) -> str:
    """Say what makes an entry of ``images`` unusable; nothing if it is sound."""
    if lacking := lacking_keys(entry, "id", "file_name", "height", "width"):
        return lacking
    if not is_id(entry["id"]) or not is_file_name(entry["file_name"]):
        return f"id={entry['id']!r}, file_name={entry['file_name']!r}"
    for side in ("width", "height"):
        if type(entry[side]) is not int or entry[side] <= 0:
            return f"{side}={entry[side]!r}, which must be a whole number above 0"
    return ""


def describe_size(facts: Decoded, stated: Size) -> str:
    """Compare the size of a file with that in the json."""
    text = f"the file has {facts.size[0]}x{facts.size[1]}, the json {stated[0]}x{stated[1]}"
    if facts.stored_size == stated:
        text += ", which is the size before the rotation that the file's EXIF orders"
    return text


# Entries of all kinds ---------------------------------------------------------------------------


def lacking_keys(entry: object, *needed: str) -> str:
    """Say what an entry lacks of the keys that it needs; nothing if they are there.

    Example:
        >>> lacking_keys({"id": 1}, "id", "bbox")
        'it lacks bbox'
    """
    lacking = set(needed) - (entry.keys() if isinstance(entry, Mapping) else set())
    return f"it lacks {', '.join(sorted(lacking))}" if lacking else ""


def repeated(values: Mapping[int, Hashable]) -> Iterator[int]:
    """Yield the key of every value that came before.

    Example:
        >>> list(repeated({0: "a", 1: "b", 5: "a", 6: "a"}))
        [5, 6]
    """
    seen = set()
    for key, value in values.items():
        if value in seen:
            yield key
        seen.add(value)


def is_id(value: object) -> bool:
    """Whether a value can identify: a whole number of any size or a text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_file_name(value: object) -> bool:
    """Whether a value can name a file on this system."""
    try:
        return isinstance(value, str) and bool(value) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


# The json ---------------------------------------------------------------------------------------


def check_lists(
    path: str, image_root: str | None, names: Names | None, session: Session
) -> Generator[Fault, None, tuple[dict[str, Any], Images] | None]:
    """Yield the faults of a json's categories and images; return its content and its images.

    Args:
        path: the json.
        image_root: folder of the files; None to take the json's word for them.
        names: of the categories of the data set, where they are known besides.
        session: of the validation.

    Raises:
        DatasetError: if the json is missing or no json.
    """
    twice: list[str] = []
    content = read_json(path, twice)
    if twice:
        detail = f"{', '.join(map(repr, dict.fromkeys(twice)))}: of two values the last counts"
        yield Fault("json key twice", path, detail=detail)
    lists = ("images", "annotations", "categories")
    if missing := [key for key in lists if not isinstance(content.get(key), list)]:
        keys = ", ".join(content) or "none"
        detail = f"no list {', '.join(missing)} among its keys: {keys}"
        yield Fault("json unusable", path, detail=detail)
        return None
    if not content["images"]:
        yield Fault("json unusable", path, detail="it lists no image")
        return None
    yield from _check_categories(content["categories"], path, dict(names or ()))
    images = Images(path, content["images"], image_root)
    yield from images.check(session)
    return content, images


def category_ids(content: Mapping[str, Any], names: Names | None) -> frozenset:
    """Return the ids of a data set's categories: those known besides, or else the json's."""
    return (
        frozenset(dict(names)) if names else frozenset(c["id"] for c in sound_categories(content))
    )


def sound_categories(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the categories that can be used, sorted by id."""
    sound = [c for c in content["categories"] if not malformed_category(c)]
    return sorted(sound, key=lambda category: category["id"])


def _check_categories(
    categories: Sequence[Any], path: str, names: Mapping[int, str]
) -> Iterator[Fault]:
    sound = {}
    for index, category in enumerate(categories):
        if problem := malformed_category(category):
            yield Fault("category malformed", path, ("categories", index), detail=problem)
        else:
            sound[index] = category
    for key in ("id", "name"):
        for index in repeated({i: category[key] for i, category in sound.items()}):
            detail = f"id={sound[index]['id']}, name={sound[index]['name']!r}"
            yield Fault(f"category {key} twice", path, ("categories", index), detail=detail)
    for index, category in sound.items():
        expected = names.get(category["id"], category["name"])
        if category["name"] != expected:
            detail = f"id={category['id']} is {category['name']!r}, not {expected!r} as elsewhere"
            place = ("categories", index)
            yield Fault("category of another name", path, place, detail=detail)
