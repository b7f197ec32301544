"""Norm types for Detectron2's ``get_norm``. The project's only monkeypatch.

``detectron2.layers.get_norm`` knows a closed dict, and a dozen modules import the function by name.
So every module that holds it, under whatever name, gets a function in its place that knows the
registered names and asks the one that was there for all others, which may be another extension's.
"""

import functools
import sys
from collections.abc import Callable
from difflib import get_close_matches
from types import FunctionType, ModuleType
from typing import Any

from detectron2 import layers
from detectron2.layers import batch_norm
from torch import nn

from gn_practical.layers import PracticalGroupNorm
from gn_practical.layers.baselines import BASELINES

NormFactory = Callable[[int], nn.Module]

# For messages; what Detectron2 takes is up to Detectron2.
_DETECTRON2 = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_factories: dict[str, NormFactory] = {"PGN": PracticalGroupNorm, **BASELINES}
_replaced: dict[Callable[..., Any], Callable[..., Any]] = {}  # by the function in its place


class UnknownNormError(KeyError, ValueError):
    """A name of a norm that nobody knows; a KeyError, as Detectron2's own."""

    def __str__(self) -> str:
        return self.args[0]


def register_norm(name: str, factory: NormFactory) -> None:
    """Make ``name`` a norm type of Detectron2: ``get_norm(name, C)`` gives ``factory(C)``.

    The norm is bound, standardized before and fused as ours are, as far as it has what
    :mod:`gn_practical.layers.protocol` says; nothing else is needed.

    Raises:
        ValueError: if the name is empty or another norm has it.

    Example:
        >>> from detectron2.layers import get_norm
        >>> register_norm("GN8", lambda channels: nn.GroupNorm(8, channels))
        >>> get_norm("GN8", 64).num_groups
        8
    """
    if not name or name in _DETECTRON2 or _factories.get(name, factory) is not factory:
        raise ValueError(
            f"name must be one that no other norm has, got name={name!r}. Known are "
            f"{', '.join([*_DETECTRON2, *_factories])}. Choose another name."
        )
    _factories[name] = factory
    register_pgn()


def register_pgn() -> None:
    """Make "PGN" and all registered norms known to Detectron2; ``import gn_practical`` does it.

    Idempotent. ``get_norm("PGN", C)`` gives an unbound :class:`PracticalGroupNorm`, and a name
    that nobody knows an error that lists the known ones. Call it again where something else has
    replaced ``get_norm`` since and does not ask who was there before.

    Example:
        >>> register_pgn()
        >>> from detectron2.layers import get_norm
        >>> get_norm("PGN", 64)
        PracticalGroupNorm(? -> 64, num_groups=unbound, eps=1e-05, affine=True)
    """
    inner = {previous: ours for ours, previous in _replaced.items()}
    for module, name, function in _holders():
        if function not in _replaced:
            if function not in inner:
                inner[function] = _wrap(function)
                _replaced[inner[function]] = function
            setattr(module, name, inner[function])


def unregister_pgn() -> None:
    """Undo :func:`register_pgn`: ``get_norm`` is what it was, in all modules."""
    for module, name, function in _holders():
        if function in _replaced:
            setattr(module, name, _replaced[function])


def _wrap(previous: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(previous)
    def get_norm(norm: str | NormFactory | None, out_channels: int) -> nn.Module | None:
        if isinstance(norm, str) and norm in _factories:
            return _factories[norm](out_channels)
        try:
            return previous(norm, out_channels)
        except KeyError as error:
            if error.args != (norm,):
                raise
        known = [*_DETECTRON2, *_factories]
        close = get_close_matches(norm, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UnknownNormError(
            f"NORM must be one of {', '.join(known)} or empty, got NORM={norm!r}.{hint} Correct "
            "the NORM keys of the config, or add the norm with gn_practical.register_norm."
        )

    return get_norm


def _holders() -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """List the globals of all modules that hold ``get_norm``: Detectron2's, its successor, ours."""
    present = {id(f) for f in (batch_norm.get_norm, layers.get_norm, *_replaced)}
    original = "get_norm", batch_norm.__name__  # others may have replaced it in some modules only
    return [
        (module, name, value)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if id(value) in present
        or (type(value) is FunctionType and (value.__qualname__, value.__module__) == original)
    ]
