"""The evaluators of a LazyConfig: this package's in place of Detectron2's of the same numbers."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from detectron2 import evaluation
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from omegaconf import DictConfig, ListConfig

from gn_practical.training.architectures import architecture
from gn_practical.training.evaluation.coco import CocoEvaluator
from gn_practical.training.evaluation.panoptic import PanopticEvaluator
from gn_practical.training.evaluation.pictures import PictureEvaluator
from gn_practical.training.evaluation.sem_seg import SemSegEvaluator
from gn_practical.training.lazy.config import LazyRunConfig
from gn_practical.training.lazy.text import target_of

_OURS: dict[Callable[..., Any], type[DatasetEvaluator]] = {
    evaluation.COCOEvaluator: CocoEvaluator,
    evaluation.SemSegEvaluator: SemSegEvaluator,
    evaluation.COCOPanopticEvaluator: PanopticEvaluator,
}


def build_evaluator(
    cfg: LazyRunConfig, dataset_name: str, node: DictConfig | ListConfig, output_folder: str
) -> DatasetEvaluator:
    """Build ``dataloader.evaluator`` for a data set, with pictures where they are asked for.

    Detectron2's evaluators of AP, mIoU and PQ are replaced by ours, whose numbers are the same and
    which need neither panopticapi nor an old NumPy; all others are what the config makes of them.
    """
    nodes = list(node) if isinstance(node, ListConfig) else [node]
    proposals = "proposals" in architecture(cfg.MODEL.META_ARCHITECTURE).predicts
    evaluators = [_build(each, output_folder, {} if proposals else _OURS) for each in nodes]
    if cfg.TEST.NUM_PICTURES > 0:
        folder = [dataset_name] if len(cfg.DATASETS.TEST) > 1 else []
        pictures = os.path.join(cfg.OUTPUT_DIR, "pictures", *folder)
        evaluators.append(PictureEvaluator(dataset_name, pictures, cfg.TEST.NUM_PICTURES))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _build(
    node: DictConfig, output_folder: str, ours: dict[Callable[..., Any], type[DatasetEvaluator]]
) -> DatasetEvaluator:
    kind = ours.get(target_of(node))
    arguments = {key: instantiate(value) for key, value in node.items() if key != "_target_"}
    arguments = {"output_dir": output_folder, **arguments}
    if kind is None:
        return instantiate(node)
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError:  # an option that ours has not
        return instantiate(node)
    return kind(**arguments)
