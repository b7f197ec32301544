"""A console that can be read, and everything in ``OUTPUT_DIR/log.txt``."""

import logging
import os
import sys
import textwrap

from detectron2.utils import comm

_LOGGERS = ("detectron2", "fvcore", "gn_practical", "py.warnings")
# What these say of a run without trouble is for the file alone: tables, config, repeated warnings.
DETAILS = logging.getLogger("gn_practical.details")
_FOR_THE_FILE = (
    *(DETAILS.name, "gn_practical.modeling", "detectron2.data", "detectron2.checkpoint"),
    "detectron2.utils.env",
)
# PyTorch's advice to its own developers, with handlers of its own.
_NOISY = ("torch.utils.cpp_extension", "torch.fx._symbolic_trace", "torch.multiprocessing.spawn")
_COLUMNS, _TIME = 100, "%m/%d %H:%M:%S"

_handlers: list[logging.Handler] = []


def start_logging(output_dir: str) -> None:
    """Log to the console on the main rank, and to a file of this rank, until the next call.

    The console shows what a user must know, without colours and within 100 columns; the file holds
    all of it, Python's warnings and the tracebacks of errors too: ``log.txt``, ``log.txt.rank1``,
    ... of ``output_dir``, which must exist.
    """
    rank = comm.get_rank()
    path = os.path.join(output_dir, f"log.txt.rank{rank}" if rank else "log.txt")
    earlier = list(_handlers)  # of an earlier run in this process
    _handlers[:] = [_file_handler(path)] if rank else [_file_handler(path), _console_handler()]
    for logger in map(logging.getLogger, _LOGGERS):
        for handler in earlier:
            logger.removeHandler(handler)
        for handler in _handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logging.captureWarnings(True)
    quiet_torch()


def quiet_torch() -> None:
    """Keep PyTorch's remarks on its own inside from the console."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def each_handler() -> list[logging.Handler]:
    """Return what :func:`start_logging` logs to."""
    return list(_handlers)


def log_file() -> str:
    """Return the path of the file that is logged to, "" before :func:`start_logging`."""
    return _handlers[0].baseFilename if _handlers else ""


def _file_handler(path: str) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    line = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
    handler.setFormatter(logging.Formatter(line, datefmt=_TIME))
    return handler


def _console_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_ConsoleFormatter("[%(asctime)s] %(message)s", datefmt=_TIME))
    handler.addFilter(_is_for_the_console)
    return handler


def _is_for_the_console(record: logging.LogRecord) -> bool:
    if record.exc_info or record.name == "py.warnings":  # an error ends the run, in one line
        return False
    quiet = any(f"{record.name}.".startswith(f"{prefix}.") for prefix in _FOR_THE_FILE)
    return record.levelno > (logging.INFO if quiet else logging.DEBUG)


class _ConsoleFormatter(logging.Formatter):
    """Names the level of warnings and errors, and breaks long lines."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno > logging.INFO:
            text = f"{record.levelname}: {text}"
        if len(text) <= _COLUMNS or "\n" in text:
            return text
        whole = {"break_long_words": False, "break_on_hyphens": False}
        return textwrap.fill(text, _COLUMNS, subsequent_indent="    ", **whole)
