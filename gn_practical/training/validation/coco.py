"""What a COCO json lists: categories and images, and the images' files."""

import os
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gn_practical.training.data.coco_format import (
    CATEGORY,
    FILE_NAME,
    ID,
    SIDE,
    Kind,
    is_id,
    malformed,
    read_json,
    repeated,
)
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.files import Decoded, Size, decode_file
from gn_practical.training.validation.findings import Fault

Names = tuple[tuple[int, str], ...]  # id and name of categories, hashable
Sound = dict[int, dict[str, Any]]  # entries of a list, by index

_LISTS = ("images", "annotations", "categories")
_IMAGE = {"id": ID, "file_name": FILE_NAME, "width": SIDE, "height": SIDE}


@dataclass
class Session:
    """What the targets of one validation share."""

    pool: Pool | None = None  # decodes files; None to ask only whether they are there
    decoded: dict[str, Decoded] = field(default_factory=dict)  # files, by path
    images: dict[str, dict[Any, str]] = field(default_factory=dict)  # file by id, by json

    def look_at(self, root: str, names: Collection[str], title: str) -> Iterator[Decoded]:
        """Yield what each file is, in order; every path is decoded once."""
        if self.pool is None:
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


@dataclass
class Coco:
    """A json that is checked, and what of it is sound."""

    path: str
    image_root: str | None  # None to take the json's word for the images
    names: Names | None  # of the data set's categories, where they are known besides
    annotations: list[Any] = field(default_factory=list)  # as they are in the json
    categories: list[dict[str, Any]] = field(default_factory=list)  # sorted by id
    by_id: dict[Any, dict[str, Any]] = field(default_factory=dict)  # the first image of each id
    malformed_ids: set = field(default_factory=set)  # of images; their annotations go with them
    sizes: dict[Any, list[Size]] = field(default_factory=dict)  # the json's and the file's, by id

    def check(self, session: Session) -> Generator[Fault, None, bool]:
        """Yield the faults of keys, categories and images; return whether the rest can be checked.

        Raises:
            DatasetError: if the json is missing or no json.
        """
        twice: list[str] = []
        content = read_json(self.path, twice)
        if twice:
            detail = f"{', '.join(map(repr, dict.fromkeys(twice)))}: of two values the last counts"
            yield Fault("json key twice", self.path, detail=detail)
        if missing := [key for key in _LISTS if not isinstance(content.get(key), list)]:
            keys = ", ".join(content) or "none"
            detail = f"no list {', '.join(missing)} among its keys: {keys}"
            yield Fault("json unusable", self.path, detail=detail)
            return False
        if not content["images"]:
            yield Fault("json unusable", self.path, detail="it lists no image")
            return False
        self.annotations = content["annotations"]
        yield from self._check_categories(content["categories"])
        yield from self._check_images(content["images"], session)
        return True

    @property
    def category_ids(self) -> frozenset:
        """The ids of the data set's categories: those known besides, or else the json's."""
        return frozenset(dict(self.names) if self.names else [c["id"] for c in self.categories])

    def lacks(self, image_id: object) -> bool:
        """Whether no image, sound or not, has an id."""
        return image_id not in self.by_id and image_id not in self.malformed_ids

    def file(self, image_id: object) -> str:
        """Return the path of an image's file; empty for an unknown image."""
        entry = self.by_id.get(image_id) if is_id(image_id) else None
        return os.path.join(self.image_root or "", entry["file_name"]) if entry else ""

    def _check_categories(self, entries: Sequence[Any]) -> Iterator[Fault]:
        sound, wrong = split(entries, CATEGORY)
        self.categories = sorted(sound.values(), key=lambda category: category["id"])
        found = [("category malformed", index, problem) for index, problem in wrong.items()]
        for key in ("id", "name"):
            for index in repeated({index: entry[key] for index, entry in sound.items()}):
                detail = f"id={sound[index]['id']}, name={sound[index]['name']!r}"
                found.append((f"category {key} twice", index, detail))
        known = dict(self.names or ())
        for index, entry in sound.items():
            name = known.get(entry["id"], entry["name"])
            if name != entry["name"]:
                detail = f"id={entry['id']} is {entry['name']!r}, not {name!r} as elsewhere"
                found.append(("category of another name", index, detail))
        for reason, index, detail in found:
            yield Fault(reason, self.path, ("categories", index), detail=detail)

    def _check_images(self, entries: Sequence[Any], session: Session) -> Iterator[Fault]:
        """Yield what is wrong with the images; look at every file once."""
        sound, wrong = split(entries, _IMAGE)
        for index, problem in wrong.items():
            fault = self._fault("image entry malformed", index, entries[index], problem)
            if is_id(fault.image_id):
                self.malformed_ids.add(fault.image_id)
            yield fault
        for entry in reversed(sound.values()):
            self.by_id[entry["id"]] = entry
            self.sizes[entry["id"]] = [(entry["width"], entry["height"])] * 2
        names = {key: entry["file_name"] for key, entry in self.by_id.items()}
        session.images[self.path] = {**dict.fromkeys(self.malformed_ids, ""), **names}
        found = _check_unique(sound)
        if self.image_root is not None:
            found += self._check_files(sound, session)
        for reason, index, detail in found:
            yield self._fault(reason, index, sound[index], detail)

    def _check_files(self, sound: Sound, session: Session) -> list[tuple[str, int, str]]:
        names = [entry["file_name"] for entry in sound.values()]
        title = f"Images of {os.path.basename(self.path)}"
        looks, found = session.look_at(self.image_root, names, title), []
        for (index, entry), facts in zip(sound.items(), looks, strict=True):
            stated = (entry["width"], entry["height"])
            details = facts.findings("image", [stated])
            found += [(reason, index, detail) for reason, detail in details]
            self.sizes[entry["id"]][1] = facts.size or stated
        return found

    def _fault(self, reason: str, index: int, entry: object, detail: str) -> Fault:
        values = entry if isinstance(entry, Mapping) else {}
        name = values.get("file_name")
        path = os.path.join(self.image_root or "", name) if isinstance(name, str) else ""
        return Fault(reason, self.path, ("images", index), path, values.get("id"), None, detail)


def _check_unique(images: Sound) -> list[tuple[str, int, str]]:
    ids = {index: entry["id"] for index, entry in images.items()}
    twice = sorted(repeated(ids))
    found = [("image id twice", i, f"an earlier image has the id {ids[i]!r}") for i in twice]
    others = {index: entry for index, entry in images.items() if index not in set(twice)}
    names = {index: os.path.normpath(entry["file_name"]) for index, entry in others.items()}
    detail = "an image with another id has this file"
    found += [("image file twice", index, detail) for index in repeated(names)]
    texts = [index for index, value in ids.items() if isinstance(value, str)]
    if 0 < len(texts) < len(ids):
        detail = f"id={ids[texts[0]]!r} is a text, others are numbers"
        found.append(("image ids of mixed kinds", texts[0], detail))
    return found


def split(
    entries: Sequence[Any], needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None
) -> tuple[Sound, dict[int, str]]:
    """Return the sound entries of a list, and what makes the others `malformed`, by index."""
    problems = {index: malformed(entry, needed, optional) for index, entry in enumerate(entries)}
    sound = {index: entries[index] for index, problem in problems.items() if not problem}
    return sound, {index: problem for index, problem in problems.items() if problem}
