"""What lies in a file of weights: its tensors by name, and what stands beside them."""

import os
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from gn_practical.weights.safe_loading import load_pickle, load_torch

# Keys that files keep their weights under, those that are taken first before the others: averages
# (EMA, a teacher) before what they average, as their authors evaluate them.
LEVELS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "teacher"),
    *("model", "state_dict", "model_state", "student", "blobs"),
)
_OURS = ("description", "num_groups")


@dataclass(frozen=True)
class Contents:
    """What one file holds.

    Attributes:
        name: the file's name, for errors and as a hint among sources with the same keys.
        tensors: weights and statistics under the names of the file.
        beside: what else stands at the file's top.
        level: the key that the weights were under; "" for none.
        others: keys of other weights in the file that were not taken.
        matching_heuristics: whether the file, or the query of its address, asks for Detectron2's.
    """

    name: str
    tensors: dict[str, Tensor]
    beside: dict[str, Any] = field(default_factory=dict)
    level: str = ""
    others: tuple[str, ...] = ()
    matching_heuristics: bool = False

    @property
    def ours(self) -> bool:
        """Whether this package wrote the file: its names are those of the model."""
        return any(key in self.beside for key in _OURS)


def read_contents(path: str, level: str | None = None) -> Contents:
    """Read a file of tensors and plain containers, without running what it says.

    Args:
        path: a file or an address that Detectron2's PathManager takes ("https://",
            "detectron2://", "catalog://", with "?matching_heuristics=True" as Detectron2 has it).
        level: the key to take the weights from, where the file has several.

    Raises:
        ValueError: if it is damaged, no weights, or could run code.
    """
    address, heuristics = _split_query(path)
    local = PathManager.get_local_path(address)
    loaded = _checked(_reader(local), local)
    ours = any(key in loaded for key in _OURS)
    level, others = _choose_level(loaded, level, ours, path)
    tensors = _tensors(loaded[level] if level else loaded)
    if not tensors:
        raise ValueError(
            f"a file of weights must hold tensors by name, got {path} with {_few(loaded)}. Save "
            "the state dict of its model in a file of its own."
        )
    beside = {k: v for k, v in loaded.items() if level and k not in (level, *others)}
    beside = {key: each for key, each in beside.items() if not isinstance(each, Namespace)}
    heuristics = heuristics or bool(beside.get("matching_heuristics"))
    return Contents(os.path.basename(local), tensors, beside, level, others, heuristics)


def _split_query(path: str) -> tuple[str, bool]:
    """Take Detectron2's query off an address."""
    parsed = urlparse(path)
    queries = parse_qs(parsed.query)
    heuristics = queries.pop("matching_heuristics", ["False"]) == ["True"]
    if queries:
        raise ValueError(
            "an address of weights must have no query but matching_heuristics=True, got "
            f"path={path}. Download the file and give its path."
        )
    return parsed._replace(query="").geturl(), heuristics


def _reader(path: str) -> Callable[[str], Any]:
    """Return what reads this file, by its first bytes; the name decides among pickles alone."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"weights must be a file that can be read, got {path}: {reason}. Correct the path."
        ) from error
    if start.startswith(b"PK"):
        return _load_zip
    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < os.path.getsize(path):
        return _load_safetensors
    if start.lstrip()[:1] == b"<":
        return _refuse_page
    if path.endswith(".safetensors"):
        return _load_safetensors
    return load_pickle if path.endswith(".pkl") else load_torch


def _checked(load: Callable[[str], Any], path: str) -> Mapping[str, Any]:
    """Load a file, with an error that names it."""
    try:
        loaded = load(path)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"a checkpoint must be a whole file of tensors and plain containers, got {path}: "
            f"{reason}. Load another checkpoint, or save this one's state dict alone."
        ) from error
    return loaded


def _load_zip(path: str) -> Any:
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()  # torch.load does not compare the checksums
    except Exception as error:  # zipfile raises many kinds on a damaged file
        raise ValueError(f"cut short or changed ({error})") from error
    if wrong:
        raise ValueError(f"the checksum of its part {wrong} differs")
    return load_torch(path)


def _load_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("it is read with safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"no whole safetensors file ({error})") from error


def _refuse_page(path: str) -> Any:
    raise ValueError("it is a page of HTML or XML, as a failed download leaves it")


def _choose_level(
    loaded: Mapping[str, Any], wanted: str | None, ours: bool, path: str
) -> tuple[str, tuple[str, ...]]:
    found = [key for key in LEVELS if isinstance(loaded.get(key), dict) and _tensors(loaded[key])]
    if wanted:
        if wanted not in found:
            raise ValueError(
                f"the weights must lie under one of {', '.join(found) or 'no key'}, got "
                f"level={wanted} for {path}. Choose one of these, or none."
            )
        return wanted, tuple(key for key in found if key != wanted)
    if ours and "model" in found:
        found.sort(key=lambda key: key != "model")
    return (found[0], tuple(found[1:])) if found else ("", ())


def _tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    arrays = {key: _tensor(each) for key, each in values.items() if isinstance(key, str)}
    return {key: each for key, each in arrays.items() if each is not None}


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    return value if isinstance(value, Tensor) else None


def _few(loaded: Mapping[str, Any]) -> str:
    names = [str(key) for key in loaded]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
