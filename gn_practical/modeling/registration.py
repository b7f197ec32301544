"""The norm type "PGN" in Detectron2's ``get_norm``. The project's only monkeypatch.

``detectron2.layers.get_norm`` looks its argument up in a dict that is closed to extensions, and a
dozen modules of Detectron2 import the function by name. So both the definition and every name
that holds it are replaced; modules imported later take the replacement from
``detectron2.layers``.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from detectron2.layers import batch_norm
from torch import nn

from gn_practical.layers import PracticalGroupNorm

_ORIGINAL = batch_norm.get_norm
_KNOWN = ("BN", "SyncBN", "FrozenBN", "GN", "PGN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def _get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    if norm == "PGN":
        return PracticalGroupNorm(out_channels)
    if isinstance(norm, str) and norm and norm not in _KNOWN:
        raise ValueError(
            f"NORM must be one of {', '.join(_KNOWN)} or empty, got NORM={norm!r}. "
            "Correct the NORM keys of the config."
        )
    return _ORIGINAL(norm, out_channels)


def register_pgn() -> None:
    """Make "PGN" a norm type of Detectron2; ``import gn_practical`` does it.

    Idempotent. ``get_norm("PGN", C)`` gives an unbound :class:`PracticalGroupNorm`, and an unknown
    name an error that lists the known ones.

    Example:
        >>> register_pgn()
        >>> from detectron2.layers import get_norm
        >>> get_norm("PGN", 64)
        PracticalGroupNorm(? -> 64, num_groups=unbound, eps=1e-05, affine=True)
    """
    _replace(_ORIGINAL, _get_norm)


def unregister_pgn() -> None:
    """Undo :func:`register_pgn`."""
    _replace(_get_norm, _ORIGINAL)


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for module in _holders(old):
        module.get_norm = new


def _holders(function: Callable[..., Any]) -> Iterator[ModuleType]:
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get("get_norm") is function:
            yield module
