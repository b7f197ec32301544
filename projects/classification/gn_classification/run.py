"""Training and evaluation of classifiers as ``train_net.py`` runs them."""

import logging
import math
from argparse import ArgumentParser, Namespace
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm

from gn_classification.config import add_classification_config
from gn_classification.datasets import open_dataset
from gn_classification.evaluation import ClassificationEvaluator
from gn_classification.loaders import (
    AUGMENTATIONS,
    TrainBatches,
    build_test_loader,
    build_train_loader,
)
from gn_practical.training import engine
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config import load_cfg
from gn_practical.training.config.keys import check_counts

_EPILOG = """
Examples, in projects/classification:

  The two-layer MLP of the paper's Table 3 on scikit-learn's digits, in seconds, without download:
    python train_net.py --config-file configs/mlp_digits.yaml

  The same on MNIST with 64 groups; data sets lie in DETECTRON2_DATASETS or are downloaded there:
    python train_net.py --config-file configs/mlp_mnist.yaml \\
        --download MODEL.PGN.NUM_GROUPS 64

  ResNet-56 on CIFAR-10 with batch norm; LN, IN, GN and PGN likewise:
    python train_net.py --config-file configs/resnet56_cifar10.yaml \\
        --download MODEL.CLASSIFIER.NORM BN

  Your own images, in my/{train,val}/<class>/ or my/<class>/:
    python train_net.py --config-file configs/resnet50_pet.yaml \\
        DATASETS.IMAGE_FOLDERS '[("my", "my")]' DATASETS.TRAIN '("my_train",)' \\
        DATASETS.TEST '("my_val",)' MODEL.CLASSIFIER.NUM_CLASSES 0

Results go to OUTPUT_DIR: results.json (errors in percent), metrics.json, curves.png,
num_groups.json, checkpoints and TensorBoard's events.
"""


# What :func:`complete` turns into MAX_ITER, STEPS, BASE_LR and CHECKPOINT_PERIOD.
_IN_EPOCHS = ("EPOCHS", "STEP_FRACTIONS", "REFERENCE_BATCH", "CHECKPOINT_EPOCHS")

_COUNTS = (
    *("MODEL.CLASSIFIER.NUM_CLASSES", "SOLVER.EPOCHS", "SOLVER.REFERENCE_BATCH"),
    *("SOLVER.CHECKPOINT_EPOCHS", "TEST.EVAL_EPOCHS", "DATASETS.VAL_FRACTION"),
)
_POSITIVE = (
    *("MODEL.CLASSIFIER.HIDDEN", "INPUT.IMAGE_SIZE", "TEST.IMS_PER_BATCH"),
    "SOLVER.IMS_PER_BATCH",
)


class ClassifierTrainer(engine.Trainer):
    """The project's ``Trainer`` with batches of labelled images and their errors.

    Args:
        cfg: a complete config, as :func:`complete` returns it.
    """

    def __init__(self, cfg: CfgNode) -> None:
        for key in _IN_EPOCHS:
            if cfg.SOLVER[key]:
                raise ValueError(
                    f"SOLVER.{key} must be turned into iterations before training, got SOLVER.{key}"
                    f"={cfg.SOLVER[key]}. Call gn_classification.run.complete(cfg)."
                )
        super().__init__(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainBatches:
        """Return training batches from memory or files."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Return the batches of an evaluation, from memory or files."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Return what counts errors."""
        return ClassificationEvaluator()


def argument_parser() -> ArgumentParser:
    """Return the detectors' parser with ``--download`` and examples of classification."""
    parser = engine.argument_parser()
    parser.description = "Train or evaluate an image classifier."
    parser.epilog = _EPILOG
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch torchvision's data sets that are missing to DETECTRON2_DATASETS",
    )
    return parser


