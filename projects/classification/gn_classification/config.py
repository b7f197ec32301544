"""Configuration keys of classification."""

from detectron2.config import CfgNode


def add_classification_config(cfg: CfgNode) -> None:
    """Add the keys of classification, with their defaults, to a Detectron2 config in place.

    Args:
        cfg: a config with the keys of the norm and the trainer.
    """
    cfg.MODEL.CLASSIFIER = CfgNode()
    # Classes; 0: as many as the training set has (train_net.py fills it in).
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 0
    # The norm of the model: "BN", "PGN", "LN" (one group), "IN" (a group a channel), "GN"
    # (MODEL.PGN.NUM_GROUPS, 32 if that is 0), or what else get_norm knows; "" for none.
    cfg.MODEL.CLASSIFIER.NORM = "PGN"
    # Layers of the ResNet: 6n + 2 of those for CIFAR, or 18 to 152 of torchvision's.
    cfg.MODEL.CLASSIFIER.DEPTH = 56
    # Units of the MLP's hidden layer.
    cfg.MODEL.CLASSIFIER.HIDDEN = 512
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
