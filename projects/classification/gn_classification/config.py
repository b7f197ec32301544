"""Configuration of classification: its keys, what they may be, and what follows from the data."""

import math
from collections.abc import Mapping

from detectron2.config import CfgNode

from gn_classification.datasets import LabelledImages
from gn_classification.loaders import AUGMENTATIONS
from gn_practical.training.config import RunConfig
from gn_practical.training.config.keys import check_counts


def add_classification_config(cfg: CfgNode) -> None:
    """Add the node CLASSIFICATION, with its defaults, to a Detectron2 config in place.

    Args:
        cfg: a config with the keys of the norm and the trainer.
    """
    own = cfg.CLASSIFICATION = CfgNode()
    # Classes; 0: as many as the training set has (train_net.py fills it in).
    own.NUM_CLASSES = 0
    # The norm of the model: "PGN", "GN" (of MODEL.PGN.NUM_GROUPS groups), "LN" (one group), "IN"
    # (a group a channel), "BN", or what else get_norm knows; "" for none.
    own.NORM = "PGN"
    # Layers of the ResNet: 6n + 2 of those for CIFAR, or 18 to 152 of torchvision's. Detectron2's
    # have MODEL.RESNETS.DEPTH.
    own.DEPTH = 56
    # Begin with the last norm of each block of Detectron2's ResNets at zero, which makes the block
    # an identity; the other ResNets always do.
    own.ZERO_INIT_RESIDUAL = True
    # Units of the MLP's hidden layer.
    own.HIDDEN = 512
    # Height and width to which images are brought.
    own.IMAGE_SIZE = 32
    # "none", "crop_flip" (pad by 4, crop, flip: CIFAR) or "resized_crop" (flip too: photographs,
    # read from files).
    own.AUGMENTATION = "none"
    # ((name, folder), ...): data sets "<name>_train" and "<name>_val", from
    # folder/{train,val}/<class>/ or, split at random, from folder/<class>/.
    own.IMAGE_FOLDERS = ()
    # Hold all images on the model's device, decoded; False: read files as they are needed.
    own.IN_MEMORY = True
    # Share of each class to evaluate on where a data set has no such split.
    own.VAL_FRACTION = 0.2
    # Images in a batch of an evaluation, on one GPU.
    own.IMS_PER_BATCH_TEST = 100
    # Epochs of training in place of SOLVER.MAX_ITER; 0: as MAX_ITER and the periods say.
    own.EPOCHS = 0
    # Where the learning rate falls by SOLVER.GAMMA, as shares of the schedule, in place of STEPS.
    own.STEP_FRACTIONS = ()
    # Keep a moving average of the weights, of which this share stays in each step (0.9999); it is
    # saved, evaluated as "classification_ema" and exported as backbone_ema.pth. 0: none.
    own.EMA_DECAY = 0.0
    # SOLVER.BASE_LR is meant for a batch of this size and scaled in proportion to the batch; 0: it
    # is taken as it is.
    own.REFERENCE_BATCH = 0
    # Epochs between two checkpoints and two evaluations, where EPOCHS is given; 0: as the periods
    # in iterations say.
    own.CHECKPOINT_EPOCHS = 10
    own.EVAL_EPOCHS = 1


_COUNTS = ("NUM_CLASSES", "EPOCHS", "REFERENCE_BATCH", "CHECKPOINT_EPOCHS", "EVAL_EPOCHS")
_POSITIVE = ("HIDDEN", "IMAGE_SIZE", "IMS_PER_BATCH_TEST")
# What complete_config turns into MAX_ITER, STEPS, BASE_LR and periods.
_IN_EPOCHS = ("EPOCHS", "STEP_FRACTIONS", "REFERENCE_BATCH", "CHECKPOINT_EPOCHS", "EVAL_EPOCHS")


