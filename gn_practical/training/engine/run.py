"""What surrounds a run on every rank: stop signals, and errors in one line."""

import logging
import sysconfig
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gn_practical.training.data import DatasetError
from gn_practical.training.engine.logs import log_file
from gn_practical.training.engine.signals import STOP

_PACKAGE = str(Path(__file__).parents[2])
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
_MOST_LETTERS = 80


def run(main: Callable[[Namespace], Any], args: Namespace) -> Any:
    """Call ``main(args)``, stopped by signals, and ended by errors in one line.

    Raises:
        Interrupted: if a signal stopped it; the process ends with ``EXIT_INTERRUPTED``.
        SystemExit: with the line of an error that the user can correct.
    """
    with one_clear_error(args), STOP.handled():
        return main(args)


@contextmanager
def one_clear_error(args: Namespace | None = None) -> Iterator[None]:
    """End the process with the message alone of an error that the user can correct.

    Such are ValueError, FloatingPointError, and what Detectron2 says of a config with an assertion
    or of a name that a registry does not know; any other shows its traceback. With ``args``, the
    command line of a run, every error from inside a library is one of the config, whose overrides
    or else file are named: what fails in set-up, in the first step or in an evaluation fails for a
    value of it. ``is_for_config = False`` on the error says it does not. The traceback is kept in
    the log file of the run, if it has one.

    Example:
        >>> with one_clear_error(Namespace(config_file="a.yaml", opts=["MODEL.DEVICE", "gpu"])):
        ...     {}["gpu"]  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        SystemExit: error: the config must fit together, got KeyError: 'gpu'. Look at the \
overrides MODEL.DEVICE=gpu of a.yaml...
    """
    try:
        yield
    except Exception as error:
        if args and getattr(error, "is_for_config", True) and not _speaks_for_itself(error):
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".!: ")
            line = f"the config must fit together, got {reason}. Look at {_suspects(args)}."
        elif _is_for_the_user(error):
            line = error.args[0]
        else:
            raise
        where = ""
        if log_file():
            logging.getLogger(__name__).error("The run ends with an error.", exc_info=True)
            where = f" (traceback: {log_file()})"
        raise SystemExit(f"error: {line}{where}") from error


def _speaks_for_itself(error: Exception) -> bool:
    """Whether this package or a user's own code raised it, or a loader's worker in their place."""
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    is_library = origin.startswith((*_LIBRARIES, "<")) and not origin.startswith(_PACKAGE)
    is_ours = isinstance(error, ValueError) and not is_library
    return is_ours or isinstance(error, DatasetError | FloatingPointError)


def _is_for_the_user(error: Exception) -> bool:
    text = str(error.args[0]) if error.args else ""
    is_unknown_name = isinstance(error, KeyError) and "registry" in text
    kinds = ValueError | FloatingPointError | AssertionError
    return bool(text) and (is_unknown_name or isinstance(error, kinds))


def _suspects(args: Namespace) -> str:
    if args.opts:
        if "=" in str(args.opts[0]):  # those of a Python config
            pairs = (word.split("=", 1) for word in args.opts)
        else:
            pairs = zip(args.opts[::2], args.opts[1::2], strict=False)
        given = ", ".join(f"{key}={str(value)[:_MOST_LETTERS]}" for key, value in pairs)
        return f"the overrides {given} of {args.config_file}"
    return args.config_file or "the config"
