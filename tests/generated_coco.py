"""Random data sets in COCO's formats: instances and panoptic annotations of the same images.

`coco_sets` draws them: ids of all kinds and sizes, names that collide but for folder or suffix,
crowds, void, classes that nothing belongs to, a stuff category with id 0, fractional areas. With
``odd=True`` some have one of `ODDITIES` besides, which no run can take as it is.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from hypothesis import strategies as st
from PIL import Image

# What a set may have that has to be told at the start, in one clear error.
ODDITIES = (
    "instances json lists another image",
    "panoptic json lists another image",
    "image without panoptic annotation",
    "ids of mixed kinds",
    "category id is a text",
    "isthing missing",
    "width is a float",
    "NUL in a file name",
    "keypoints are a number",
    "box is a text",
    "annotation id twice",
    "image id twice",
    "category unknown",
)

_INTEGERS = {
    "small": st.integers(1, 99),
    "from 0": st.integers(0, 9),
    "negative": st.integers(-99, 9),
    "beyond doubles": st.integers(2**53 - 2, 2**53 + 9),
    "beyond 64 bits": st.integers(2**63 - 2, 2**64 + 9),
    "very large": st.integers(10**30, 10**30 + 99),
}
_TEXTS = {
    "digits": st.integers(0, 99).map(str),
    "words": st.sampled_from(["aachen_000_019", "b", "B", "ü", "a b", "", "x/y", "1.0", "-1"]),
}
_NAMES = ("a.jpg", "a.png", "b/a.jpg", "b/a.png", "c d.jpg", "ü.png", "a.b.jpg", "A.jpeg")


class Files(NamedTuple):
    """Where a set was written."""

    image_root: Path
    panoptic_root: Path
    panoptic_json: Path
    sem_seg_root: Path
    instances_json: Path


@dataclass
class CocoSet:
    """One data set.

    Attributes:
        images: the entries of both jsons.
        instances: content of the instances json; its categories are the things.
        panoptic: content of the panoptic json.
        id_maps: segment ids of every pixel, by the file name of the panoptic PNG.
        oddity: one of `ODDITIES` or empty.
    """

    images: list[dict[str, Any]]
    instances: dict[str, Any]
    panoptic: dict[str, Any]
    id_maps: dict[str, np.ndarray] = field(repr=False)
    oddity: str = ""

    def write(self, folder: Path) -> Files:
        """Write images, jsons and PNGs; stuff PNGs as Detectron2's prepare_panoptic_fpn.py."""
        folder = Path(folder)
        files = Files(*(folder / name for name in ("images", "pan", "p.json", "stuff", "i.json")))
        files.image_root.mkdir(parents=True)
        for image in self.images:
            if "\0" not in image["file_name"]:
                size = (int(image["width"]), int(image["height"]))
                _save(Image.new("RGB", size), files.image_root / image["file_name"])
        for annotation in self.panoptic["annotations"]:
            ids = self.id_maps[annotation["file_name"]]
            rgb = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
            _save(Image.fromarray(rgb), files.panoptic_root / annotation["file_name"])
            stuff = Image.fromarray(self.stuff_labels(annotation))
            _save(stuff, files.sem_seg_root / annotation["file_name"])
        files.instances_json.write_text(json.dumps(self.instances))
        files.panoptic_json.write_text(json.dumps(self.panoptic))
        return files

    def stuff_labels(self, annotation: dict[str, Any]) -> np.ndarray:
        """Return the stuff label of every pixel: 0 for things, 1.. for stuff, 255 for void."""
        stuff = [c["id"] for c in self.panoptic["categories"] if not c.get("isthing")]
        labels = {key: index for index, key in enumerate(sorted(stuff, key=repr_key), start=1)}
        ids = self.id_maps[annotation["file_name"]]
        result = np.full(ids.shape, 255, np.uint8)
        for segment in annotation["segments_info"]:
            result[ids == segment["id"]] = labels.get(segment["category_id"], 0)
        return result


def repr_key(value: object) -> tuple[bool, object]:
    """Sort numbers before texts."""
    return isinstance(value, str), value


