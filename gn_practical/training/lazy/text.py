"""A LazyConfig as plain YAML, which a checkpoint can hold and nobody has to run to read."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import yaml
from detectron2.config.instantiate import dump_dataclass
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf, SCMode

_PLAIN = (type(None), bool, int, float, str)


def as_yaml(lazy: DictConfig) -> str:
    """Return a LazyConfig as YAML that ``LazyConfig.load`` reads again.

    What is called stands there by its name, and so does a class that is an argument. What has no
    name, as a lambda, is described by where it stands: such a config cannot be built from its text.

    Example:
        >>> from detectron2.config import LazyCall
        >>> from torch import nn
        >>> print(as_yaml(DictConfig({"norm": LazyCall(nn.LayerNorm)(eps="${..eps}")})).strip())
        norm:
          eps: ${..eps}
          _target_: torch.nn.modules.normalization.LayerNorm
    """
    # Interpolations ("${..lr}") stay as they are written.
    instantiate = SCMode.INSTANTIATE
    content = OmegaConf.to_container(lazy, resolve=False, structured_config_mode=instantiate)
    return yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True, width=100)


def target_of(node: Any) -> Callable[..., Any] | None:
    """Return what a node calls; None for one that calls nothing."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    return locate(target) if isinstance(target, str) else target


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {_plain(key): _plain_item(key, each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # ShapeSpec, say
        return _plain(dump_dataclass(value))
    if name := _name(value):
        return {"_target_": "detectron2.utils.registry.locate", "name": name}
    return _description(value)


def _plain_item(key: Any, value: Any) -> Any:
    return _name(value) or _plain(value) if key == "_target_" else _plain(value)


def _name(value: Any) -> str:
    """Return the name by which a class or function is found again, "" if it is not."""
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    try:
        return name if locate(name) is value else ""
    except Exception:  # of what locate imports
        return ""


def _description(value: Any) -> str:
    code = getattr(value, "__code__", None)
    if code is not None:
        file = os.path.basename(code.co_filename)
        return f"<{value.__qualname__} in {file}, line {code.co_firstlineno}>"
    return f"<{type(value).__module__}.{type(value).__qualname__}>"
