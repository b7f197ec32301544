"""Overrides that nothing reads: said, in place of silently ignored."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from gn_practical.training.config.overrides import override_pairs

# Read before the recording starts, or by the evaluation, which comes later.
_READ_ELSEWHERE = ("SEED", "CUDNN_BENCHMARK", "OUTPUT_DIR", "VERSION", "DATASETS.", "TEST.")


class _Reads(set):
    """Dotted keys that were read, one set for a config and all of its clones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Reads":
        return self


class RecordedCfgNode(CfgNode):
    """A config that notes which of its keys are read."""

    def __getitem__(self, name: str) -> Any:
        self.__dict__["reads"].add(self.__dict__["path"] + name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, as a dict does."""
        self.__dict__["reads"].add(self.__dict__["path"] + name)
        return super().get(name, default)


def record_reads(cfg: CfgNode) -> CfgNode:
    """Return a copy of a config that notes which of its keys are read, by it and its clones.

    Args:
        cfg: stays as it is.

    Example:
        >>> from detectron2.config import get_cfg
        >>> cfg = record_reads(get_cfg())
        >>> cfg.clone().SOLVER.MAX_ITER
        40000
        >>> unread_keys(cfg, ["SOLVER.MAX_ITER", "SOLVER.GAMMA"])
        ['SOLVER.GAMMA']
    """
    cfg = cfg.clone()
    _convert(cfg, "", _Reads())
    return cfg


def _convert(node: CfgNode, path: str, reads: _Reads) -> None:
    for name, child in node.items():
        if isinstance(child, CfgNode):
            _convert(child, f"{path}{name}.", reads)
    object.__setattr__(node, "__class__", RecordedCfgNode)  # CfgNode's own allows keys alone
    node.__dict__.update(path=path, reads=reads)


def unread_keys(cfg: CfgNode, keys: Sequence[str]) -> list[str]:
    """Return those of the keys that nothing has read, without those that are read elsewhere.

    Args:
        cfg: as :func:`record_reads` made it.
        keys: dotted.
    """
    reads = cfg.__dict__["reads"]
    return [
        key
        for key in keys
        if key not in reads and not key.startswith(_READ_ELSEWHERE) and "_TEST" not in key
    ]


class NameUnreadKeys(HookBase):
    """Warns after the first step of overrides that nothing has read.

    Args:
        cfg: as :func:`record_reads` made it, and the trainer was built from.
        opts: keys and values in turn.
    """

    def __init__(self, cfg: CfgNode, opts: Sequence[str]) -> None:
        self.cfg, self.opts = cfg, opts

    def after_step(self) -> None:
        """Warn, once."""
        if self.trainer.iter != self.trainer.start_iter:
            return
        values = override_pairs(self.opts)
        unread = unread_keys(self.cfg, list(values))
        if unread:
            logging.getLogger(__name__).warning(
                "Nothing in this run reads %s: without effect. Are they keys of this model and "
                "solver, or is what they belong to switched off?",
                ", ".join(f"{key}={values[key]}" for key in unread),
            )