def main(args: Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``--eval-only``, on this rank.

    Args:
        args: what :func:`argument_parser` parsed.

    Returns:
        The results of the evaluation on the main rank.
    """
    cfg = setup(args)
    if args.eval_only:
        model = ClassifierTrainer.build_model(cfg)
        checkpointer = GroupsCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = ClassifierTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = ClassifierTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def setup(args: Namespace) -> CfgNode:
    """Read and complete the config, set up folder and logs, and check all that is known."""
    cfg = load_cfg(
        args.config_file,
        args.opts,
        trusted=args.trust_config,
        add_config=add_classification_config,
    )
    cfg = complete(cfg, args)
    engine.default_setup(cfg, args)
    engine.check_run(cfg, args.eval_only, args.resume)
    _check_classes(cfg, args.eval_only)
    return cfg


def complete(cfg: CfgNode, args: Namespace) -> CfgNode:
    """Fill in what follows from the data: the number of classes, and epochs as iterations.

    Args:
        cfg: frozen.
        args: what :func:`argument_parser` parsed.

    Returns:
        A frozen config that says the same in iterations.

    Raises:
        ValueError: for values that contradict each other; ``DatasetError`` for data.
    """
    check_counts(cfg, _COUNTS)
    check_counts(cfg, _POSITIVE, least=1)
    _check_combinations(cfg, args)
    names = cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if args.download:
        if comm.get_local_rank() == 0:
            for name in names:
                open_dataset(cfg, name, download=True)
        comm.synchronize()
    opened = open_dataset(cfg, names[0])
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = cfg.MODEL.CLASSIFIER.NUM_CLASSES or len(opened.classes)
    if not args.eval_only:
        _set_schedule(cfg, len(opened))
    cfg.freeze()
    return cfg


def _set_schedule(cfg: CfgNode, num_images: int) -> None:
    solver = cfg.SOLVER
    per_epoch = num_images / solver.IMS_PER_BATCH
    if solver.EPOCHS:
        solver.MAX_ITER = math.ceil(solver.EPOCHS * per_epoch)
    if solver.EPOCHS and solver.CHECKPOINT_EPOCHS:
        solver.CHECKPOINT_PERIOD = math.ceil(solver.CHECKPOINT_EPOCHS * per_epoch)
    if solver.EPOCHS and cfg.TEST.EVAL_EPOCHS:
        cfg.TEST.EVAL_PERIOD = math.ceil(cfg.TEST.EVAL_EPOCHS * per_epoch)
    if solver.STEP_FRACTIONS:
        steps = {int(share * solver.MAX_ITER) for share in solver.STEP_FRACTIONS}
        solver.STEPS = tuple(sorted(step for step in steps if 0 < step < solver.MAX_ITER))
    if solver.REFERENCE_BATCH:
        solver.BASE_LR *= solver.IMS_PER_BATCH / solver.REFERENCE_BATCH
    logging.getLogger("gn_practical").info(
        "%d images, batches of %d: %d iterations, %.1f epochs; learning rate %g.",
        *(num_images, solver.IMS_PER_BATCH, solver.MAX_ITER, solver.MAX_ITER / per_epoch),
        solver.BASE_LR,
    )
    # The config that is saved must mean the same when it is used again.
    for key in _IN_EPOCHS:
        solver[key] = type(solver[key])()


def _check_combinations(cfg: CfgNode, args: Namespace) -> None:
    for key in ("TRAIN", "TEST"):
        names = cfg.DATASETS[key]
        needs_one = key == "TRAIN" and not args.eval_only
        if len(names) != 1 if needs_one else key == "TEST" and args.eval_only and not names:
            raise ValueError(
                f"DATASETS.{key} must name one data set, got DATASETS.{key}={tuple(names)}. For "
                f"""example: DATASETS.{key} "('digits_{key.lower()}',)"."""
            )
    if cfg.SOLVER.EPOCHS and "SOLVER.MAX_ITER" in args.opts:
        raise ValueError(
            f"SOLVER.EPOCHS must be 0 where SOLVER.MAX_ITER is given, got SOLVER.EPOCHS="
            f"{cfg.SOLVER.EPOCHS}. Add SOLVER.EPOCHS 0, or leave SOLVER.MAX_ITER out."
        )
    augmentation = cfg.INPUT.AUGMENTATION
    known = AUGMENTATIONS[:2] if cfg.DATASETS.IN_MEMORY else AUGMENTATIONS
    if augmentation not in known:
        raise ValueError(
            f"INPUT.AUGMENTATION must be one of {', '.join(known)} with DATASETS.IN_MEMORY="
            f"{cfg.DATASETS.IN_MEMORY}, got INPUT.AUGMENTATION={augmentation}. Correct the value, "
            "or add DATASETS.IN_MEMORY False."
        )


def _check_classes(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check that the model and all data sets of a run have the same classes."""
    names = cfg.DATASETS.TEST if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    first = open_dataset(cfg, names[0]).classes
    if len(first) != cfg.MODEL.CLASSIFIER.NUM_CLASSES:
        raise ValueError(
            f"MODEL.CLASSIFIER.NUM_CLASSES must be that of {names[0]}, {len(first)}, got "
            f"MODEL.CLASSIFIER.NUM_CLASSES={cfg.MODEL.CLASSIFIER.NUM_CLASSES}. Add "
            f"MODEL.CLASSIFIER.NUM_CLASSES {len(first)}, or 0 to take that of the data."
        )
    for name in names[1:]:
        others = set(open_dataset(cfg, name).classes) ^ set(first)
        if others:
            raise ValueError(
                f"All data sets of a run must have the same classes, got {names[0]} and {name} "
                f"that differ in {', '.join(sorted(others)[:5])}. Rename or remove their folders."
            )
