"""A LazyConfig from its file and overrides, with errors that name the line or the key."""

import difflib
import logging
import os
import traceback
from collections.abc import Iterable, Sequence

from detectron2 import model_zoo
from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from gn_practical.training.config.node import ConfigFileError
from gn_practical.training.lazy.keys import KEYS, TRAIN_ONLY

_INSTALLED = os.path.join(os.path.dirname(model_zoo.__file__), "configs")
_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
_OURS = ("pgn", "ws", "datasets")


def find_file(path: str) -> str:
    """Return the path of a config, or of Detectron2's of this name.

    Raises:
        ConfigFileError: if there is none.

    Example:
        >>> os.path.basename(find_file("COCO-Detection/retinanet_R_50_FPN_1x.py"))
        'retinanet_R_50_FPN_1x.py'
    """
    for candidate in (path, os.path.join(_INSTALLED, path)):
        if os.path.isfile(candidate):
            return candidate
    raise ConfigFileError(
        f"--config-file must be a Python config, got {path!r}, which does not exist. Detectron2's "
        f"own are named as in {_INSTALLED}."
    )


def read_file(path: str) -> DictConfig:
    """Run a Python config, or read one that was saved as YAML.

    Raises:
        ConfigFileError: if it is not there, does not run, or lacks a part.
    """
    found = find_file(path)
    try:
        lazy = LazyConfig.load(found)
    except Exception as error:  # of any code
        raise ConfigFileError(
            f"a Python config must run, got {type(error).__name__}: {error} in {found}"
            f"{_line(error, found)}. Correct it."
        ) from error
    missing = [name for name in _PARTS if name not in lazy]
    if missing:
        hint = "It is a config of tools/train_net.py." if "MODEL" in lazy else "Import them there."
        raise ConfigFileError(
            f"a Python config must have {', '.join(_PARTS)}, got {found} without "
            f"{', '.join(missing)}. {hint}"
        )
    return lazy


def _line(error: Exception, path: str) -> str:
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename == path]
    return f", line {frames[-1].lineno}" if frames else ""


def override(lazy: DictConfig, words: Sequence[str]) -> None:
    """Change values in place, as ``path.key=value`` says.

    Differences from Detectron2: a key must exist, or be one of this package's, for a misspelt one
    would change nothing; ``+path.key=value`` adds one.

    Raises:
        ValueError: for a word that is no override, or a key that does not exist.
    """
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or key.startswith("~"):
            raise ValueError(
                f"overrides of a Python config must be path.key=value, got {word!r}. For example: "
                "train.device=cpu; +path.key=value adds a key."
            )
        if not key.startswith("+"):
            _check_exists(lazy, key)
        try:
            LazyConfig.apply_overrides(lazy, [word])
        except Exception as error:  # hydra's are of many kinds
            what = " ".join(str(error).split())
            raise ValueError(
                f"an override must be a key and a value in hydra's syntax, got {word!r}: {what}. "
                "Quote values with spaces or brackets: 'train.output_dir=\"a folder\"'."
            ) from error


def check_keys(lazy: DictConfig) -> None:
    """Check the nodes that this package alone reads, and name what nobody reads in ``train``.

    Raises:
        ValueError: for a key that does not exist.
    """
    for node in _OURS:
        for key in lazy.get(node) or ():
            if f"{node}.{key}" not in KEYS:
                raise ValueError(_unknown(f"{node}.{key}", _siblings(lazy, node)))
    read = {path.split(".")[1] for path in (*KEYS, *TRAIN_ONLY) if path.startswith("train.")}
    unread = [f"train.{key}" for key in lazy.train if key not in read]
    if unread:
        logging.getLogger(__name__).warning(
            "Nothing in this run reads %s: without effect.", ", ".join(unread)
        )


def _check_exists(lazy: DictConfig, key: str) -> None:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(lazy, parent) if parent else lazy
    is_call = isinstance(node, DictConfig) and "_target_" in node  # knows its arguments itself
    is_there = OmegaConf.is_config(node) and (is_call or OmegaConf.select(lazy, key) is not None)
    is_there = is_there or (isinstance(node, DictConfig) and name in node)
    if not is_there and key not in KEYS and not key.startswith(TRAIN_ONLY):
        raise ValueError(_unknown(key, _siblings(lazy, parent)))


def _siblings(lazy: DictConfig, parent: str) -> list[str]:
    node = OmegaConf.select(lazy, parent) if parent else lazy
    names = map(str, node) if isinstance(node, DictConfig) else ()
    known = [f"{parent}.{name}".lstrip(".") for name in names]
    return [*known, *(path for path in (*KEYS, *TRAIN_ONLY) if path.rpartition(".")[0] == parent)]


def _unknown(key: str, known: Iterable[str]) -> str:
    known = sorted(set(known) - {key})
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.7)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known)}."
    return f"config keys must exist, got {key}. {hint} A key of your own is added with +{key}=..."
