"""Bytes of the tensors that live at a time: deterministic, on the CPU as on a GPU."""

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is active, parameters left out.

    Attributes:
        peak: the most that lived after any operator, in bytes. What an operator needs inside
            itself is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        known = [*model.parameters(), *model.buffers()]
        self._known = {t.untyped_storage()._cdata for t in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0  # bytes made since the dead were last left out, and those that lived then
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._made:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self._bound += storage.nbytes()
        if self._bound > self.peak:
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Return the bytes that live."""
        self._made = {k: v for k, v in self._made.items() if not v[0].expired()}
        self._bound = sum(size for _, size in self._made.values())
        return self._bound


class AllocatorBytes:
    """The same of CUDA's allocator, without what lived before: with what operators need inside."""

    def __enter__(self) -> "AllocatorBytes":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()

    def now(self) -> int:
        """Return the bytes that were allocated since and are still."""
        return torch.cuda.memory_allocated() - self._before

    @property
    def peak(self) -> int:
        """The most that was allocated at a time."""
        return torch.cuda.max_memory_allocated() - self._before


def counter(model: nn.Module) -> LiveBytes | AllocatorBytes:
    """Return what counts the bytes where a model is."""
    return AllocatorBytes() if next(model.parameters()).is_cuda else LiveBytes(model)
