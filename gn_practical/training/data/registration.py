"""Registration in Detectron2's catalogs: the embedded scenes and a user's own COCO-format data."""

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import (
    load_coco_json,
    register_coco_instances,
    register_coco_panoptic_separated,
)

from gn_practical.training.data.coco_format import (
    instances_metadata,
    panoptic_metadata,
    read_categories,
    read_json,
)
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.scenes import CATEGORIES, ensure_scenes

# Read once, at import, as Detectron2 does for its own data sets: set DETECTRON2_DATASETS before.
DATASETS_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
SCENES_ROOT = os.path.join(DATASETS_ROOT, "scenes")


class CocoInstances(NamedTuple):
    """One entry of ``DATASETS.COCO_INSTANCES``."""

    name: str
    image_root: str
    instances_json: str


class CocoPanoptic(NamedTuple):
    """One entry of ``DATASETS.COCO_PANOPTIC``."""

    name: str
    image_root: str
    panoptic_root: str
    panoptic_json: str
    sem_seg_root: str
    instances_json: str


Definition = CocoInstances | CocoPanoptic

_registered: dict[str, Definition] = {}  # what this module registered, by the name in the catalog


def register_scenes() -> None:
    """Register the embedded scenes; draws nothing (`ensure_registered` does when they are used).

    Names: ``scenes_{train,val}`` for instances, ``scenes_{train,val}_panoptic_separated`` for a
    panoptic FPN and ``scenes_{train,val}_panoptic_stuffonly``, in the folder `SCENES_ROOT`.
    """
    things = [category for category in CATEGORIES if category["isthing"]]
    for split in ("train", "val"):
        parts = (
            *(f"images/{split}", f"panoptic_{split}", f"panoptic_{split}.json"),
            *(f"panoptic_stuff_{split}", f"instances_{split}.json"),
        )
        paths = (os.path.join(SCENES_ROOT, part) for part in parts)
        whole = CocoPanoptic(f"scenes_{split}_panoptic", *paths)
        instances = CocoInstances(f"scenes_{split}", whole.image_root, whole.instances_json)
        _register(whole, panoptic_metadata(CATEGORIES, whole.panoptic_json))
        _register(instances, instances_metadata(things))


def register_datasets(cfg: CfgNode) -> None:
    """Register the user's own data of ``DATASETS.COCO_INSTANCES`` and ``DATASETS.COCO_PANOPTIC``.

    Class names and contiguous ids come from each json's ``categories``, in the order of their ids,
    so that train and val of the same data agree. A panoptic entry is registered as
    ``<name>_separated`` and ``<name>_stuffonly``, as Detectron2 does. An entry may come again, in a
    later call. Where a json is missing the name is registered all the same, without classes: the
    check at a run's start reports it if the run uses it.

    Raises:
        DatasetError: if an entry is malformed, its json is, or its name is taken.
    """
    for entry in _entries(cfg, "COCO_INSTANCES", CocoInstances):
        _register(entry, _metadata(entry.instances_json, instances_metadata))
    for entry in _entries(cfg, "COCO_PANOPTIC", CocoPanoptic):
        path = entry.panoptic_json
        _register(entry, _metadata(path, partial(panoptic_metadata, path=path)))


def ensure_registered(names: Iterable[str]) -> None:
    """Check that data sets are registered; make the embedded scenes if they are among them.

    Raises:
        DatasetError: if one is not, with the names close to it.
    """
    names = list(names)
    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            close = [f"{name}_separated"] if f"{name}_separated" in known else close
            hint = f"Names close to it: {', '.join(close)}. " if close else ""
            raise DatasetError(
                f"A data set must be registered, got {name!r}. {hint}Your own data is registered "
                "with DATASETS.COCO_INSTANCES or DATASETS.COCO_PANOPTIC."
            )
    scenes = os.path.join(SCENES_ROOT, "images")
    if any(os.path.dirname(MetadataCatalog.get(n).get("image_root", "")) == scenes for n in names):
        ensure_scenes(SCENES_ROOT)


def _metadata(path: str, make: Callable[[list], dict[str, Any]]) -> dict[str, Any]:
    return make(read_categories(path)) if os.path.isfile(path) else {}


