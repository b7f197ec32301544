"""Which key of a LazyConfig says what which key of the trainer's config says."""

from collections.abc import Mapping

from detectron2.config import CfgNode

from gn_practical.config import add_pgn_config

_TRAIN = {
    # Detectron2's own, of configs/common/train.py.
    "train.output_dir": "OUTPUT_DIR",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.checkpointer.max_to_keep": "SOLVER.CHECKPOINT_KEEP_LAST",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.device": "MODEL.DEVICE",
    "train.seed": "SEED",
    "train.cudnn_benchmark": "CUDNN_BENCHMARK",
    # This package's.
    "train.amp.dtype": "SOLVER.AMP.DTYPE",
    "train.clip_gradients.enabled": "SOLVER.CLIP_GRADIENTS.ENABLED",
    "train.clip_gradients.clip_type": "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    "train.clip_gradients.clip_value": "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "train.clip_gradients.norm_type": "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "train.accumulate_steps": "SOLVER.ACCUMULATE_STEPS",
    "train.max_skipped_steps": "SOLVER.MAX_SKIPPED_STEPS",
    "train.max_skipped_samples": "DATALOADER.MAX_SKIPPED_SAMPLES",
    "train.audit_period": "SOLVER.AUDIT_PERIOD",
    "train.num_pictures": "TEST.NUM_PICTURES",
    "train.best_metric": "TEST.BEST_METRIC",
    "train.expected_results": "TEST.EXPECTED_RESULTS",
    "train.allow_differences": "TEST.ALLOW_DIFFERENCES",
    "train.weights_min_share": "MODEL.WEIGHTS_MIN_SHARE",
}
# Read elsewhere, by names of their own.
TRAIN_ONLY = ("train.ddp", "train.log_period")
_OWN = {
    "datasets.coco_instances": "DATASETS.COCO_INSTANCES",
    "datasets.coco_panoptic": "DATASETS.COCO_PANOPTIC",
}
# What a model, its data and its optimizer were made with, where they are Detectron2's.
_PARTS = {
    "optimizer.lr": "SOLVER.BASE_LR",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "dataloader.train.num_workers": "DATALOADER.NUM_WORKERS",
    "dataloader.train.dataset.names": "DATASETS.TRAIN",
    "dataloader.train.dataset.filter_empty": "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "dataloader.train.aspect_ratio_grouping": "DATALOADER.ASPECT_RATIO_GROUPING",
    "dataloader.train.mapper.image_format": "INPUT.FORMAT",
    "dataloader.train.mapper.instance_mask_format": "INPUT.MASK_FORMAT",
    "dataloader.test.dataset.names": "DATASETS.TEST",
    "model.pixel_mean": "MODEL.PIXEL_MEAN",
    "model.pixel_std": "MODEL.PIXEL_STD",
    "model.roi_heads.num_classes": "MODEL.ROI_HEADS.NUM_CLASSES",
    "model.sem_seg_head.num_classes": "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "model.num_classes": "MODEL.RETINANET.NUM_CLASSES",
}


def _norm_keys() -> dict[str, str]:
    cfg = CfgNode({"MODEL": {}})
    add_pgn_config(cfg)
    return {
        f"{node.lower()}.{key.lower()}": f"MODEL.{node}.{key}"
        for node, keys in cfg.MODEL.items()
        for key in keys
    }


KEYS: Mapping[str, str] = {**_TRAIN, **_norm_keys(), **_OWN, **_PARTS}
