"""Configuration keys of the trainer, added to a Detectron2 config."""

from collections.abc import Iterable

from detectron2.config import CfgNode

from gn_practical.training.config.node import look_up


def add_training_config(cfg: CfgNode) -> None:
    """Add the keys of the trainer, with their defaults, to a Detectron2 config in place.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = get_cfg()
        >>> add_training_config(cfg)
        >>> cfg.TEST.NUM_PICTURES
        8
    """
    # Data sets of your own in COCO's instance format, registered before anything is built:
    # ((name, image_root, instances_json), ...). Paths are relative to the working directory.
    cfg.DATASETS.COCO_INSTANCES = ()
    # Data sets of your own in COCO's panoptic format:
    # ((name, image_root, panoptic_root, panoptic_json, sem_seg_root, instances_json), ...),
    # registered as "<name>_separated"; tools/prepare_panoptic_coco.py makes sem_seg_root.
    cfg.DATASETS.COCO_PANOPTIC = ()

    # Precision under SOLVER.AMP.ENABLED: "float16" (CUDA, with loss scaling) or "bfloat16"
    # (CUDA and CPU, without).
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Parts of SOLVER.IMS_PER_BATCH, the batch of an optimizer step, that run one after another and
    # add up their gradients, for a GPU that does not hold a whole one. An iteration stays an
    # optimizer step. For SOLVER.REFERENCE_WORLD_SIZE a part counts as a GPU. docs/pretraining.md.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Iterations between two measurements of the gradient variance ratios of every group norm's
    # unit block, logged while training as isometry/{A,B,C,K}/<layer>; 0 for none. docs/audit.md.
    cfg.SOLVER.AUDIT_PERIOD = 0
    # Validation images drawn with predictions beside ground truth at each evaluation.
    cfg.TEST.NUM_PICTURES = 8

    # Find out at each evaluation what keeps AP and PQ from 100: the kinds of errors and what they
    # cost, confused classes, precision against recall, PQ by size. docs/errors.md.
    cfg.TEST.ERROR_ANALYSIS = False

    # Steps with a loss or gradient that is not finite which a run leaves out before the next one
    # ends it, in total; 0: the first one ends it. Each is kept in OUTPUT_DIR/bad_steps.json. What
    # float16's loss scaling leaves out in search of its scale is not counted.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 0
    # Images that training may skip because they or their annotations cannot be used, before the
    # next one ends it; 0: the first one ends it. Each counts once, however many epochs meet it,
    # and is listed with the reason in OUTPUT_DIR/skipped_samples.json.
    cfg.DATALOADER.MAX_SKIPPED_SAMPLES = 0

    # Share of a backbone's values that MODEL.WEIGHTS must fill before training; less is an error,
    # for weights of another architecture, or of names that match none, train nothing. Models
    # without a backbone are judged as a whole.
    cfg.MODEL.WEIGHTS_MIN_SHARE = 0.9
    # Evaluate weights in another model than they were trained in, or on other input: a warning in
    # place of the error.
    cfg.TEST.ALLOW_DIFFERENCES = False

    # How many of the checkpoints model_0000123.pth to keep, the newest; 0 for all. Where one can
    # be damaged, keep 2 at least: resuming takes the newest that is whole.
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0
    # Metric whose highest value is kept as model_best.pth, as metrics.json names it:
    # "panoptic_seg/PQ", "bbox/AP"; "" for none. Needs TEST.EVAL_PERIOD.
    cfg.TEST.BEST_METRIC = ""


COUNTS = (
    *("SOLVER.AUDIT_PERIOD", "SOLVER.MAX_SKIPPED_STEPS", "SOLVER.CHECKPOINT_KEEP_LAST"),
    *("DATALOADER.MAX_SKIPPED_SAMPLES", "TEST.NUM_PICTURES"),
)


def check_counts(cfg: CfgNode, keys: Iterable[str] = COUNTS, least: int = 0) -> None:
    """Raise a ValueError for the first integer of our own that is too small."""
    for key in keys:
        value = look_up(cfg, key)
        if value is not None and value < least:
            raise ValueError(
                f"{key} must be {least} or more, got {key}={value}. Correct the value."
            )
