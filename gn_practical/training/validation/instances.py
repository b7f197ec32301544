"""Faults of a json of instances."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from gn_practical.training.data.coco_format import read_json
from gn_practical.training.data.entries import INSTANCE_KEYS, lacking_keys, repeated
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.annotations import Expected, Size, check_instance
from gn_practical.training.validation.files import Decoded
from gn_practical.training.validation.findings import Fault, Finding
from gn_practical.training.validation.images import Images, is_id


class InstancesTarget(NamedTuple):
    """A json of instances with its images.

    Attributes:
        json: path of the json.
        image_root: folder of the images; None to check the json alone.
        known_ids: ids of the categories; by default those of the json.
        masks: whether every instance needs a mask; None if it does where others have one.
        area: whether every instance needs its area.
    """

    json: str
    image_root: str | None = None
    known_ids: frozenset | None = None
    masks: bool | None = None
    area: bool = False

    def check(self, pool: Pool, decoded: dict[str, Decoded]) -> Iterator[Fault]:
        """Yield all faults.

        Args:
            pool: the workers.
            decoded: what is known of image files already, by path; filled here.

        Raises:
            DatasetError: if the json is missing or no json.
        """
        opened = yield from check_lists(self.json, self.image_root, pool, decoded)
        if not opened:
            return
        content, images = opened
        yield from self._check_annotations(content, images, pool)

    def _check_annotations(
        self, content: dict[str, Any], images: Images, pool: Pool
    ) -> Iterator[Fault]:
        annotations, fault = content["annotations"], partial(_fault, self.json, images)
        sound, tasks = [], []
        for index, annotation in enumerate(annotations):
            problem = _malformed(annotation)
            if problem:
                yield fault("annotation malformed", index, annotation, problem)
                continue
            sound.append(index)
            image_id = annotation["image_id"]
            if annotation["id"] == 0:
                yield fault("annotation id is 0", index, annotation, "AP counts its match as none")
            if image_id in images.by_id:
                tasks.append((index, annotation, images.sizes[image_id]))
            elif images.lacks(image_id):
                detail = f"image_id={image_id} is not among the images"
                yield fault("annotation of unknown image", index, annotation, detail)
        for position in repeated(annotations[index]["id"] for index in sound):
            index = sound[position]
            yield fault("annotation id twice", index, annotations[index], "an earlier one has it")
        check = partial(_check_task, expected=self._expected(content))
        for (index, annotation, _), findings in zip(
            tasks, pool.map(check, tasks, f"Annotations of {_name(self.json)}", 512), strict=True
        ):
            for reason, detail in findings:
                yield fault(reason, index, annotation, detail)

    def _expected(self, content: dict[str, Any]) -> Expected:
        categories = [c for c in content["categories"] if _is_category(c)]
        known = self.known_ids or frozenset(category["id"] for category in categories)
        keypoints = {c["id"]: len(c["keypoints"]) for c in categories if c.get("keypoints")}
        masks = self.masks
        if masks is None:
            masks = any(
                isinstance(a, dict) and a.get("segmentation") for a in content["annotations"]
            )
        return Expected(known, keypoints, masks, self.area)


def _check_task(
    task: tuple[int, dict[str, Any], Sequence[Size]], expected: Expected
) -> list[Finding]:
    _, annotation, sizes = task
    return list(check_instance(annotation, sizes, expected))


def _malformed(annotation: object) -> str:
    lacking = lacking_keys(annotation, INSTANCE_KEYS)
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    wrong = [key for key in ("id", "image_id", "category_id") if not is_id(annotation[key])]
    return ", ".join(f"{key}={annotation[key]!r}" for key in wrong)


def _fault(
    path: str, images: Images, reason: str, index: int, annotation: object, detail: str
) -> Fault:
    values = annotation if isinstance(annotation, Mapping) else {}
    image_id = values.get("image_id")
    file = images.file(image_id) if is_id(image_id) else ""
    return Fault(reason, path, ("annotations", index), file, image_id, values.get("id"), detail)


def _name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


# Both kinds of json -----------------------------------------------------------------------------


def check_lists(
    path: str, image_root: str | None, pool: Pool, decoded: dict[str, Decoded]
) -> Generator[Fault, None, tuple[dict[str, Any], Images] | None]:
    """Yield the faults of a json's categories and images; return its content and its images.

    Args:
        path: the json.
        image_root: folder of the files; None to take the json's word for them.
        pool: the workers.
        decoded: what is known of image files already, by path; filled here.

    Raises:
        DatasetError: if the json is missing or no json.
    """
    content = read_json(path)
    problem = _unusable(content)
    if problem:
        yield Fault("json unusable", path, detail=problem)
        return None
    yield from _check_categories(content["categories"], path)
    images = Images(path, content["images"], image_root, decoded)
    yield from images.check(pool)
    return content, images


def _unusable(content: Mapping[str, Any]) -> str:
    """Say what a json lacks of its three lists; nothing if they are there."""
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content.get(key), list)
    ]
    if missing:
        return f"no list {', '.join(missing)} among its keys: {', '.join(content) or 'none'}"
    return "" if content["images"] else "it lists no image"


def _check_categories(categories: Sequence[Any], path: str) -> Iterator[Fault]:
    """Yield what is wrong with the categories of a json."""
    sound = []
    for index, category in enumerate(categories):
        if _is_category(category):
            sound.append((index, category))
        else:
            detail = f"{category!r} has no id or no name"
            yield Fault("category malformed", path, ("categories", index), detail=detail)
    for key in ("id", "name"):
        for position in repeated(category[key] for _, category in sound):
            index, category = sound[position]
            detail = f"id={category['id']}, name={category['name']!r}"
            yield Fault(f"category {key} twice", path, ("categories", index), detail=detail)


def _is_category(category: object) -> bool:
    return (
        not lacking_keys(category, {"id", "name"})
        and is_id(category["id"])
        and isinstance(category["name"], str)
    )
