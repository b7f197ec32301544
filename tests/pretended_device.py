"""A device that computes on the CPU and pretends not to be it: PyTorch's device for other hardware.

:func:`register` makes "pretended" known to this process. Its tensors wrap tensors of the CPU, with
values. An operator that gets one of each raises, as on a GPU, and so does NumPy; what the host
waits for on a GPU is noted in ``WAITS``.
"""

import traceback
from collections import Counter
from typing import Any

import torch
import torchvision  # noqa: F401 -- its operators
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME = "pretended"
_set_up = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
SUPPORTED = _set_up is not None  # from PyTorch 2.10 on
# Between devices, or with indices of the CPU, CUDA takes these too.
MIXED = (aten.copy_, aten._to_copy, aten._copy_from, aten.set_)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# What makes tensors: empty ones, and those whose size is not known before.
FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step",
    "randperm", "linspace", "eye", "eye.m",
)  # fmt: skip
PACKAGES = ("gn_practical", "detectron2")
WAITS: Counter[tuple[str, str]] = Counter()  # operator, and the file that asked


class Pretended(Tensor):
    """A tensor of the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, context: None, size: Any, stride: Any) -> "Pretended":
        return Pretended(inner["inner"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_mixed(func, args, kwargs)
        _note_wait(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
            kwargs.pop("non_blocking", None)
        result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        if device is None or torch.device(device).type == NAME:
            result = tree_map(_wrap, result)
            return return_and_correct_aliasing(func, args, kwargs, result)
        return result

    def __repr__(self) -> str:
        return f"Pretended({self.inner})"


def _unwrap(value: object) -> object:
    return value.inner if isinstance(value, Pretended) else value


def _wrap(value: object) -> object:
    if isinstance(value, Tensor) and not isinstance(value, Pretended):
        return Pretended(value)
    return value


def _refuse_mixed(func: Any, args: tuple, kwargs: dict) -> None:
    if func.overloadpacket in MIXED:
        return
    if func.overloadpacket in INDEXED and isinstance(args[0], Pretended):
        args = (args[0], *args[2:])
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    foreign = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if foreign and len(foreign) < len(tensors):
        raise RuntimeError(
            f"{func} must get tensors of one device, got one of the CPU of shape "
            f"{tuple(foreign[0].shape)}."
        )


def _note_wait(func: Any, args: tuple, kwargs: dict) -> None:
    name = func.overloadpacket.__name__
    to_cpu = name in ("_to_copy", "copy_") and _leaves_the_device(name, args, kwargs)
    if to_cpu or name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
        WAITS[name, _place()] += 1


def _leaves_the_device(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "copy_":
        return isinstance(args[1], Pretended) and not isinstance(args[0], Pretended)
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _place() -> str:
    """Name the file that asked, the innermost one outside of PyTorch, from its package on."""
    for frame, _ in traceback.walk_stack(None):
        path = frame.f_code.co_filename
        parts = path.split("/")
        if path != __file__ and "torch" not in parts:
            package = max((i for i, p in enumerate(parts) if p in PACKAGES), default=-2)
            return "/".join(parts[package:])
    return ""


class _Module:
    """What PyTorch asks of the module of a device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make the device known, for the rest of the process."""
    _set_up(NAME, _Module())
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in FACTORIES:
        kernels.impl(name, _factory(name), "PrivateUse1")
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("conv2d", "linear", "matmul", "conv_transpose2d.input"):
        kernels.impl(name, _autocast(_operator(name), None), "AutocastPrivateUse1")
    vision = torch.library.Library("torchvision", "IMPL")
    for name in ("nms", "roi_align"):
        operator = getattr(torch.ops.torchvision, name).default
        vision.impl(name, _autocast(operator, torch.float32), "AutocastPrivateUse1")
    _libraries.extend((kernels, everything, vision))


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _factory(name: str) -> Any:
    operator = _operator(name)

    def make(*args: Any, **kwargs: Any) -> Tensor:
        return Pretended(operator(*args, **{**kwargs, "device": torch.device("cpu")}))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _unwrap(target).copy_(_unwrap(source))


def _autocast(operator: Any, dtype: torch.dtype | None) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any) -> Tensor:
        to = dtype or torch.get_autocast_dtype(NAME)
        cast = [t.to(to) if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result = operator(*cast)
        # As torchvision's, which compute in float32 alone.
        return result.to(args[0].dtype) if dtype and result.is_floating_point() else result

    return run
