"""What the values of a config may be: one table, checked before anything is built."""

import difflib
from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any, NamedTuple

from detectron2.config import CfgNode

_MOST = 2**31 - 1  # what every counter and size below fits in


class Rule(NamedTuple):
    """What a value, or every element of a list, must do; and the keys that it holds for."""

    words: str
    holds: Callable[[Any], bool]
    keys: str


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _integer(value: Any) -> bool:
    return _number(value) and isinstance(value, int) and value <= _MOST


# Prefixes stand before a dot; keys of one prefix follow it in braces.
RULES = (
    Rule(
        f"be an integer from 1 to {_MOST}",
        lambda value: _integer(value) and value >= 1,
        """MODEL.FPN.OUT_CHANNELS MODEL.RPN.{BATCH_SIZE_PER_IMAGE PRE_NMS_TOPK_TRAIN
        PRE_NMS_TOPK_TEST POST_NMS_TOPK_TRAIN POST_NMS_TOPK_TEST}
        MODEL.ROI_HEADS.{NUM_CLASSES BATCH_SIZE_PER_IMAGE}
        MODEL.ROI_BOX_HEAD.{POOLER_RESOLUTION FC_DIM CONV_DIM FED_LOSS_NUM_CLASSES}
        MODEL.ROI_MASK_HEAD.{POOLER_RESOLUTION CONV_DIM}
        MODEL.ROI_KEYPOINT_HEAD.{POOLER_RESOLUTION CONV_DIMS NUM_KEYPOINTS}
        MODEL.SEM_SEG_HEAD.{NUM_CLASSES CONVS_DIM COMMON_STRIDE}
        MODEL.RETINANET.{NUM_CLASSES TOPK_CANDIDATES_TEST}
        MODEL.RESNETS.{NUM_GROUPS WIDTH_PER_GROUP RES2_OUT_CHANNELS STEM_OUT_CHANNELS
        DEFORM_NUM_GROUPS}
        MODEL.CLASSIFIER.HIDDEN INPUT.{MIN_SIZE_TRAIN MAX_SIZE_TRAIN MAX_SIZE_TEST IMAGE_SIZE}
        SOLVER.{IMS_PER_BATCH MAX_ITER CHECKPOINT_PERIOD}
        TEST.{IMS_PER_BATCH DETECTIONS_PER_IMAGE AUG.MIN_SIZES AUG.MAX_SIZE PRECISE_BN.NUM_ITER}""",
    ),
    Rule(
        f"be an integer from 0 to {_MOST}",
        lambda value: _integer(value) and value >= 0,
        """MODEL.BACKBONE.FREEZE_AT MODEL.PROPOSAL_GENERATOR.MIN_SIZE
        MODEL.ROI_BOX_HEAD.{NUM_FC NUM_CONV POOLER_SAMPLING_RATIO}
        MODEL.ROI_MASK_HEAD.{NUM_CONV POOLER_SAMPLING_RATIO}
        MODEL.ROI_KEYPOINT_HEAD.{POOLER_SAMPLING_RATIO MIN_KEYPOINTS_PER_IMAGE}
        MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT MODEL.RETINANET.NUM_CONVS
        SOLVER.AUDIT_PERIOD MODEL.CLASSIFIER.NUM_CLASSES INPUT.MIN_SIZE_TEST
        DATALOADER.MAX_SKIPPED_SAMPLES
        DATASETS.{PRECOMPUTED_PROPOSAL_TOPK_TRAIN PRECOMPUTED_PROPOSAL_TOPK_TEST}
        SOLVER.{WARMUP_ITERS STEPS NUM_DECAYS REFERENCE_WORLD_SIZE MAX_SKIPPED_STEPS EPOCHS
        REFERENCE_BATCH CHECKPOINT_EPOCHS} TEST.{EVAL_PERIOD EVAL_EPOCHS NUM_PICTURES}
        VIS_PERIOD""",
    ),
    Rule(
        f"be an integer from -1 to {_MOST}",
        lambda value: _integer(value) and value >= -1,
        "MODEL.RPN.BOUNDARY_THRESH MODEL.PGN.NUM_GROUPS SEED",
    ),
    # A process each: more than this many on one machine is a slip of the finger.
    Rule(
        "be an integer from 0 to 512",
        lambda value: _integer(value) and 0 <= value <= 512,
        "DATALOADER.NUM_WORKERS",
    ),
    Rule(
        "be -1, for the channels of the input, or a positive integer",
        lambda value: _integer(value) and (value == -1 or value > 0),
        "MODEL.RPN.CONV_DIMS",
    ),
    Rule(
        "be a finite number above 0",
        lambda value: _number(value) and value > 0,
        """MODEL.PIXEL_STD MODEL.ANCHOR_GENERATOR.{SIZES ASPECT_RATIOS} MODEL.RPN.BBOX_REG_WEIGHTS
        MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
        MODEL.RETINANET.BBOX_REG_WEIGHTS INPUT.CROP.SIZE
        SOLVER.{BASE_LR GAMMA CLIP_GRADIENTS.CLIP_VALUE CLIP_GRADIENTS.NORM_TYPE}""",
    ),
    Rule(
        "be a finite number from 0 on",
        lambda value: _number(value) and value >= 0,
        """MODEL.RPN.{BBOX_REG_LOSS_WEIGHT LOSS_WEIGHT SMOOTH_L1_BETA}
        MODEL.ROI_BOX_HEAD.{BBOX_REG_LOSS_WEIGHT SMOOTH_L1_BETA FED_LOSS_FREQ_WEIGHT_POWER}
        MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT MODEL.SEM_SEG_HEAD.LOSS_WEIGHT
        MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT
        MODEL.RETINANET.{FOCAL_LOSS_GAMMA SMOOTH_L1_LOSS_BETA} DATALOADER.REPEAT_THRESHOLD
        SOLVER.{BASE_LR_END WEIGHT_DECAY WEIGHT_DECAY_NORM BIAS_LR_FACTOR}""",
    ),
    Rule(
        "be a number from 0 to 1",
        lambda value: _number(value) and 0 <= value <= 1,
        """MODEL.RPN.{POSITIVE_FRACTION NMS_THRESH IOU_THRESHOLDS}
        MODEL.ROI_HEADS.{POSITIVE_FRACTION SCORE_THRESH_TEST NMS_THRESH_TEST IOU_THRESHOLDS}
        MODEL.ROI_BOX_CASCADE_HEAD.IOUS MODEL.ANCHOR_GENERATOR.OFFSET
        MODEL.PANOPTIC_FPN.COMBINE.{OVERLAP_THRESH INSTANCES_CONFIDENCE_THRESH}
        MODEL.RETINANET.{IOU_THRESHOLDS PRIOR_PROB SCORE_THRESH_TEST NMS_THRESH_TEST
        FOCAL_LOSS_ALPHA} SOLVER.{MOMENTUM WARMUP_FACTOR STEP_FRACTIONS} DATASETS.VAL_FRACTION""",
    ),
    Rule(
        "be a finite number",
        _number,
        "MODEL.PIXEL_MEAN MODEL.ANCHOR_GENERATOR.ANGLES",
    ),
    Rule(
        "be -1 (ignored), 0 or 1",
        lambda value: value in (-1, 0, 1) and _integer(value),
        "MODEL.RPN.IOU_LABELS MODEL.ROI_HEADS.IOU_LABELS MODEL.RETINANET.IOU_LABELS",
    ),
    Rule(
        "be the name of a feature map, as res4 or p4",
        lambda value: isinstance(value, str) and bool(value),
        """MODEL.FPN.IN_FEATURES MODEL.RPN.IN_FEATURES MODEL.ROI_HEADS.IN_FEATURES
        MODEL.SEM_SEG_HEAD.IN_FEATURES MODEL.RETINANET.IN_FEATURES MODEL.RESNETS.OUT_FEATURES""",
    ),
    Rule(
        "be a pattern of a layer's path, as backbone.*",
        lambda value: isinstance(value, str) and bool(value),
        "MODEL.WS.EXCLUDE",
    ),
)

