"""Evaluation: PQ, AP and mIoU under Detectron2's keys, tables, pictures and curves."""

from gn_practical.training.evaluation.build import build_evaluator
from gn_practical.training.evaluation.coco import CocoEvaluator
from gn_practical.training.evaluation.curves import plot_metrics
from gn_practical.training.evaluation.panoptic import PanopticEvaluator
from gn_practical.training.evaluation.pictures import PictureEvaluator
from gn_practical.training.evaluation.results import results_table, write_results
from gn_practical.training.evaluation.sem_seg import SemSegEvaluator

__all__ = [
    "CocoEvaluator",
    "PanopticEvaluator",
    "PictureEvaluator",
    "SemSegEvaluator",
    "build_evaluator",
    "plot_metrics",
    "results_table",
    "write_results",
]
