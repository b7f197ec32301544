"""From a YAML file and overrides to a frozen config whose data sets are registered."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from gn_practical.config import add_pgn_config
from gn_practical.training.config.keys import add_training_config
from gn_practical.training.config.node import ConfigFileError, RunConfig
from gn_practical.training.data import register_datasets

# What yacs raises for keys and values that it cannot take.
_OF_YACS = (KeyError, AssertionError, ValueError, TypeError, AttributeError, RecursionError)


def load_cfg(
    config_file: str,
    opts: Sequence[str] = (),
    *,
    trusted: bool = False,
    add_config: Callable[[CfgNode], None] = lambda cfg: None,
) -> RunConfig:
    """Merge a YAML file and ``KEY VALUE`` overrides into Detectron2's and our defaults.

    ``MODEL.DEVICE: "auto"`` becomes CUDA where there is a GPU and the CPU elsewhere. The data sets
    of ``DATASETS.COCO_INSTANCES`` and ``DATASETS.COCO_PANOPTIC`` are registered.

    Args:
        config_file: path of the YAML file; empty for the defaults.
        opts: keys and values in turn.
        trusted: let the file, and the pickled proposals it names, run code.
        add_config: adds keys of a project's own.

    Returns:
        A frozen config.

    Raises:
        ValueError: naming the key or line that is wrong, and what is near to it.

    Example:
        >>> load_cfg("configs/pfpn_pgn.yaml", ["SOLVER.BASE_LR", "0.01"]).SOLVER.BASE_LR
        0.01
    """
    cfg = get_cfg()
    for add in (add_pgn_config, add_training_config, add_config):
        add(cfg)
    cfg = RunConfig(cfg)
    _merge(cfg, config_file, opts, trusted)
    if cfg.MODEL.LOAD_PROPOSALS and not trusted:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS must be False, got True: Detectron2 unpickles the proposals, "
            "which can run code. Add --trust-config if you trust their files."
        )
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def _merge(cfg: RunConfig, config_file: str, opts: Sequence[str], trusted: bool) -> None:
    if config_file.endswith(".py"):
        raise ConfigFileError(
            f"a config must be a YAML file, got {config_file}. Python configs are code: "
            "tools/lazyconfig_train_net.py trains them."
        )
    known = list(_keys(cfg))
    try:
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=trusted)
        cfg.merge_from_list(list(opts))
    except ConfigFileError:
        raise
    except _OF_YACS as error:
        raise ValueError(_explain(str(error.args[0] if error.args else error), known)) from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"a config must be a readable YAML file, got {what}") from error


def _explain(message: str, known: list[str]) -> str:
    missing = re.search(r"[Nn]on-existent (?:config )?key: (\S+)", message)
    if not missing:
        return f"the config must be a file of known keys and values of their types: {message}"
    near = difflib.get_close_matches(missing[1], known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"config keys must exist, got {missing[1]}.{hint}"


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
