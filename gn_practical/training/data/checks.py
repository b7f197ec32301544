"""Checks of a run's data sets before the model is built: what is missing, and what to run."""

import difflib
import os
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm

from gn_practical.training.data.dataset_check import DatasetCheck
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.file_checks import check_files_exist
from gn_practical.training.data.registration import SCENES_ROOT
from gn_practical.training.data.scenes import ensure_scenes


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check the data sets that a run will use; make the embedded scenes if it uses them.

    Checked for every name of ``DATASETS.TRAIN`` and ``DATASETS.TEST``: it is registered, its
    files exist, all images and PNGs that its jsons list are there, annotations use only known
    categories, the numbers of classes are those of the model, masks can be read as
    ``INPUT.MASK_FORMAT`` says, and all sets of the run have the same classes. Each json is read
    once. In a distributed run every rank must call this; one rank of each machine reads.

    Args:
        cfg: the complete config of the run.
        eval_only: check ``DATASETS.TEST`` alone.

    Raises:
        DatasetError: on all ranks, with what is wrong and what to do.

    Example:
        >>> check_datasets(cfg)  # doctest: +SKIP
    """
    train = () if eval_only else tuple(cfg.DATASETS.TRAIN)
    names = list(dict.fromkeys((*train, *cfg.DATASETS.TEST)))
    if not (cfg.DATASETS.TEST if eval_only else train):
        key = "TEST" if eval_only else "TRAIN"
        raise DatasetError(
            f"DATASETS.{key} must name at least one data set, got (). "
            f"""For example: DATASETS.{key} "('scenes_train_panoptic_separated',)"."""
        )
    ensure_registered(names)
    problem = None
    if comm.get_local_rank() == 0:
        try:
            _check_all(cfg, names, train)
        except DatasetError as error:
            problem = str(error)
    # A barrier that also tells: a rank that raised alone would leave the others waiting.
    problems = [text for text in comm.all_gather(problem) if text]
    if problems:
        raise DatasetError(problems[0])


def ensure_registered(names: Iterable[str]) -> None:
    """Check that data sets are registered; make the embedded scenes if they are among them.

    Args:
        names: of the data sets.

    Raises:
        DatasetError: if one is not, with the names close to it.

    Example:
        >>> ensure_registered(["coco_2017_vall"])
        Traceback (most recent call last):
        gn_practical.training.data.errors.DatasetError: A data set must be registered, got ...
    """
    names = list(names)
    for name in names:
        _check_registered(name)
    if any(_lies_in_scenes(MetadataCatalog.get(name)) for name in names):
        ensure_scenes(SCENES_ROOT)


def _check_registered(name: str) -> None:
    if name in DatasetCatalog:
        return
    known = DatasetCatalog.list()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if f"{name}_separated" in known:
        close = [f"{name}_separated"]
    raise DatasetError(
        f"A data set must be registered, got {name!r}. "
        + (f"Names close to it: {', '.join(close)}. " if close else "")
        + "Your own data is registered with DATASETS.COCO_INSTANCES or DATASETS.COCO_PANOPTIC."
    )


def _lies_in_scenes(metadata: Metadata) -> bool:
    return os.path.dirname(metadata.get("image_root", "")) == os.path.join(SCENES_ROOT, "images")


def _check_all(cfg: CfgNode, names: list[str], train: Sequence[str]) -> None:
    for name in names:
        check_files_exist(name)
    for name in names:
        DatasetCheck(cfg, name, name in train).run()
    _check_same_classes(names)


def _check_same_classes(names: list[str]) -> None:
    """Check that the sets of one run name the same classes in the same order."""
    for attribute in ("thing_classes", "stuff_classes"):
        known = {n: MetadataCatalog.get(n).get(attribute) for n in names}
        known = {name: classes for name, classes in known.items() if classes is not None}
        for name, classes in known.items():
            first = next(iter(known))
            if classes != known[first]:
                raise DatasetError(
                    f"All data sets of a run must have the same {attribute.replace('_', ' ')}, got "
                    f"{len(known[first])} in {first!r} and {len(classes)} in {name!r}; they differ "
                    f"in {_first_difference(known[first], classes)}. List the same categories in "
                    "both jsons."
                )


def _first_difference(first: list[str], second: list[str]) -> str:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return f"class {index}: {a!r} and {b!r}"
    return f"the classes from number {min(len(first), len(second))} on"