@st.composite
def coco_sets(draw: st.DrawFn, odd: bool | str = False, max_images: int = 4) -> CocoSet:
    """Draw a data set.

    Args:
        draw: hypothesis's.
        odd: whether the set may have one of `ODDITIES`, or the one that it has.
        max_images: at most so many images.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, max_images))
    image_ids = draw(_ids(count, texts=True))
    names = draw(st.permutations(_NAMES))
    images = [
        {
            "id": key,
            "file_name": name,
            "height": draw(st.integers(1, 24)),
            "width": draw(st.integers(1, 24)),
        }
        for key, name in zip(image_ids, names, strict=False)
    ]
    categories = draw(_categories())
    fractional = draw(st.booleans())
    panoptic, id_maps = [], {}
    for number, image in enumerate(images):
        name = f"{draw(st.sampled_from(['', 'sub/']))}{number}.png"
        ids, segments = _draw_segments(rng, image, categories, fractional)
        id_maps[name] = ids
        panoptic.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    instances = _draw_instances(rng, images, panoptic, id_maps, categories, fractional)
    for annotation, key in zip(instances, draw(_ids(len(instances), texts=True)), strict=True):
        annotation["id"] = key
    things = [dict(c) for c in categories if c["isthing"]]
    result = CocoSet(
        images,
        {"images": images, "annotations": instances, "categories": things},
        {"images": images, "annotations": panoptic, "categories": categories},
        id_maps,
    )
    if odd:
        choice = st.sampled_from(("", *ODDITIES)) if odd is True else st.just(odd)
        result.oddity = draw(choice)
        _make_odd(result, draw)
    return result


def _ids(count: int, texts: bool = False) -> st.SearchStrategy[list]:
    kinds = {**_INTEGERS, **(_TEXTS if texts else {})}
    large_enough = [name for name in kinds if count <= 9 or name in ("small", "digits")]
    return st.sampled_from(large_enough).flatmap(
        lambda kind: st.lists(kinds[kind], min_size=count, max_size=count, unique=True)
    )


@st.composite
def _categories(draw: st.DrawFn) -> list[dict[str, Any]]:
    num_things, num_stuff = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ids = draw(_ids(num_things + num_stuff))
    return [
        {
            "id": key,
            "name": f"class {number}",
            "isthing": int(number < num_things),
            **draw(st.sampled_from([{}, {"color": [9, 9, 200]}, {"color": "#ff0000"}])),
        }
        for number, key in enumerate(ids)
    ]


def _draw_segments(
    rng: np.random.Generator, image: dict, categories: list[dict], fractional: bool
) -> tuple[np.ndarray, list[dict]]:
    """Cut an image into rectangles over each other: segments and void."""
    height, width = image["height"], image["width"]
    ids = np.zeros((height, width), np.uint32)
    numbers = rng.choice(2**24 - 1, rng.integers(0, 6), replace=False) + 1
    for number in numbers:
        ids[_rectangle(rng, height, width)] = number
    segments = []
    for number in np.unique(ids[ids > 0]).tolist():
        category = categories[rng.integers(len(categories))]
        area = int((ids == number).sum())
        segments.append(
            {
                "id": number,
                "category_id": category["id"],
                "area": float(area) if fractional else area,
                "bbox": _box(ids == number),
                "iscrowd": int(category["isthing"] and rng.random() < 0.2),
            }
        )
    return ids, segments


def _rectangle(rng: np.random.Generator, height: int, width: int) -> tuple[slice, slice]:
    top, left = rng.integers(height), rng.integers(width)
    bottom, right = rng.integers(top, height) + 1, rng.integers(left, width) + 1
    return slice(top, bottom), slice(left, right)


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    size = [int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1]
    return [int(columns[0]), int(rows[0]), *size]


def _draw_instances(
    rng: np.random.Generator,
    images: list[dict],
    panoptic: list[dict],
    id_maps: dict[str, np.ndarray],
    categories: list[dict],
    fractional: bool,
) -> list[dict]:
    """Make the instances of the thing segments, as polygons or RLE; the caller numbers them."""
    things = {category["id"] for category in categories if category["isthing"]}
    instances = []
    for image, annotation in zip(images, panoptic, strict=True):
        for segment in annotation["segments_info"]:
            if segment["category_id"] not in things or rng.random() < 0.1:
                continue
            mask = id_maps[annotation["file_name"]] == segment["id"]
            area = int(mask.sum())
            instances.append(
                {
                    "id": None,
                    "image_id": image["id"],
                    "category_id": segment["category_id"],
                    "bbox": [float(x) for x in segment["bbox"]] if fractional else segment["bbox"],
                    "area": area + 0.25 if fractional else area,
                    "iscrowd": segment["iscrowd"],
                    "segmentation": _segmentation(rng, mask),
                }
            )
    return instances


def _segmentation(rng: np.random.Generator, mask: np.ndarray) -> dict | list:
    if rng.random() < 0.3 and mask.all(axis=None):
        height, width = mask.shape
        return [[0, 0, width, 0, width, height, 0, height]]
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    size = list(mask.shape)
    if rng.random() < 0.5:
        return {"size": size, "counts": rle["counts"].decode("ascii")}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=0))
    return {"size": size, "counts": np.diff(edges, prepend=0, append=flat.size).tolist()}


def _make_odd(data: CocoSet, draw: st.DrawFn) -> None:
    """Plant the oddity; forget it where the set has no place for it."""
    oddity, annotations = data.oddity, data.instances["annotations"]
    extra = {"id": _another(data), "file_name": "extra.jpg", "width": 4, "height": 4}
    if oddity == "instances json lists another image":
        data.instances["images"] = [*data.images, extra]
    elif oddity == "panoptic json lists another image":
        data.panoptic["images"] = [*data.images, extra]
        png = {"image_id": extra["id"], "file_name": "extra.png", "segments_info": []}
        data.panoptic["annotations"].append(png)
        data.id_maps["extra.png"] = np.zeros((4, 4), np.uint32)
    elif oddity == "image without panoptic annotation":
        data.panoptic["annotations"].pop()
    elif oddity == "ids of mixed kinds":
        both = {**extra, "id": 7 if isinstance(data.images[0]["id"], str) else "seven"}
        data.images.append(both)
        png = {"image_id": both["id"], "file_name": "extra.png", "segments_info": []}
        data.panoptic["annotations"].append(png)
        data.id_maps["extra.png"] = np.zeros((4, 4), np.uint32)
    elif oddity == "category id is a text":
        _replace_category(data, draw(st.sampled_from(["1", "car", ""])))
    elif oddity == "isthing missing":
        del data.panoptic["categories"][0]["isthing"]
    elif oddity == "width is a float":
        data.images[0]["width"] = float(data.images[0]["width"])
    elif oddity == "NUL in a file name":
        data.images[0]["file_name"] = "a\0.jpg"
    elif oddity == "image id twice":
        data.images.append({**data.images[0], "file_name": "extra.jpg"})
    elif not annotations:
        data.oddity = ""
    elif oddity == "keypoints are a number":
        annotations[0]["keypoints"] = 17
    elif oddity == "box is a text":
        annotations[0]["bbox"] = "0 0 1 1"
    elif oddity == "annotation id twice":
        annotations.append(dict(annotations[0]))
    elif oddity == "category unknown":
        annotations[0]["category_id"] = 10**9 + 7


def _another(data: CocoSet) -> int | str:
    """Return an image id of the same kind that no image has."""
    ids = [image["id"] for image in data.images]
    return "".join(ids) + "+" if isinstance(ids[0], str) else max(ids) + 1


def _replace_category(data: CocoSet, key: str) -> None:
    old = data.panoptic["categories"][0]["id"]
    for content in (data.instances, data.panoptic):
        for category in content["categories"]:
            category["id"] = key if category["id"] == old else category["id"]
    segments = [s for a in data.panoptic["annotations"] for s in a["segments_info"]]
    for entry in (*data.instances["annotations"], *segments):
        entry["category_id"] = key if entry["category_id"] == old else entry["category_id"]


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
