"""The evaluators of a data set, chosen by its metadata."""

import logging
import os
from collections.abc import Callable
from functools import partial

from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators

from gn_practical.training.architectures import architecture
from gn_practical.training.evaluation.coco import CocoEvaluator
from gn_practical.training.evaluation.panoptic import PanopticEvaluator
from gn_practical.training.evaluation.pictures import PictureEvaluator
from gn_practical.training.evaluation.sem_seg import SemSegEvaluator

_logger = logging.getLogger(__name__)

Builder = Callable[[CfgNode, str, str], list[DatasetEvaluator]]


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Build what measures a model on a data set, by the data set's ``evaluator_type``.

    "coco": AP. "sem_seg": mIoU. "coco_panoptic_seg": mIoU, AP and PQ, as far as the model predicts
    them. "lvis", "cityscapes_instance", "cityscapes_sem_seg", "pascal_voc": Detectron2's own
    evaluators. With ``cfg.TEST.NUM_PICTURES``, pictures are drawn in the same pass.

    Pictures go to ``cfg.OUTPUT_DIR/pictures``, predictions to ``output_folder``, by default
    ``cfg.OUTPUT_DIR/inference``. Of several data sets in ``cfg.DATASETS.TEST``, each has a
    sub-folder of its own in these two of ``cfg.OUTPUT_DIR``.

    Raises:
        ValueError: if the metadata has no ``evaluator_type``, or an unknown one.

    Example:
        >>> from detectron2.config import get_cfg
        >>> evaluator = build_evaluator(get_cfg(), "coco_2017_val")  # doctest: +SKIP
    """
    folder = [dataset_name] if len(cfg.DATASETS.TEST) > 1 else []
    if output_folder is None:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", *folder)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in BUILDERS:
        raise ValueError(
            f"evaluator_type of data set {dataset_name} must be one of {', '.join(BUILDERS)}, got "
            f"evaluator_type={kind}. Set it with MetadataCatalog.get({dataset_name!r})"
            ".set(evaluator_type=...), or override build_evaluator."
        )
    if cfg.TEST.get("ERROR_ANALYSIS", False) and kind not in ("coco", "coco_panoptic_seg"):
        _logger.warning(
            "TEST.ERROR_ANALYSIS has nothing to say of %s: its evaluator_type is %s, not coco or "
            "coco_panoptic_seg.",
            *(dataset_name, kind),
        )
    evaluators = BUILDERS[kind](cfg, dataset_name, output_folder)
    if cfg.TEST.get("NUM_PICTURES", 0) > 0:
        pictures_dir = os.path.join(cfg.OUTPUT_DIR, "pictures", *folder)
        evaluators.append(PictureEvaluator(dataset_name, pictures_dir, cfg.TEST.NUM_PICTURES))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _coco(cfg: CfgNode, dataset_name: str, output_folder: str) -> list[DatasetEvaluator]:
    if "proposals" in architecture(cfg.MODEL.META_ARCHITECTURE).predicts:
        return [COCOEvaluator(dataset_name, output_dir=output_folder)]
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    analysis = cfg.TEST.get("ERROR_ANALYSIS", False)
    options = {"kpt_oks_sigmas": sigmas, "error_analysis": analysis}
    return [CocoEvaluator(dataset_name, output_folder, **options)]


def _panoptic(cfg: CfgNode, dataset_name: str, output_folder: str) -> list[DatasetEvaluator]:
    predicted = architecture(cfg.MODEL.META_ARCHITECTURE).predicts
    metadata = MetadataCatalog.get(dataset_name)
    evaluators: list[DatasetEvaluator] = []
    # The "standard" panoptic format of Detectron2 has neither label nor, perhaps, instance files.
    if "sem_seg" in predicted and metadata.get("sem_seg_root"):
        evaluators.append(SemSegEvaluator(dataset_name, output_folder))
    if predicted & {"instances", "proposals"} and metadata.get("json_file"):
        evaluators += _coco(cfg, dataset_name, output_folder)
    if "panoptic" in predicted and cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED:
        analysis = cfg.TEST.get("ERROR_ANALYSIS", False)
        panoptic = PanopticEvaluator(dataset_name, output_folder, error_analysis=analysis)
        evaluators.append(panoptic)
    return evaluators


def _by_detectron2(name: str, cfg: CfgNode, dataset_name: str, folder: str) -> list:
    # By name, so that lvis and cityscapesscripts are imported where they are needed only.
    options = {"output_dir": folder} if name == "LVISEvaluator" else {}
    return [getattr(evaluation, name)(dataset_name, **options)]


# evaluator_type → what builds the evaluators from the config, the data set and the folder.
BUILDERS: dict[str, Builder] = {
    "coco": _coco,
    "sem_seg": lambda cfg, dataset_name, folder: [SemSegEvaluator(dataset_name, folder)],
    "coco_panoptic_seg": _panoptic,
    "cityscapes_instance": partial(_by_detectron2, "CityscapesInstanceEvaluator"),
    "cityscapes_sem_seg": partial(_by_detectron2, "CityscapesSemSegEvaluator"),
    "pascal_voc": partial(_by_detectron2, "PascalVOCDetectionEvaluator"),
    "lvis": partial(_by_detectron2, "LVISEvaluator"),
}
