"""The check at the start of a run: the validator on its data sets, without decoding a file."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils import comm

from gn_practical.training.architectures import architecture
from gn_practical.training.config.node import look_up
from gn_practical.training.data.coco_format import read_categories
from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.registration import DATASETS_ROOT, ensure_registered
from gn_practical.training.ranks import raise_on_all_ranks
from gn_practical.training.validation.coco import Session
from gn_practical.training.validation.findings import STOPPING
from gn_practical.training.validation.report import Report, describe
from gn_practical.training.validation.targets import RecordsTarget, targets_of

_PATHS = {  # metadata keys, with what they are
    "image_root": "folder of images",
    "json_file": "instances json",
    "panoptic_json": "panoptic json",
    "panoptic_root": "folder of panoptic PNGs",
    "sem_seg_root": "folder of stuff PNGs",
}


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check the data sets that a run will use; make the embedded scenes if it uses them.

    Every name of ``DATASETS.TRAIN`` and ``DATASETS.TEST`` must be registered, its files must be
    there, its jsons must pass the validator's rules as far as they decide whether the run works
    (`STOPPING`; what is found besides is logged), and its classes must be those of the model and of
    the other sets. In a distributed run every rank must call this; one of each machine reads.

    Args:
        cfg: the complete config of the run.
        eval_only: check ``DATASETS.TEST`` alone.

    Raises:
        DatasetError: on all ranks, with all that is wrong and what to do.
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
    with raise_on_all_ranks(DatasetError):
        if comm.get_local_rank() == 0:
            problems = list(_problems(cfg, names))
            if len(problems) == 1:
                raise DatasetError(problems[0])
            if problems:
                listed = "".join(f"\n  {number}. {p}" for number, p in enumerate(problems, start=1))
                raise DatasetError(f"The data must be sound, got {len(problems)} errors:{listed}")


def _problems(cfg: CfgNode, names: Sequence[str]) -> Iterator[str]:
    there = []
    for name in names:
        if missing := list(_missing_paths(MetadataCatalog.get(name))):
            yield from missing
            continue
        there.append(name)
        needs_stuff = cfg.MODEL.META_ARCHITECTURE == "PanopticFPN"
        if needs_stuff and not MetadataCatalog.get(name).get("sem_seg_root"):
            yield (
                f"Data sets of a PanopticFPN must have stuff labels, got {name!r}. Take one whose "
                "name ends in '_panoptic_separated', or register yours with "
                "DATASETS.COCO_PANOPTIC."
            )
    yield from _check_num_classes(cfg, there)
    yield from _validate(cfg, there)
    yield from _check_same_classes(there)


def _missing_paths(metadata: Metadata) -> Iterator[str]:
    for key, what in _PATHS.items():
        path = metadata.get(key)
        if path is None or "://" in str(path):
            continue
        is_there = os.path.isfile if "json" in key else os.path.isdir
        if not is_there(path):
            yield (
                f"The {what} of data set {metadata.name!r} must exist, got "
                f"{os.path.abspath(path)}. {_how_to_get(key, os.fspath(path), metadata)}"
            )


def _how_to_get(key: str, path: str, metadata: Metadata) -> str:
    """Say what to do about a path that is missing."""
    coco = os.path.join(DATASETS_ROOT, "coco")
    in_coco = path.startswith(coco + os.sep)
    if key == "sem_seg_root":
        return f"Run: {_prepare_command(metadata)}"
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


def _prepare_command(metadata: Metadata) -> str:
    command, output = "python tools/prepare_panoptic_coco.py", metadata.sem_seg_root
    if output.startswith(os.path.join(DATASETS_ROOT, "coco", "")):
        return command
    sources = f"--panoptic-json {metadata.panoptic_json} --panoptic-root {metadata.panoptic_root}"
    return f"{command} {sources} --output {output}"


def _check_num_classes(cfg: CfgNode, names: Sequence[str]) -> Iterator[str]:
    """Yield each key of the model that is not the number of classes of the first set to differ."""
    expected = architecture(cfg.MODEL.META_ARCHITECTURE)
    for key, attribute, what in (
        (expected.things, "thing_classes", "thing classes"),
        (expected.stuff, "stuff_classes", "stuff classes ('things' included)"),
    ):
        for name in names if key else ():
            classes, value = _classes(name, attribute), look_up(cfg, key)
            if classes is not None and value != len(classes):
                yield (
                    f"{key} must be the number of {what} of data set {name!r}, {len(classes)}, "
                    f"got {value}. Add the override: {key} {len(classes)}"
                )
                break


def _classes(name: str, attribute: str) -> list[str] | None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None and metadata.get("json_file"):
        # Registered by the user's own code; Detectron2 sets them when it loads the data.
        metadata.thing_classes = [c["name"] for c in read_categories(metadata.json_file)]
    return metadata.get(attribute)


def _check_same_classes(names: Sequence[str]) -> Iterator[str]:
    """Check that the sets of one run name the same classes in the same order."""
    for attribute in ("thing_classes", "stuff_classes"):
        known = {name: MetadataCatalog.get(name).get(attribute) for name in names}
        known = {name: classes for name, classes in known.items() if classes is not None}
        for name, classes in known.items():
            first, expected = next(iter(known.items()))
            if classes != expected:
                pairs = enumerate(zip_longest(expected, classes))
                number, (a, b) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
                yield (
                    f"All data sets of a run must have the same {attribute.replace('_', ' ')}, got "
                    f"{len(expected)} in {first!r} and {len(classes)} in {name!r}; they differ in "
                    f"class {number}: {a!r} and {b!r}. List the same categories in both jsons."
                )


def _validate(cfg: CfgNode, names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each kind of fault that each json has; log those that do not stop a run."""
    targets = [t for t in targets_of(cfg, names=names) if not isinstance(t, RecordsTarget)]
    report = Report()
    report.check(targets, Session())
    groups = defaultdict(list)
    for fault in report.distinct():
        groups[fault.json, fault.reason].append(fault)
    for (json, reason), faults in groups.items():
        first = f"{json}: {reason} ({len(faults)}), the first: {describe(faults[0])}."
        if reason not in STOPPING:
            logging.getLogger(__name__).warning("%s tools/validate_dataset.py lists all.", first)
        else:
            yield f"{first} {_hint(reason, names)}"


def _hint(reason: str, names: Sequence[str]) -> str:
    if not reason.startswith("stuff PNG"):
        return STOPPING[reason]
    metadata = (MetadataCatalog.get(name) for name in names)
    command = next(_prepare_command(each) for each in metadata if each.get("sem_seg_root"))
    return f"Run: {command}"
