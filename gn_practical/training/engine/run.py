"""What surrounds a run on every rank: stop signals, and errors in one line."""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gn_practical.training.config.errors import blame_config
from gn_practical.training.engine.logs import log_file
from gn_practical.training.engine.signals import STOP


def run(main: Callable[[Namespace], Any], args: Namespace) -> Any:
    """Call ``main(args)``, stopped by signals, and ended by errors in one line.

    Args:
        main: trains or evaluates.
        args: what :func:`gn_practical.training.engine.argument_parser` parsed.

    Raises:
        Interrupted: if a signal stopped it; the process ends with ``EXIT_INTERRUPTED``.
        SystemExit: with the line of an error that the user can correct.
    """
    with one_clear_error(), STOP.handled(), blame_config(args):
        return main(args)


@contextmanager
def one_clear_error() -> Iterator[None]:
    """End the process with the message alone of an error that the user can correct.

    Such are ValueError, FloatingPointError, and what Detectron2 says of a config with an assertion
    or of a name that a registry does not know; any other shows its traceback. The traceback is kept
    in the log file of the run, if it has one.
    """
    try:
        yield
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        where = ""
        if log_file():
            logging.getLogger(__name__).error("The run ends with an error.", exc_info=True)
            where = f" (traceback: {log_file()})"
        raise SystemExit(f"error: {error.args[0]}{where}") from error


def _is_for_the_user(error: BaseException | None) -> bool:
    if not (error and error.args and str(error.args[0])):
        return False
    # An UnknownNormError is both.
    if isinstance(error, KeyError) and not isinstance(error, ValueError):
        return "registry" in str(error.args[0])
    return isinstance(error, ValueError | FloatingPointError | AssertionError)
