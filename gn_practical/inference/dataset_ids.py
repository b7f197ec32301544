"""Ids of pictures and classes from the json of a data set, so that results can be evaluated."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from gn_practical.inference.sources import Source


class DatasetIds:
    """What a json in COCO's format calls pictures and classes.

    Args:
        path: of the json.

    Attributes:
        path: of the json.
        categories: of the json.

    Raises:
        ValueError: if it is no such json.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            self.categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
            names = [(os.path.normpath(i["file_name"]), i["id"]) for i in content["images"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                "ids must come from a json with COCO's images and categories, got "
                f"{path}: {type(error).__name__}: {error}. Give the data set's json."
            ) from error
        self._images = defaultdict(list)
        for name, image_id in names:
            self._images[os.path.basename(name)].append((name, image_id))

    def image_id(self, path: str) -> Any:
        """Return the id of a picture.

        Args:
            path: of its file, which ends as the json's ``file_name``.

        Raises:
            ValueError: if none has that name, or several have.
        """
        path = os.path.normpath(path)
        candidates = self._images.get(os.path.basename(path), [])
        found = [image_id for name, image_id in candidates if f"/{path}".endswith(f"/{name}")]
        if not found and len(candidates) == 1:
            found = [candidates[0][1]]
        if len(found) != 1:
            raise ValueError(
                f"a picture must be one of {self.path}, got {path} for {len(found)} of its images. "
                "Leave it out, or predict without the json."
            )
        return found[0]

    def known(self, sources: Iterable[Source]) -> tuple[list[Source], list[str]]:
        """Return the pictures that the json has, and what is wrong with the others.

        Args:
            sources: of pictures.
        """
        found, problems, taken = [], [], {}
        for source in sources:
            try:
                image_id = self.image_id(source.path)
            except ValueError as error:
                problems.append(str(error))
                continue
            if image_id in taken:
                problems.append(
                    f"a picture must come once, got {source.path} after {taken[image_id]} for "
                    f"image_id={image_id!r} of {self.path}. Leave one of them out."
                )
                continue
            taken[image_id] = source.path
            found.append(source)
        return found, problems
