"""A copy of a training state in host memory, so that it can be written while training goes on."""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

_Key = tuple[torch.device, int, int]  # a piece of memory

_DICTS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size)


_ALIGNMENT = 64  # bytes


class Snapshot:
    """Copies states of tensors and plain containers, as they are at one moment.

    Tensors come to the CPU; those that share memory share it in the copy too. The memory, one copy
    of the state, is kept for the next one: fresh memory would cost a step several times the
    copying. From a GPU the copy runs through pinned memory, in order with the steps before and
    after, and :meth:`take` does not wait for it.

    Example:
        >>> weight = torch.zeros(2)
        >>> copied = Snapshot().take({"weight": weight, "iteration": 3})
        >>> _ = weight.fill_(1)
        >>> copied
        {'weight': tensor([0., 0.]), 'iteration': 3}
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._copies: dict[_Key, UntypedStorage] = {}
        self._copied: list[torch.cuda.Event] = []

    def take(self, state: Any) -> Any:
        """Copy a state; the copy before is overwritten.

        Args:
            state: tensors and plain containers.

        Returns:
            The copy, complete after :meth:`wait`.

        Raises:
            ValueError: if it holds anything that a checkpoint could not be safely read with.
        """
        storages = {_key(each): each for each in _storages(state)}
        self._copies = self._copy_storages(storages)
        devices = {each.device for each in storages.values() if each.is_cuda}
        self._copied = [torch.cuda.current_stream(each).record_event() for each in devices]
        return self._rebuild(state, "")

    def wait(self) -> None:
        """Wait until the copy from the GPU is there; in any thread."""
        for event in self._copied:
            event.synchronize()

    def _copy_storages(self, storages: dict[_Key, UntypedStorage]) -> dict[_Key, UntypedStorage]:
        sizes = [-(-each.nbytes() // _ALIGNMENT) * _ALIGNMENT for each in storages.values()]
        starts = np.cumsum([0, *sizes])
        if starts[-1] > self._memory.nbytes:
            pinned = any(each.is_cuda for each in storages.values())
            self._memory = _allocate(int(starts[-1]), pinned)
        copies = {}
        for start, (key, storage) in zip(starts, storages.items(), strict=False):
            part = self._memory[start : start + storage.nbytes()]
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            copied = torch.from_numpy(part)
            if storage.device.type == "cpu":
                # One thread of NumPy's saturates the memory; PyTorch's would wait for one another
                # where data workers hold the cores.
                np.copyto(part, source.numpy())
            else:
                copied.copy_(source, non_blocking=True)
            copies[key] = copied.untyped_storage()
        return copies

    def _rebuild(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return self._rebuild_tensor(value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, _IMMUTABLE):
            return value
        if type(value) in _DICTS:
            copied = copy.copy(value)  # with the versions of modules that OrderedDict carries
            for key, each in value.items():
                copied[key] = self._rebuild(each, f"{path}.{key}")
            return copied
        if type(value) in _SEQUENCES:
            return type(value)(self._rebuild(each, f"{path}[]") for each in value)
        raise ValueError(
            f"a checkpoint must hold tensors and plain containers, got {type(value).__name__} in "
            f"{path.lstrip('.')}. Put numbers, lists or tensors into that state_dict."
        )

    def _rebuild_tensor(self, tensor: Tensor) -> Tensor:
        if not _is_plain(tensor):
            return tensor.detach().cpu().clone()
        copied = self._copies[_key(tensor.untyped_storage())]
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(copied, *place)


def _allocate(size: int, pinned: bool) -> np.ndarray:
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    # NumPy asks the system for large pages: they are first written to several times faster.
    return np.empty(size, np.uint8)


def _storages(value: Any) -> Iterator[UntypedStorage]:
    """Yield the memory of all tensors of a state."""
    if isinstance(value, Tensor):
        if _is_plain(value):
            yield value.untyped_storage()
    elif isinstance(value, _DICTS):
        for each in value.values():
            yield from _storages(each)
    elif isinstance(value, _SEQUENCES):
        for each in value:
            yield from _storages(each)


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_conj())
    return strided and tensor.untyped_storage().nbytes() > 0


def _key(storage: UntypedStorage) -> _Key:
    return storage.device, storage.data_ptr(), storage.nbytes()
