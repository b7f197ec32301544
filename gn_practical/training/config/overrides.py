"""``KEY VALUE`` overrides of the command line."""

from collections.abc import Sequence
from typing import Any


def override_pairs(opts: Sequence[Any]) -> dict[Any, Any]:
    """Return {KEY: VALUE} of words in turn.

    Raises:
        ValueError: if a key or value is left over.

    Example:
        >>> override_pairs(["SEED", "1"])
        {'SEED': '1'}
    """
    if len(opts) % 2:
        raise ValueError(
            f"overrides must be pairs of KEY VALUE, got {len(opts)} words ending in {opts[-1]!r}. "
            "Quote values that hold spaces."
        )
    return dict(zip(opts[::2], opts[1::2], strict=True))


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part an option's words from the overrides behind it, which begin with a word in capitals.

    Example:
        >>> split_overrides(["exact", "32", "SEED", "1"])
        (['exact', '32'], ['SEED', '1'])
    """
    first = next((index for index, word in enumerate(words) if word.isupper()), len(words))
    return list(words[:first]), list(words[first:])
