"""Names of one source in those of another, by patterns."""

import re
from collections.abc import Iterable

VALUES = r"(weight|bias|running_mean|running_var)"  # of a batch norm


def rename(name: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    r"""Return the new name by the first pattern that matches all of ``name``; None if none does.

    Example:
        >>> rename("fc.bias", [(r"fc\.(weight|bias)", r"linear.\1")])
        'linear.bias'
    """
    return next((re.sub(p, new, name) for p, new in patterns if re.fullmatch(p, name)), None)
