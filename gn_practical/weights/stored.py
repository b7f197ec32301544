"""What a checkpoint says about itself, for tools that are given no config."""

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from gn_practical.config import add_pgn_config
from gn_practical.weights.description import Description
from gn_practical.weights.read import read_weights


def load_description(path: str) -> Description:
    """Return what a file of weights says about itself, or its source is known to need.

    Args:
        path: a file or an address, as :func:`gn_practical.weights.read_weights` takes it.

    Raises:
        ValueError: if it is no whole file of weights.
    """
    return read_weights(path).description


def config_from_checkpoint(path: str) -> CfgNode:
    """Return the config that a checkpoint of this package was trained with.

    ``MODEL.DEVICE`` is one of this machine, and ``OUTPUT_DIR`` is not kept.

    Args:
        path: the checkpoint.

    Raises:
        ValueError: if it holds no config.
    """
    cfg = get_cfg()
    add_pgn_config(cfg)
    merge_stored_config(cfg, path)
    return cfg


def merge_stored_config(cfg: CfgNode, path: str) -> None:
    """Merge the config in a checkpoint into another one; keys that it has not are added.

    Args:
        cfg: changed in place.
        path: the checkpoint.

    Raises:
        ValueError: if it holds no config.
    """
    merge_described_config(cfg, load_description(path), path)


def merge_described_config(cfg: CfgNode, description: Description, path: str) -> None:
    """Merge the config of a description, that of the checkpoint at ``path``, into another one.

    Args:
        cfg: changed in place.
        description: as :func:`load_description` returns it.
        path: for the error.

    Raises:
        ValueError: if it holds no config.
    """
    if description.lazy_config:
        raise ValueError(
            f"a checkpoint must hold a config of YAML keys here, got {path}, which was trained by "
            "a Python config (tools/lazyconfig_train_net.py). Give a YAML config of the same "
            "model, or evaluate it with that tool and its --config-file."
        )
    text = description.config
    if text is None:
        raise ValueError(
            f"a checkpoint must hold the config it was trained with, got {path}, which holds none. "
            "Give the config's file."
        )
    cfg.set_new_allowed(True)
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text)))
    cfg.set_new_allowed(False)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
