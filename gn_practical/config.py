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