NOT_EMPTY = """MODEL.PIXEL_MEAN MODEL.PIXEL_STD MODEL.ANCHOR_GENERATOR.{SIZES ASPECT_RATIOS ANGLES}
MODEL.RPN.{CONV_DIMS IN_FEATURES IOU_THRESHOLDS} MODEL.ROI_HEADS.{IN_FEATURES IOU_THRESHOLDS}
MODEL.RESNETS.OUT_FEATURES INPUT.MIN_SIZE_TRAIN"""

_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")

CHOICES: dict[str, tuple[Any, ...]] = {
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("", *_POOLERS),  # "": the feature maps themselves
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": ("", *_POOLERS),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.RES5_DILATION": (1, 2),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.FORMAT": ("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "SOLVER.LR_SCHEDULER_NAME": (
        *("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
}


def check_values(cfg: CfgNode) -> None:
    """Check every value that the table knows.

    Args:
        cfg: a complete config; keys that it lacks are passed over.

    Raises:
        ValueError: for the first one that is wrong, with its key and what it may be.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = get_cfg()
        >>> cfg.SOLVER.MAX_ITER = -5
        >>> check_values(cfg)
        Traceback (most recent call last):
        ValueError: SOLVER.MAX_ITER must be an integer from 1 to 2147483647, got \
SOLVER.MAX_ITER=-5. Correct the value.
    """
    for rule in RULES:
        for key in expand(rule.keys):
            value = look_up(cfg, key)
            if value is not None and not all(rule.holds(leaf) for leaf in _leaves(value)):
                raise ValueError(f"{key} must {rule.words}, got {key}={value!r}. {_CORRECT}")
    for key in expand(NOT_EMPTY):
        if look_up(cfg, key) in ((), []):
            raise ValueError(f"{key} must have an element, got {key}=(). Add one.")
    for key, allowed in CHOICES.items():
        value = look_up(cfg, key)
        if value is not None and value not in allowed:
            near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
            hint = f"Did you mean {near[0]}?" if near else _CORRECT
            known = ", ".join(map(repr, allowed))
            raise ValueError(f"{key} must be one of {known}, got {key}={value!r}. {hint}")


_CORRECT = "Correct the value."


def expand(keys: str) -> Iterator[str]:
    """Yield the keys of a rule: ``A.{B C} D`` is A.B, A.C and D.

    Args:
        keys: separated by spaces.

    Example:
        >>> list(expand("A.{B C} D"))
        ['A.B', 'A.C', 'D']
    """
    prefix = ""
    for word in keys.split():
        start, brace, rest = word.rpartition("{")
        prefix = start if brace else prefix
        yield prefix + rest.removesuffix("}")
        prefix = "" if rest.endswith("}") else prefix


def look_up(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key, None if there is no such key."""
    for part in key.split("."):
        cfg = dict.get(cfg, part) if isinstance(cfg, CfgNode) else None
    return cfg


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for element in value:
            yield from _leaves(element)
    else:
        yield value
