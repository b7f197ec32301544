"""Weights and pickles of others, read without running what they say.

A pickle can call any Python function by its opcodes. So checkpoints are read by ``torch.load`` with
``weights_only``, and the ``.pkl`` files of the model zoos by an unpickler that knows arrays and
plain containers and nothing else.
"""

import collections
import pickle
import re
import warnings
from argparse import Namespace
from typing import Any

import numpy as np
import torch


def load_torch(path: str, *, mmap: bool = False) -> Any:
    """Read what ``torch.save`` wrote, if it is tensors and plain containers.

    With ``mmap`` the tensors stay on the disk until they are used.

    Raises:
        ValueError: if the file is damaged, or holds anything that would run code.
    """
    try:
        with warnings.catch_warnings():  # torch suggests how to lift the restriction
            warnings.simplefilter("ignore")
            # Training scripts save their arguments beside the weights. A Namespace is a bag of
            # values: making one runs nothing.
            with torch.serialization.safe_globals([Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of many kinds: a cut zip, a pickle that is refused, ...
        raise ValueError(_reason(error)) from error


def load_pickle(path: str) -> Any:
    """Read a ``.pkl`` file of a model zoo, of any Python and NumPy, if it is arrays and containers.

    Raises:
        ValueError: if the file is damaged, or names anything that could run code.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "a.pkl")
        >>> with open(path, "wb") as file:
        ...     pickle.dump(os.system, file)
        >>> load_pickle(path)
        Traceback (most recent call last):
        ValueError: it names posix.system, which is no array or plain container
    """
    try:
        with open(path, "rb") as file:
            return _arrays(_ArrayUnpickler(file, encoding="latin1").load())
    except Exception as error:  # a damaged pickle raises any kind
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return what was wrong in one line, without PyTorch's advice how to run it all the same."""
    text = str(error) or type(error).__name__
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it names {refused[1]}, which is no tensor or plain container"
    if "weights_only" in text:
        return "it is of a kind that can run code"
    return text.splitlines()[0]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays by itself from bytes, and calls nothing that a file names.

    NumPy's own functions are stood in for by the ones below: its ``__setstate__`` takes what it
    is given, and a file could give it a type whose fields lie outside of the data.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no array or plain container"
            ) from None


class _Dtype:
    """Stands in for ``numpy.dtype`` of plain numbers and strings."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.hasobject or self.dtype.fields or self.dtype.subdtype:
            raise pickle.UnpicklingError(f"arrays must hold numbers, got dtype {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names = state[1:4]
        if subarray is not None or names is not None:
            raise pickle.UnpicklingError("arrays must hold numbers, got records")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for ``numpy.ndarray`` until the whole file is read."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _from_bytes(data: Any, dtype: _Dtype, shape: Any, order: str) -> np.ndarray:
    if isinstance(data, str):  # bytes of Python 2
        data = data.encode("latin1")
    return np.frombuffer(bytearray(data), dtype.dtype).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return _from_bytes(data, dtype, shape, order)


def _scalar(dtype: _Dtype, data: Any) -> np.generic:
    return _from_bytes(data, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes must be written as latin1, got {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Return what protocols before 3 call ``bytes`` for."""
    return b""


_ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "complex"): complex,
}


def _arrays(value: Any) -> Any:
    """Put the arrays in the place of their stand-ins, throughout plain containers."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return type(value)((key, _arrays(each)) for key, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_arrays(each) for each in value)
    if isinstance(value, type) or callable(value) or isinstance(value, _Dtype):
        raise pickle.UnpicklingError(f"it holds {value!r}, which is no array or plain container")
    return value
