"""Configuration keys of gn_practical, added to a Detectron2 config."""

from detectron2.config import CfgNode


def add_pgn_config(cfg: CfgNode) -> None:
    """Add the keys of gn_practical, with their defaults, to a Detectron2 config in place.

    Args:
        cfg: a config as ``detectron2.config.get_cfg()`` returns it.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = get_cfg()
        >>> add_pgn_config(cfg)
        >>> cfg.MODEL.PGN.NUM_GROUPS
        0
    """
    _add_group_norm_keys(cfg)
    _add_dataset_keys(cfg)
    _add_engine_keys(cfg)
    _add_classification_keys(cfg)
    _add_fault_keys(cfg)
    _add_checkpoint_keys(cfg)


def _add_group_norm_keys(cfg: CfgNode) -> None:
    cfg.MODEL.PGN = CfgNode()
    # Number of groups of every "PGN" norm. 0: what RULE says for each layer by itself;
    # a number: the same everywhere, for the paper's baselines through the same code.
    cfg.MODEL.PGN.NUM_GROUPS = 0
    # "paper": Algorithm 1 of arXiv:2302.03193.
    # "exact": the group size n_g = 3 + n_out / (n_in - n_out), from the factor
    # (n_g - 2) / (n_g - 3) in place of the paper's 1 + 4 / n_g; same clipping and divisor step.
    cfg.MODEL.PGN.RULE = "paper"
    # The activation that follows the norms, by its name in gn_practical.activation_gain: the rule
    # takes its forward over its backward gain (Section 2.3), 1 for the ReLU family. It names what
    # the model has; it does not change the model.
    cfg.MODEL.PGN.ACTIVATION = "relu"
    # ((pattern, num_groups), ...): the number of groups of single layers, by shell-style pattern
    # on the norm's path in the model; the last match wins. A pattern that matches nothing, or a
    # number that does not divide the layer's channels, is an error.
    cfg.MODEL.PGN.LAYER_NUM_GROUPS = ()
    # ((pattern, in_channels), ...): input channels of the weight layer that feeds a norm, where
    # they cannot be inferred from the modules.
    cfg.MODEL.PGN.IN_CHANNELS = ()
    # Iterations between two measurements of the gradient variance ratios of every group norm's
    # unit block, logged while training as isometry/{A,B,C,K}/<layer>; 0 for none. docs/audit.md.
    cfg.MODEL.PGN.AUDIT_PERIOD = 0

    # Run each norm with the residual sum and the ReLU that follow it as one operator, where the
    # model has a structure that gn_practical.modeling.fusion knows. docs/performance.md.
    cfg.MODEL.PGN.FUSED = True
    # Memory mode: what the norms return is computed again in the backward pass instead of stored,
    # which halves the activation memory of a chain of convolutions. Needs FUSED.
    cfg.MODEL.PGN.RECOMPUTE = False

    cfg.MODEL.WS = CfgNode()
    # Weight standardization of every convolution that a norm follows.
    cfg.MODEL.WS.ENABLED = False
    # (pattern, ...): convolutions, by pattern on their path, that keep their plain weights.
    cfg.MODEL.WS.EXCLUDE = ()


def _add_dataset_keys(cfg: CfgNode) -> None:
    # Data sets of your own in COCO's instance format, registered before anything is built:
    # ((name, image_root, instances_json), ...). Paths are relative to the working directory.
    cfg.DATASETS.COCO_INSTANCES = ()
    # Data sets of your own in COCO's panoptic format:
    # ((name, image_root, panoptic_root, panoptic_json, sem_seg_root, instances_json), ...),
    # registered as "<name>_separated"; tools/prepare_panoptic_coco.py makes sem_seg_root.
    cfg.DATASETS.COCO_PANOPTIC = ()


