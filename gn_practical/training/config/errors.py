"""What Detectron2 and PyTorch raise for a config, as one error that names the config's keys."""

import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from gn_practical.training.data import DatasetError

_PACKAGE = str(Path(__file__).parents[2])
_MOST_KEYS = 12
_MOST_LETTERS = 80


@contextmanager
def blame_config(args: Namespace) -> Iterator[None]:
    """Turn an error from inside a library into one that names the keys the user set.

    What fails in set-up, in the first step or in an evaluation fails for a value in the config,
    wherever in a library it shows. Errors of this package speak for themselves and pass, as do
    those that :func:`not_for_config` marked.

    Args:
        args: the command line: its overrides, or else the keys of its config file, are named.

    Raises:
        ValueError: in place of the library's error, which is its cause.

    Example:
        >>> args = Namespace(config_file="a.yaml", opts=["MODEL.DEVICE", "gpu"])
        >>> with blame_config(args):
        ...     {}["gpu"]
        Traceback (most recent call last):
        ValueError: the config must fit together, got KeyError: 'gpu'. Look at the overrides \
MODEL.DEVICE=gpu of a.yaml.
    """
    try:
        yield
    except Exception as error:
        if _speaks_for_itself(error) or getattr(error, "is_not_for_config", False):
            raise
        reason = " ".join(str(error).split())
        reason = f"{type(error).__name__}: {reason}"[:300].rstrip(".!: ")
        text = f"the config must fit together, got {reason}. Look at {_suspects(args)}."
        raise ValueError(text) from error


def not_for_config(error: Exception) -> None:
    """Let an error pass :func:`blame_config` as it is: the config has been seen to work.

    Args:
        error: about to be raised again.
    """
    error.is_not_for_config = True


def _speaks_for_itself(error: Exception) -> bool:
    """Whether this package raised it for the user, or again in place of a worker of a loader."""
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    is_ours = origin.startswith(_PACKAGE) and isinstance(error, ValueError)
    return is_ours or isinstance(error, DatasetError | FloatingPointError)


def _suspects(args: Namespace) -> str:
    if args.opts:
        pairs = zip(args.opts[::2], args.opts[1::2], strict=False)
        given = ", ".join(f"{key}={str(value)[:_MOST_LETTERS]}" for key, value in pairs)
        return f"the overrides {given} of {args.config_file}"
    keys = _keys_of(args.config_file)
    shown = ", ".join(keys[:_MOST_KEYS]) + (" ..." if len(keys) > _MOST_KEYS else "")
    return f"the keys that {args.config_file} sets: {shown}" if keys else "the config"


def _keys_of(path: str) -> list[str]:
    """List the dotted keys of a YAML file, without those of its base."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []
    return list(_dotted(content)) if isinstance(content, dict) else []


def _dotted(node: dict, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        elif key != "_BASE_":
            yield f"{prefix}{key}"
