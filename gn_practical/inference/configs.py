"""The config that a model is built from for inference: the checkpoint's own, or a file's."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from gn_practical.config import add_pgn_config
from gn_practical.weights.description import Description
from gn_practical.weights.stored import merge_described_config

_logger = logging.getLogger(__name__)
_OF_TRAINING = ("MODEL.WEIGHTS_MIN_SHARE",)
_LAZY = (
    "a config must be a YAML file of Detectron2's keys, got {}, a Python config, which is code and "
    "is not run. Build its model, and give it to gn_practical.Predictor(weights, model=...)."
)
_OF_YACS = (KeyError, AssertionError, ValueError, TypeError, AttributeError, RecursionError)


class _ConfigError(ValueError):
    """Says already which file is wrong."""


def config_for(
    path: str,
    description: Description,
    config_file: str | None = None,
    *,
    device: str | None = None,
    opts: Sequence[str] = (),
) -> CfgNode:
    """Return the config of weights: from ``config_file``, or else from their description.

    Args:
        path: of the weights, for errors.
        description: of the weights.
        config_file: a YAML file, or a name in Detectron2's model zoo.
        device: to run on; by default CUDA where there is a GPU.
        opts: keys and values in turn.

    Raises:
        ValueError: if there is none (the error names one that would do), or it is malformed, or
            the device is not there.
    """
    cfg = get_cfg()
    add_pgn_config(cfg)
    if config_file:
        _merge_file(cfg, config_file)
    elif getattr(description, "lazy_config", None):
        raise ValueError(_LAZY.format(path))
    elif description.config is None:
        raise ValueError(
            "a model without --config-file must hold the config it was trained with, got "
            f"{path}, which holds none. {_advice(path)}"
        )
    else:
        merge_described_config(cfg, description, path)
    try:
        cfg.merge_from_list(list(opts))
    except _OF_YACS as error:
        raise ValueError(
            f"overrides must be known keys and values of their types, got {error}. Correct them."
        ) from error
    cfg.MODEL.DEVICE = _checked_device(device)
    cfg.MODEL.WEIGHTS = ""  # they are loaded here
    return cfg


def _merge_file(cfg: CfgNode, name: str) -> None:
    """Merge a YAML file; keys of trainers, which a model does not need, may be among them."""
    try:
        loaded = _read_yaml(name)
        unknown = sorted(set(_keys(loaded)) - set(_keys(cfg)))
        cfg.set_new_allowed(True)
        cfg.merge_from_other_cfg(CfgNode(loaded))
        cfg.set_new_allowed(False)
    except _ConfigError:
        raise
    except (*_OF_YACS, yaml.YAMLError, OSError) as error:
        what = " ".join(str(error).split())
        raise _ConfigError(
            f"a config must be a YAML file of known keys, got {name}: {what}. Correct it."
        ) from error
    of_models = [key for key in unknown if key.startswith(("MODEL.", "INPUT."))]
    of_models = [key for key in of_models if key not in _OF_TRAINING]
    if of_models:
        _logger.warning("%s: %s: no effect here.", name, ", ".join(of_models))


def _read_yaml(name: str) -> dict[str, Any]:
    """Read a file, or a config of the zoo, some of which have tags that run code: its own."""
    if name.endswith(".py"):
        raise _ConfigError(_LAZY.format(name))
    if os.path.isfile(name):
        loaded = CfgNode.load_yaml_with_base(name, allow_unsafe=False)
        if "model" in loaded:  # in place of MODEL
            raise _ConfigError(_LAZY.format(name))
        return loaded
    try:
        path = model_zoo.get_config_file(name)
    except RuntimeError:
        raise _ConfigError(
            "a config must be a YAML file or a name in Detectron2's model zoo, got "
            f"config_file={name}. Correct the path."
        ) from None
    logger = logging.getLogger("fvcore.common.config")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of the tags
    try:
        return CfgNode.load_yaml_with_base(path, allow_unsafe=True)
    finally:
        logger.setLevel(level)


def _keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _advice(path: str) -> str:
    """Say which config file to give: the one beside the weights, or the model zoo's."""
    beside = os.path.join(os.path.dirname(path), "config.yaml")
    if "://" not in path and os.path.isfile(beside):
        return f"Give --config-file {beside}, which lies beside it."
    found = _in_the_zoo(path)
    if found:
        return f"It is of Detectron2's model zoo: give --config-file {found}."
    return (
        "Give --config-file: the config.yaml that Detectron2 wrote to the OUTPUT_DIR of its "
        "training, or a name of the model zoo, such as COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml."
    )


def _in_the_zoo(path: str) -> str:
    """Return the zoo's config of a checkpoint, whose file's name ends in a hash of the content."""
    name = _stem(path)
    root = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent
    for config in sorted(root.rglob("*.yaml")):
        config_name = config.relative_to(root).as_posix()
        try:
            url = model_zoo.get_checkpoint_url(config_name)
        except RuntimeError:
            continue
        if _stem(url) == name:
            return config_name
    return ""


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _checked_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"the device must be one of this machine, got device={device}: {reason}. Give cpu."
        ) from None
    return device