def _add_engine_keys(cfg: CfgNode) -> None:
    # Precision under SOLVER.AMP.ENABLED: "float16" (CUDA, with loss scaling) or "bfloat16"
    # (CUDA and CPU, without).
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Validation images drawn with predictions beside ground truth at each evaluation.
    cfg.TEST.NUM_PICTURES = 8


def _add_fault_keys(cfg: CfgNode) -> None:
    # Steps with a loss or gradient that is not finite which a run leaves out before the next one
    # ends it, in total; 0: the first one ends it. Each is kept in OUTPUT_DIR/bad_steps.json. What
    # float16's loss scaling leaves out in search of its scale is not counted.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 0
    # Images that training may skip because they or their annotations cannot be used, before the
    # next one ends it; 0: the first one ends it. Each counts once, however many epochs meet it,
    # and is listed with the reason in OUTPUT_DIR/skipped_samples.json.
    cfg.DATALOADER.MAX_SKIPPED_SAMPLES = 0


def _add_checkpoint_keys(cfg: CfgNode) -> None:
    # How many of the checkpoints model_0000123.pth to keep, the newest; 0 for all. Where one can
    # be damaged, keep 2 at least: resuming takes the newest that is whole.
    cfg.SOLVER.CHECKPOINT_KEEP_LAST = 0
    # Metric whose highest value is kept as model_best.pth, as metrics.json names it:
    # "panoptic_seg/PQ", "bbox/AP"; "" for none. Needs TEST.EVAL_PERIOD.
    cfg.TEST.BEST_METRIC = ""


def _add_classification_keys(cfg: CfgNode) -> None:
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Classes; 0: as many as the training set has (tools/train_classifier.py fills it in).
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 0
    # The norm of the model: "BN", "PGN", "LN" (one group), "IN" (a group a channel), "GN"
    # (MODEL.PGN.NUM_GROUPS, 32 if that is 0), or what else get_norm knows; "" for none.
    cfg.MODEL.CLASSIFIER.NORM = "PGN"
    # Layers of the ResNet: 6n + 2 of those for CIFAR, or 18 to 152 of torchvision's.
    cfg.MODEL.CLASSIFIER.DEPTH = 56
    # Units of the MLP's hidden layer.
    cfg.MODEL.CLASSIFIER.HIDDEN = 512
    # Let group norms run whose groups hold a single value, for an experiment that shows what
    # happens: the output is constant and no gradient passes.
    cfg.MODEL.PGN.ALLOW_DEGENERATE = False
    # Height and width to which images of classification are brought.
    cfg.INPUT.IMAGE_SIZE = 32
    # "none", "crop_flip" (pad by 4, crop, flip: CIFAR) or "resized_crop" (flip too: photographs,
    # read from files).
    cfg.INPUT.AUGMENTATION = "none"
    # ((name, folder), ...): data sets "<name>_train" and "<name>_val" for classification, from
    # folder/{train,val}/<class>/ or, split at random, from folder/<class>/.
    cfg.DATASETS.IMAGE_FOLDERS = ()
    # Hold all images on the model's device, decoded; False: read files as they are needed.
    cfg.DATASETS.IN_MEMORY = True
    # Share of each class to evaluate on where a data set has no such split.
    cfg.DATASETS.VAL_FRACTION = 0.2
    # Epochs of training in place of MAX_ITER; 0: as MAX_ITER and the periods say.
    cfg.SOLVER.EPOCHS = 0
    # Where the learning rate falls by GAMMA, as shares of the schedule, in place of STEPS.
    cfg.SOLVER.STEP_FRACTIONS = ()
    # BASE_LR is meant for a batch of this size and scaled in proportion to the batch; 0: it is
    # taken as it is.
    cfg.SOLVER.REFERENCE_BATCH = 0
    # Epochs between two checkpoints and two evaluations, where EPOCHS is given; 0: as the periods
    # in iterations say.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 10
    cfg.TEST.EVAL_EPOCHS = 1
    # Images in a batch of an evaluation of classification, on one GPU.
    cfg.TEST.IMS_PER_BATCH = 100
