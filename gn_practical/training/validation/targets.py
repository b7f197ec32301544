"""What to validate: the data sets of a config."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from gn_practical.training.data.registration import ensure_registered
from gn_practical.training.validation.coco import Names, Session
from gn_practical.training.validation.findings import Fault
from gn_practical.training.validation.instances import InstancesTarget
from gn_practical.training.validation.panoptic import PanopticTarget

_FILES = {
    "file_name": "image",
    "sem_seg_file_name": "stuff PNG",
    "pan_seg_file_name": "panoptic PNG",
}


class RecordsTarget(NamedTuple):
    """A data set of another format than COCO's, as Detectron2 loads it: its files alone."""

    json: str  # the name in Detectron2's catalog

    def check(self, session: Session) -> Iterator[Fault]:
        """Yield all faults of files; see `InstancesTarget.check`."""
        try:
            records = DatasetCatalog.get(self.json)
        except Exception as error:  # whatever the user's own loader raises
            yield Fault("json unusable", self.json, detail=f"its loader raised {error!r}")
            return
        numbered = list(enumerate(records))
        tasks = [(i, record, key) for i, record in numbered for key in _FILES if key in record]
        paths = [record[key] for _, record, key in tasks]
        found = session.look_at("", paths, self.json)
        for (index, record, key), facts in zip(tasks, found, strict=True):
            stated = (record.get("width"), record.get("height"))
            place = (self.json, (index,), record[key], record.get("image_id"), None)
            for reason, detail in facts.findings(_FILES[key], [] if None in stated else [stated]):
                yield Fault(reason, *place, detail)


Target = InstancesTarget | PanopticTarget | RecordsTarget


def targets_of(
    cfg: CfgNode, files: bool = True, names: Sequence[str] | None = None
) -> list[Target]:
    """Return what is to be validated of the data sets that a config trains and tests on.

    With ``names``, which are registered and drawn, those alone; without, the embedded scenes are
    drawn if they are among them. ``files=False`` leaves images and PNGs out.

    Raises:
        DatasetError: if a name is not registered.
    """
    if names is None:
        names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
        ensure_registered(names)  # all ranks do; with names, one rank may work alone
    targets = [target for name in names for target in _targets(cfg, name, files)]
    return list(dict.fromkeys(targets))


def _targets(cfg: CfgNode, name: str, files: bool) -> Iterator[Target]:
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        if files:
            yield RecordsTarget(name)
        return
    image_root = metadata.get("image_root") if files else None
    trains, tests = name in cfg.DATASETS.TRAIN, name in cfg.DATASETS.TEST
    if metadata.get("json_file"):
        yield InstancesTarget(
            metadata.json_file,
            image_root,
            _names(metadata, "thing"),
            masks=bool(cfg.MODEL.MASK_ON),
            area=tests,
            rle=not (trains and cfg.MODEL.MASK_ON) or cfg.INPUT.MASK_FORMAT == "bitmask",
            trains=trains and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )
    if metadata.get("panoptic_json"):
        yield PanopticTarget(
            metadata.panoptic_json,
            metadata.panoptic_root,
            image_root,
            _names(metadata, "thing", "stuff"),
            stuff_root=metadata.get("sem_seg_root"),
            files=files,
            instances_json=metadata.get("json_file"),
            area=tests,
        )


def _names(metadata: Metadata, *kinds: str) -> Names | None:
    """Return id and name of the categories, but of the label that stands for all things."""
    names = [
        (key, metadata.get(f"{kind}_classes")[index])
        for kind in kinds
        for key, index in (metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {}).items()
        if (kind, index) != ("stuff", 0)
    ]
    return tuple(names) or None
