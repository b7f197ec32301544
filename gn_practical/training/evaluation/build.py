"""The evaluators of a data set, chosen by its metadata."""

import os

from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from gn_practical.training.architectures import architecture
from gn_practical.training.evaluation.coco import CocoEvaluator
from gn_practical.training.evaluation.panoptic import PanopticEvaluator
from gn_practical.training.evaluation.pictures import PictureEvaluator
from gn_practical.training.evaluation.sem_seg import SemSegEvaluator

# Evaluators of Detectron2 itself; they take no folder but LVIS's.
_BY_DETECTRON2 = {
    "cityscapes_instance": "CityscapesInstanceEvaluator",
    "cityscapes_sem_seg": "CityscapesSemSegEvaluator",
    "pascal_voc": "PascalVOCDetectionEvaluator",
    "lvis": "LVISEvaluator",
}
_TYPES = ("coco", "coco_panoptic_seg", "sem_seg", *_BY_DETECTRON2)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Build what measures a model on a data set, by the data set's ``evaluator_type``.

    "coco": AP. "sem_seg": mIoU. "coco_panoptic_seg": mIoU, AP and PQ, as far as the model predicts
    them. "lvis", "cityscapes_instance", "cityscapes_sem_seg", "pascal_voc": Detectron2's own
    evaluators. With ``cfg.TEST.NUM_PICTURES``, pictures are drawn in the same pass, to
    ``cfg.OUTPUT_DIR/pictures``. Of several data sets in ``cfg.DATASETS.TEST``, each has a
    sub-folder of its own.

    Args:
        cfg: config of the run.
        dataset_name: a registered data set.
        output_dir: folder for predictions; ``cfg.OUTPUT_DIR/inference`` if None.

    Raises:
        ValueError: if the metadata has no ``evaluator_type``, or an unknown one.

    Example:
        >>> from detectron2.config import get_cfg
        >>> evaluator = build_evaluator(get_cfg(), "coco_2017_val")  # doctest: +SKIP
    """
    folder = [dataset_name] if len(cfg.DATASETS.TEST) > 1 else []
    if output_dir is None:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", *folder)
    evaluators = _evaluators(cfg, dataset_name, output_dir)
    if cfg.TEST.get("NUM_PICTURES", 0) > 0:
        pictures_dir = os.path.join(cfg.OUTPUT_DIR, "pictures", *folder)
        evaluators.append(PictureEvaluator(dataset_name, pictures_dir, cfg.TEST.NUM_PICTURES))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _evaluators(cfg: CfgNode, dataset_name: str, output_dir: str) -> list[DatasetEvaluator]:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "coco":
        return [CocoEvaluator(dataset_name, output_dir=output_dir)]
    if kind == "sem_seg":
        return [SemSegEvaluator(dataset_name, output_dir)]
    if kind == "coco_panoptic_seg":
        return _panoptic_evaluators(cfg, dataset_name, output_dir)
    if kind not in _TYPES:
        raise ValueError(
            f"evaluator_type of data set {dataset_name} must be one of {', '.join(_TYPES)}, got "
            f"evaluator_type={kind}. Set it with MetadataCatalog.get({dataset_name!r})"
            ".set(evaluator_type=...), or override build_evaluator."
        )
    # By name, so that lvis and cityscapesscripts are imported where they are needed only.
    evaluator = getattr(evaluation, _BY_DETECTRON2[kind])
    if kind == "lvis":
        return [evaluator(dataset_name, output_dir=output_dir)]
    return [evaluator(dataset_name)]


def _panoptic_evaluators(
    cfg: CfgNode, dataset_name: str, output_dir: str
) -> list[DatasetEvaluator]:
    predicted = architecture(cfg.MODEL.META_ARCHITECTURE).predicts
    metadata = MetadataCatalog.get(dataset_name)
    evaluators: list[DatasetEvaluator] = []
    # The "standard" panoptic format of Detectron2 has neither label nor, perhaps, instance files.
    if "sem_seg" in predicted and metadata.get("sem_seg_root"):
        evaluators.append(SemSegEvaluator(dataset_name, output_dir))
    if "instances" in predicted and metadata.get("json_file"):
        evaluators.append(CocoEvaluator(dataset_name, output_dir=output_dir))
    if "panoptic" in predicted and cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED:
        evaluators.append(PanopticEvaluator(dataset_name, output_dir))
    return evaluators
