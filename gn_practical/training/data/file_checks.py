"""Checks that the files of a data set are there."""

import os
from collections.abc import Iterable

from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata

from gn_practical.training.data.entries import missing_files
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.registration import DATASETS_ROOT

_FILES = {  # metadata keys, with what they are
    "image_root": "folder of images",
    "json_file": "instances json",
    "panoptic_json": "panoptic json",
    "panoptic_root": "folder of panoptic PNGs",
    "sem_seg_root": "folder of stuff PNGs",
}


def check_files_exist(name: str) -> None:
    """Check that the jsons and folders of a data set are there.

    Raises:
        DatasetError: with the first that is not, and where to get it.
    """
    metadata = MetadataCatalog.get(name)
    for key, what in _FILES.items():
        path = metadata.get(key)
        if path is None or "://" in str(path):
            continue
        path = os.fspath(path)
        is_there = os.path.isfile(path) if "json" in key else os.path.isdir(path)
        if not is_there:
            raise DatasetError(
                f"The {what} of data set {name!r} must exist, got {os.path.abspath(path)}. "
                + way_out(key, path, metadata)
            )


def way_out(key: str, path: str, metadata: Metadata) -> str:
    """Say what to do about a path that is missing.

    Args:
        key: of the metadata, which tells what kind of file it is.
        path: what is missing.
        metadata: of the data set.
    """
    coco = os.path.join(DATASETS_ROOT, "coco")
    in_coco = path.startswith(coco + os.sep)
    if key == "sem_seg_root":
        command = "python tools/prepare_panoptic_coco.py"
        if not in_coco:
            command += (
                f" --panoptic-json {metadata.panoptic_json}"
                f" --panoptic-root {metadata.panoptic_root} --output {path}"
            )
        return f"Run: {command}"
    archive = os.path.join(coco, "annotations", os.path.basename(path) + ".zip")
    if key == "panoptic_root" and in_coco and os.path.isfile(archive):
        return f"Run: unzip -q {archive} -d {coco}"
    if not path.startswith(os.path.join(DATASETS_ROOT, "")):
        return "Check its path in the config."
    source = "Download COCO from cocodataset.org and unpack it there, or set" if in_coco else "Set"
    state = "as it is set" if "DETECTRON2_DATASETS" in os.environ else "it is not set"
    return (
        f"{source} the environment variable DETECTRON2_DATASETS to the folder of your data sets "
        f"({state}, the folder is {os.path.abspath(DATASETS_ROOT)})."
    )


def check_listed_files(root: str, names: Iterable[str], source: str, way_out: str) -> None:
    """Check that all files that a json lists are in a folder.

    Args:
        root: the folder.
        names: the files, relative to it.
        source: the json.
        way_out: what to do about it.

    Raises:
        DatasetError: with the first that are missing.
    """
    names = set(names)
    missing = missing_files(root, names)
    if missing:
        raise DatasetError(
            f"All {len(names)} files that {source} lists must be in {root}, got {len(missing)} "
            f"missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. {way_out}"
        )
