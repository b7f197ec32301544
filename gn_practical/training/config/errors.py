"""What Detectron2 and PyTorch raise for a config, as one error that names the config's keys."""

import sysconfig
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gn_practical.training.data import DatasetError

_PACKAGE = str(Path(__file__).parents[2])
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_MOST_LETTERS = 80


@contextmanager
def blame_config(args: Namespace) -> Iterator[None]:
    """Turn an error from inside a library into one that names the keys the user set.

    What fails in set-up, in the first step or in an evaluation fails for a value in the config,
    wherever in a library it shows. Errors of this package speak for themselves and pass, as do
    those that :func:`not_for_config` marked.

    Args:
        args: the command line: its overrides, or else its config file, are named.

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
    """Whether this package or a user's own code raised it, or a loader's worker in their place."""
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    is_library = origin.startswith((*_LIBRARIES, "<")) and not origin.startswith(_PACKAGE)
    is_ours = isinstance(error, ValueError) and not is_library
    return is_ours or isinstance(error, DatasetError | FloatingPointError)


def _suspects(args: Namespace) -> str:
    if args.opts:
        pairs = zip(args.opts[::2], args.opts[1::2], strict=False)
        given = ", ".join(f"{key}={str(value)[:_MOST_LETTERS]}" for key, value in pairs)
        return f"the overrides {given} of {args.config_file}"
    return args.config_file or "the config"
