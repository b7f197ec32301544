"""The embedded data set: drawn scenes in COCO's panoptic format, made when first needed."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils import comm
from iopath.common.file_io import file_lock
from PIL import Image
from tqdm import tqdm

from gn_practical.training.data.coco_format import VOID, id_to_rgb, mask_annotation, mask_box
from gn_practical.training.data.drawing import STUFF_CLASSES, THING_CLASSES, Segment, draw_scene
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.ranks import raise_on_all_ranks

IMAGE_SIZE = 128
NUM_IMAGES = {"train": 400, "val": 100}

_VERSION = 2  # raise it with every change of what is drawn: older files are then made anew
_SEED = 20230203
_BYTES_PER_PIXEL = 1.35  # of all files, as a file system stores them
_ID_STEP = 70_001  # segment ids are multiples of it, so that they use all three channels of a PNG
_COLOURS = {
    **{"disc": (220, 20, 60), "box": (0, 130, 200), "triangle": (245, 130, 48)},
    **{"star": (255, 225, 25), "ring": (145, 30, 180)},
    **{"sky": (135, 190, 235), "grass": (70, 150, 60), "water": (30, 70, 140)},
    **{"sand": (220, 200, 150)},
}

CATEGORIES = [
    {"id": index, "name": name, "isthing": int(name in THING_CLASSES), "color": _COLOURS[name]}
    for index, name in enumerate(THING_CLASSES + STUFF_CLASSES, start=1)
]


def ensure_scenes(
    root: str | os.PathLike, num_images: dict[str, int] | None = None, size: int = IMAGE_SIZE
) -> None:
    """Make the scenes under `root`, unless they are there, whole and of this version.

    The files are written to a folder beside `root` that takes its name when it is whole. In a
    distributed run every rank must call this; one rank of each machine draws, the others wait.
    ``num_images`` are of each split, ``size`` is the side of the square images in pixels.

    Raises:
        DatasetError: if `root` cannot be written; on all ranks.
    """
    with raise_on_all_ranks(DatasetError):
        if comm.get_local_rank() == 0:
            try:
                _ensure_scenes(Path(root), num_images or NUM_IMAGES, size)
            except OSError as error:
                raise DatasetError(
                    f"The embedded data set must be written to {Path(root).absolute()}, got: "
                    f"{error}. Set the environment variable DETECTRON2_DATASETS to a folder that "
                    "can be written."
                ) from None


def _ensure_scenes(root: Path, num_images: dict[str, int], size: int) -> None:
    wanted = {"version": _VERSION, "num_images": num_images, "size": size}
    if _is_whole(root, wanted):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(root)):  # other runs on this machine may start at the same moment
        if _is_whole(root, wanted):
            return
        unfinished = root.with_name(root.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        count = sum(num_images.values())
        logging.getLogger(__name__).info(
            "Drawing the embedded data set, %d images, about %.0f MB, into %s. The environment "
            "variable DETECTRON2_DATASETS names another folder.",
            *(count, count * _BYTES_PER_PIXEL * size**2 / 1e6, root.absolute()),
        )
        _write_scenes(unfinished, num_images, size)
        paths = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
        files = {str(path.relative_to(unfinished)): path.stat().st_size for path in paths}
        (unfinished / "version.json").write_text(json.dumps({**wanted, "files": files}))
        _replace(root, unfinished)


def _replace(root: Path, new: Path) -> None:
    """Give `new` the name `root`; an older data set of ours is removed, nothing else."""
    old = root.with_name(root.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if root.exists():
        foreign = {path.name for path in root.iterdir()} - {path.name for path in new.iterdir()}
        if foreign:
            raise FileExistsError(
                f"the folder holds something else, the first is {min(foreign)!r}; move it away"
            )
        root.rename(old)
    new.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def _is_whole(root: Path, wanted: dict[str, Any]) -> bool:
    """Whether the version file is the wanted one and all files have the sizes it lists."""
    try:
        found = json.loads((root / "version.json").read_text())
        files = found.pop("files")
        sizes_agree = all((root / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return sizes_agree and found == wanted


def _write_scenes(root: Path, num_images: dict[str, int], size: int) -> None:
    total, kinds = sum(num_images.values()), ("images/", "panoptic_", "panoptic_stuff_")
    with tqdm(total=total, desc="Drawing the scenes", unit="image", disable=None) as progress:
        for split_index, (split, count) in enumerate(num_images.items()):
            folders = [root / f"{kind}{split}" for kind in kinds]
            for folder in folders:
                folder.mkdir(parents=True)
            images, panoptic, instances = [], [], []
            for number in range(1, count + 1):
                # A seed of its own for every image: no image depends on how many there are.
                rng = np.random.default_rng([_SEED, split_index, number - 1])
                pixels, segments = draw_scene(rng, size)
                name = f"{number:06d}.jpg"
                images.append({"id": number, "file_name": name, "width": size, "height": size})
                panoptic.append(_write_image(folders, number, pixels, segments))
                for thing in (segment for segment in segments if segment.is_thing):
                    ids = {"id": len(instances) + 1, "image_id": number}
                    instances.append({**ids, **_describe(thing), **mask_annotation(thing.mask)})
                progress.update()
            things = [category for category in CATEGORIES if category["isthing"]]
            lists = {"panoptic": (panoptic, CATEGORIES), "instances": (instances, things)}
            for name, (annotations, categories) in lists.items():
                content = {"images": images, "annotations": annotations, "categories": categories}
                (root / f"{name}_{split}.json").write_text(json.dumps(content))


def _write_image(
    folders: list[Path], number: int, pixels: np.ndarray, segments: list[Segment]
) -> dict[str, Any]:
    """Write the three files of an image; return its panoptic annotation."""
    ids = np.zeros(pixels.shape[:2], np.uint32)
    labels = np.full(pixels.shape[:2], VOID, np.uint8)
    infos = []
    for position, segment in enumerate(segments, start=1):
        ids[segment.mask] = position * _ID_STEP
        labels[segment.mask] = 0 if segment.is_thing else segment.class_index + 1
        infos.append({"id": position * _ID_STEP, **_describe(segment)})
    images, panoptic, stuff = (folder / f"{number:06d}" for folder in folders)
    Image.fromarray(pixels).save(images.with_suffix(".jpg"), quality=95)
    Image.fromarray(id_to_rgb(ids)).save(panoptic.with_suffix(".png"))
    Image.fromarray(labels).save(stuff.with_suffix(".png"))
    return {"image_id": number, "file_name": f"{number:06d}.png", "segments_info": infos}


def _describe(segment: Segment) -> dict[str, Any]:
    return {
        "category_id": 1 + segment.class_index + (0 if segment.is_thing else len(THING_CLASSES)),
        "area": int(segment.mask.sum()),
        "bbox": mask_box(segment.mask),
        "iscrowd": 0,
    }
