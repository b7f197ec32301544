"""What the trainer says about its config's keys, said about those of a LazyConfig."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from gn_practical.training.engine.logs import each_handler
from gn_practical.training.lazy.keys import KEYS

_LAZY = {key: path for path, key in KEYS.items()}
_KEY = "|".join(sorted(map(re.escape, _LAZY), key=len, reverse=True))
_KEY = rf"(?<![\w.$])({_KEY})(?![\w]|\.\w)"
_ADVICE = re.compile(rf"\b([Aa]dd|[Ss]et|override:) {_KEY} (\"[^\"]*\"|'[^']*'|[\w.+-]*\w)")


def in_lazy_words(text: str) -> str:
    """Return a text about the trainer's keys as one about those of a LazyConfig.

    Example:
        >>> in_lazy_words("got SOLVER.AMP.DTYPE=float16. Add SOLVER.AMP.DTYPE bfloat16.")
        'got train.amp.dtype=float16. Add train.amp.dtype=bfloat16.'
    """
    text = _ADVICE.sub(lambda found: f"{found[1]} {_LAZY[found[2]]}={found[3]}", text)
    return re.sub(_KEY, lambda found: _LAZY[found[1]], text)


@contextmanager
def errors_in_lazy_words() -> Iterator[None]:
    """Let the errors of this block name the keys of the LazyConfig."""
    try:
        yield
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (in_lazy_words(error.args[0]), *error.args[1:])
        raise


def log_in_lazy_words() -> None:
    """Let what is logged from now on name the keys of the LazyConfig."""
    for handler in each_handler():
        handler.addFilter(_reword)


def _reword(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    record.msg, record.args = in_lazy_words(text), ()
    return True