def check_config(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check the values of CLASSIFICATION, and that there are data sets to train and evaluate on.

    Args:
        cfg: as ``load_cfg`` returns it.
        eval_only: nothing will be trained.

    Raises:
        ValueError: with the key, its value and what to do.
    """
    own = cfg.CLASSIFICATION
    check_counts(cfg, [f"CLASSIFICATION.{key}" for key in _COUNTS])
    check_counts(cfg, [f"CLASSIFICATION.{key}" for key in _POSITIVE], least=1)
    check_counts(cfg, ["SOLVER.IMS_PER_BATCH"], least=1)
    for key in ("TRAIN", "TEST"):
        names = cfg.DATASETS[key]
        needs_one = key == "TRAIN" and not eval_only
        if len(names) != 1 if needs_one else key == "TEST" and eval_only and not names:
            raise ValueError(
                f"DATASETS.{key} must name one data set, got DATASETS.{key}={tuple(names)}. For "
                f"""example: DATASETS.{key} "('digits_{key.lower()}',)"."""
            )
    if not all(0 <= share <= 1 for share in own.STEP_FRACTIONS):
        raise ValueError(
            "CLASSIFICATION.STEP_FRACTIONS must be numbers from 0 to 1, got "
            f"CLASSIFICATION.STEP_FRACTIONS={tuple(own.STEP_FRACTIONS)}. Correct them."
        )
    if not 0 <= own.EMA_DECAY < 1:
        raise ValueError(
            "CLASSIFICATION.EMA_DECAY must be from 0 to below 1, got CLASSIFICATION.EMA_DECAY="
            f"{own.EMA_DECAY}. Take 0.9999 on ImageNet, or 0 for none."
        )
    if own.EPOCHS and "SOLVER.MAX_ITER" in getattr(cfg, "overridden", ()):
        raise ValueError(
            "CLASSIFICATION.EPOCHS must be 0 where SOLVER.MAX_ITER is given, got "
            f"CLASSIFICATION.EPOCHS={own.EPOCHS}. Add CLASSIFICATION.EPOCHS 0, or leave "
            "SOLVER.MAX_ITER out."
        )
    known = AUGMENTATIONS[:2] if own.IN_MEMORY else AUGMENTATIONS
    if own.AUGMENTATION not in known:
        raise ValueError(
            f"CLASSIFICATION.AUGMENTATION must be one of {', '.join(known)} with "
            f"CLASSIFICATION.IN_MEMORY={own.IN_MEMORY}, got CLASSIFICATION.AUGMENTATION="
            f"{own.AUGMENTATION}. Correct it, or add CLASSIFICATION.IN_MEMORY False."
        )


def complete_config(
    cfg: CfgNode, datasets: Mapping[str, LabelledImages], eval_only: bool = False
) -> CfgNode:
    """Fill in what follows from the data: the number of classes, and epochs as iterations.

    Args:
        cfg: frozen.
        datasets: those of the run, by name, the training set first.
        eval_only: nothing will be trained.

    Returns:
        A frozen config that says the same in iterations.

    Raises:
        ValueError: if the data sets, or they and the model, have not the same classes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    first = next(iter(datasets.values()))
    cfg.CLASSIFICATION.NUM_CLASSES = cfg.CLASSIFICATION.NUM_CLASSES or len(first.classes)
    _check_classes(cfg.CLASSIFICATION.NUM_CLASSES, datasets)
    if not eval_only:
        _set_schedule(cfg, len(first))
    cfg.freeze()
    return cfg


def _check_classes(num_classes: int, datasets: Mapping[str, LabelledImages]) -> None:
    (name, first), *others = datasets.items()
    if len(first.classes) != num_classes:
        raise ValueError(
            f"CLASSIFICATION.NUM_CLASSES must be that of {name}, {len(first.classes)}, got "
            f"CLASSIFICATION.NUM_CLASSES={num_classes}. Add CLASSIFICATION.NUM_CLASSES "
            f"{len(first.classes)}, or 0 to take that of the data."
        )
    for other, opened in others:
        differing = set(opened.classes) ^ set(first.classes)
        if differing:
            raise ValueError(
                f"All data sets of a run must have the same classes, got {name} and {other} that "
                f"differ in {', '.join(sorted(differing)[:5])}. Rename or remove their folders."
            )


def _set_schedule(cfg: CfgNode, num_images: int) -> None:
    own, solver = cfg.CLASSIFICATION, cfg.SOLVER
    per_epoch = num_images / solver.IMS_PER_BATCH
    if own.EPOCHS:
        solver.MAX_ITER = math.ceil(own.EPOCHS * per_epoch)
        if own.CHECKPOINT_EPOCHS:
            solver.CHECKPOINT_PERIOD = math.ceil(own.CHECKPOINT_EPOCHS * per_epoch)
        if own.EVAL_EPOCHS:
            cfg.TEST.EVAL_PERIOD = math.ceil(own.EVAL_EPOCHS * per_epoch)
    if own.STEP_FRACTIONS:
        steps = {int(share * solver.MAX_ITER) for share in own.STEP_FRACTIONS}
        solver.STEPS = tuple(sorted(step for step in steps if 0 < step < solver.MAX_ITER))
    if own.REFERENCE_BATCH:
        solver.BASE_LR *= solver.IMS_PER_BATCH / own.REFERENCE_BATCH
    # The config that is saved must mean the same when it is used again.
    for key in _IN_EPOCHS:
        own[key] = type(own[key])()
    if isinstance(cfg, RunConfig):  # these overrides have been read
        used = [f"CLASSIFICATION.{key}" for key in _IN_EPOCHS]
        cfg.overridden[:] = [key for key in cfg.overridden if key not in used]
