"""What to validate: the data sets of a config."""

from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata

from gn_practical.training.data.checks import ensure_registered
from gn_practical.training.data.coco_format import VOID
from gn_practical.training.validation.instances import InstancesTarget
from gn_practical.training.validation.panoptic import PanopticTarget
from gn_practical.training.validation.records import RecordsTarget

Target = InstancesTarget | PanopticTarget | RecordsTarget


def targets_of(cfg: CfgNode, files: bool = True) -> list[Target]:
    """Return what is to be validated of the data sets that a config trains and tests on.

    Args:
        cfg: a config, its data sets registered, as ``load_cfg`` returns it. The embedded scenes are
            drawn if it uses them.
        files: False to leave images and PNGs unread.

    Raises:
        DatasetError: if a name is not registered.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = get_cfg()
        >>> cfg.DATASETS.TRAIN = ("coco_2017_val",)
        >>> targets_of(cfg)[0].json
        '.../coco/annotations/instances_val2017.json'
    """
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    ensure_registered(names)
    targets = [target for name in names for target in _targets(cfg, name, files)]
    return list(dict.fromkeys(targets))


def _targets(cfg: CfgNode, name: str, files: bool) -> Iterator[Target]:
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in ("coco", "coco_panoptic_seg"):
        if files:
            yield RecordsTarget(name)
        return
    image_root = metadata.get("image_root") if files else None
    if metadata.get("json_file"):
        yield InstancesTarget(
            json=metadata.json_file,
            image_root=image_root,
            known_ids=_ids(metadata, "thing"),
            masks=bool(cfg.MODEL.MASK_ON),
            area=name in cfg.DATASETS.TEST,
        )
    if metadata.get("panoptic_json"):
        yield PanopticTarget(
            json=metadata.panoptic_json,
            png_root=metadata.panoptic_root,
            image_root=image_root,
            known_ids=_ids(metadata, "thing", "stuff"),
            stuff_root=metadata.get("sem_seg_root"),
            num_stuff_classes=len(metadata.get("stuff_classes") or range(VOID)),
            files=files,
        )


def _ids(metadata: Metadata, *kinds: str) -> frozenset | None:
    ids = [metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {} for kind in kinds]
    return frozenset().union(*ids) or None
