"""A copy of a training state in host memory, so that it can be written while training goes on."""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
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
        self._copies: dict[_Key, UntypedStorage] = {}
        self._left: list[UntypedStorage] = []
        self._streams: list[torch.cuda.Stream] = []

    def take(self, state: Any, later: Iterable[Tensor] = ()) -> Any:
        """Copy a state; the copy before is overwritten.

        Args:
            state: tensors and plain containers.
            later: tensors of it that :meth:`complete` copies: until then they must stay as they
                are. All others may change at once.

        Returns:
            The copy, to be read after :meth:`complete`.

        Raises:
            ValueError: if it holds anything that a checkpoint could not be safely read with.
        """
        storages = {_key(each): each for each in _storages(state)}
        self._make_room(storages)
        copied = self._rebuild(state, "")
        left = {_key(each) for each in _storages(list(later))}
        self._left = [each for key, each in storages.items() if key in left]
        self._copy(each for key, each in storages.items() if key not in left)
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
            self._copy(self._left)
        for stream in self._streams:
            stream.synchronize()
        self._left, self._streams = [], []

    def _make_room(self, storages: dict[_Key, UntypedStorage]) -> None:
        sizes = [-(-each.nbytes() // _ALIGNMENT) * _ALIGNMENT for each in storages.values()]
        starts = np.cumsum([0, *sizes])
        if starts[-1] > self._memory.nbytes:
            pinned = any(each.is_cuda for each in storages.values())
            self._memory = _allocate(int(starts[-1]), pinned)
        self._copies = {
            key: torch.from_numpy(self._memory[start : start + each.nbytes()]).untyped_storage()
            for start, (key, each) in zip(starts, storages.items(), strict=False)
        }

    def _copy(self, storages: Iterable[UntypedStorage]) -> None:
        for storage in storages:
            source, copied = (
                torch.empty(0, dtype=torch.uint8, device=each.device).set_(each)
                for each in (storage, self._copies[_key(storage)])
            )
            if storage.device.type == "cpu":
                # One thread of NumPy's saturates the memory; PyTorch's would wait for one another
                # where data workers hold the cores.
                np.copyto(copied.numpy(), source.numpy())
            else:
                copied.copy_(source, non_blocking=True)

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
