"""A copy of a training state in host memory, so that it can be written while training goes on."""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

_DICTS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size)
_ALIGNMENT = 64  # bytes

_Key = tuple[torch.device, int, int]  # a piece of memory
_Pair = tuple[UntypedStorage, UntypedStorage]  # a piece of memory and its copy


class Snapshot:
    """Copies states of tensors and plain containers, as they are at one moment.

    Tensors come to the CPU; those that share memory share it in the copy too. The memory, one copy
    of the state, is kept for the next one: fresh memory would cost a step several times the
    copying. From a GPU the copy runs through pinned memory, in order with the steps before.

    Example:
        >>> weight, step = torch.zeros(2), torch.tensor(3)
        >>> snapshot = Snapshot()
        >>> copied = snapshot.take({"weight": weight, "step": step}, later=[weight])
        >>> _ = step.add_(1)
        >>> snapshot.complete()
        >>> _ = weight.fill_(1)
        >>> copied
        {'weight': tensor([0., 0.]), 'step': tensor(3)}
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._left: list[_Pair] = []
        self._streams: list[torch.cuda.Stream] = []

    def take(self, state: Any, later: Iterable[Tensor] = ()) -> Any:
        """Return a copy, to be read after :meth:`complete`; the copy before is overwritten.

        Tensors in ``later`` are copied by :meth:`complete` and must stay as they are until then.
        All others may change at once.

        Raises:
            ValueError: if it holds anything that a checkpoint could not be safely read with.
        """
        tensors: list[tuple[Tensor, Tensor]] = []
        copied = _rebuild(state, "", tensors)
        storages = {_key(each): each.untyped_storage() for each, _ in tensors}
        copies = self._make_room(storages)
        for each, empty in tensors:
            empty.set_(copies[_key(each)], each.storage_offset(), each.size(), each.stride())
        left = {_key(each) for each in later if _is_plain(each)}
        self._left = [(storages[key], copies[key]) for key in storages if key in left]
        _copy((storages[key], copies[key]) for key in storages if key not in left)
        devices = {each.device for each in storages.values() if each.is_cuda}
        self._streams = [torch.cuda.Stream(each) for each in devices]
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        return copied

    def complete(self) -> None:
        """Copy what was left, and wait until all of it has come from the GPU; in any thread."""
        with ExitStack() as streams:
            for stream in self._streams:
                streams.enter_context(torch.cuda.stream(stream))
            _copy(self._left)
        for stream in self._streams:
            stream.synchronize()
        self._left, self._streams = [], []

    def _make_room(self, storages: dict[_Key, UntypedStorage]) -> dict[_Key, UntypedStorage]:
        sizes = [-(-each.nbytes() // _ALIGNMENT) * _ALIGNMENT for each in storages.values()]
        *starts, size = np.cumsum([0, *sizes]).tolist()
        if size > self._memory.nbytes:
            if any(each.is_cuda for each in storages.values()):
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
            else:
                # NumPy asks the system for large pages, first written to several times faster.
                self._memory = np.empty(size, np.uint8)
        return {
            key: torch.from_numpy(self._memory[start : start + each.nbytes()]).untyped_storage()
            for start, (key, each) in zip(starts, storages.items(), strict=True)
        }


def _copy(pairs: Iterable[_Pair]) -> None:
    for pair in pairs:
        source, copied = (torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in pair)
        if source.is_cpu:
            # One thread of NumPy's saturates the memory; PyTorch's would wait for one another
            # where data workers hold the cores.
            np.copyto(copied.numpy(), source.numpy())
        else:
            copied.copy_(source, non_blocking=True)


def _rebuild(value: Any, path: str, tensors: list[tuple[Tensor, Tensor]]) -> Any:
    """Copy containers; tensors as empty ones, added to ``tensors`` with what they are to hold."""
    if isinstance(value, Tensor):
        if not _is_plain(value):
            return value.detach().cpu().clone()
        tensors.append((value, torch.empty(0, dtype=value.dtype)))
        return tensors[-1][1]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _IMMUTABLE):
        return value
    if type(value) in _DICTS:
        copied = copy.copy(value)  # with the versions of modules that OrderedDict carries
        for key, each in value.items():
            copied[key] = _rebuild(each, f"{path}.{key}", tensors)
        return copied
    if type(value) in _SEQUENCES:
        return type(value)(_rebuild(each, f"{path}[]", tensors) for each in value)
    raise ValueError(
        f"a checkpoint must hold tensors and plain containers, got {type(value).__name__} in "
        f"{path.lstrip('.')}. Put numbers, lists or tensors into that state_dict."
    )


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_conj())
    return strided and tensor.untyped_storage().nbytes() > 0


def _key(tensor: Tensor) -> _Key:
    storage = tensor.untyped_storage()
    return storage.device, storage.data_ptr(), storage.nbytes()