def _entries(cfg: CfgNode, key: str, form: type[Definition]) -> list[Definition]:
    entries = cfg.DATASETS[key]
    expected = f"(({', '.join(form._fields)}),)"
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise DatasetError(
            f"DATASETS.{key} must be a list of entries, got {entries!r}. Write {expected}."
        )
    for entry in entries:
        is_list = isinstance(entry, Sequence) and not isinstance(entry, str)
        are_texts = is_list and all(isinstance(value, str) and value for value in entry)
        if not are_texts or len(entry) != len(form._fields):
            raise DatasetError(
                f"Each entry of DATASETS.{key} must be {len(form._fields)} texts "
                f"({', '.join(form._fields)}), got {entry!r}. "
                f"Write {expected}, with the comma that ends a single entry."
            )
    return [form(name, *map(_absolute, paths)) for name, *paths in entries]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _register(entry: Definition, metadata: dict[str, Any]) -> None:
    """Register an entry unless it is, and set its metadata; raise if its name is taken."""
    is_panoptic = isinstance(entry, CocoPanoptic)
    names = [entry.name + end for end in (("_separated", "_stuffonly") if is_panoptic else ("",))]
    for name in names:
        if name in DatasetCatalog and _registered.get(name) != entry:
            known = f" as {tuple(_registered[name])}" if name in _registered else ""
            raise DatasetError(
                f"A data set's name must be free, got {name!r}, which is registered already"
                f"{known}. Choose another name."
            )
    if names[0] not in DatasetCatalog:
        if is_panoptic:
            register_coco_panoptic_separated(entry.name, {}, *entry[1:])
            # Detectron2's loader takes .jpg images only, demands equal categories in both jsons and
            # leaves out the panoptic annotation.
            DatasetCatalog[names[0]] = partial(load_panoptic, entry)
            DatasetCatalog[names[1]] = partial(load_panoptic, entry, stuff_only=True)
        else:
            register_coco_instances(entry.name, {}, entry.instances_json, entry.image_root)
        _registered.update(dict.fromkeys(names, entry))
    for name in names:
        MetadataCatalog.get(name).set(**metadata)


def load_panoptic(entry: CocoPanoptic, stuff_only: bool = False) -> list[dict[str, Any]]:
    """Load a panoptic data set: one dict an image of the panoptic json, sorted by image id.

    The keys are those of Detectron2's "separated" form (file_name, height, width, image_id,
    annotations, sem_seg_file_name) and, as in its plain panoptic form, pan_seg_file_name and
    segments_info. Category ids are contiguous. ``stuff_only`` leaves out annotations and segments,
    as Detectron2's "stuffonly" form does.
    """
    content, instances = read_json(entry.panoptic_json), {}
    images = {image["id"]: image for image in content["images"]}
    if not stuff_only:
        metadata = MetadataCatalog.get(f"{entry.name}_separated")
        things = metadata.thing_dataset_id_to_contiguous_id
        loaded = load_coco_json(entry.instances_json, entry.image_root)
        instances = {record["image_id"]: record["annotations"] for record in loaded}
    records = []
    for annotation in sorted(content["annotations"], key=lambda a: a["image_id"]):
        image, png = images[annotation["image_id"]], annotation["file_name"]
        record = {
            "file_name": os.path.join(entry.image_root, image["file_name"]),
            "sem_seg_file_name": os.path.join(entry.sem_seg_root, png),
            **{"image_id": image["id"], "height": image["height"], "width": image["width"]},
        }
        if not stuff_only:
            annotations = instances.get(image["id"], [])
            for instance in annotations:
                instance["category_id"] = things[instance["category_id"]]
            segments = [contiguous(segment, metadata) for segment in annotation["segments_info"]]
            record["pan_seg_file_name"] = os.path.join(entry.panoptic_root, png)
            record |= {"segments_info": segments, "annotations": annotations}
        records.append(record)
    return records


def contiguous(segment: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Return a segment of a panoptic json with its contiguous class, and whether it is a thing."""
    things = metadata.thing_dataset_id_to_contiguous_id
    is_thing = segment["category_id"] in things
    ids = things if is_thing else metadata.stuff_dataset_id_to_contiguous_id
    return {**segment, "category_id": ids[segment["category_id"]], "isthing": is_thing}
