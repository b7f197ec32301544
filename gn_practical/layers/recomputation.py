"""Memory mode: outputs of group norms are computed again in the backward pass, not stored.

In conv → GN → ReLU → conv autograd stores the norm's input x and the next convolution's input
y = ReLU(GN(x)), which follows from x. While :func:`recomputing` is active, whatever would store y,
or a view of it, stores how to compute it: by the same operator from the same inputs, so that it
is the same to the last bit. That halves what a chain stores.

A residual that is itself such an output is not stored either. So the last block of a ResNet's
stage is computed from the block before it, and so on back; after ``LONGEST_CHAIN`` outputs one is
stored, for the time that this takes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gn_practical.layers import torch_internals as internals

LONGEST_CHAIN = 4  # the projection of a ResNet's stage and three blocks


class _State(threading.local):
    """Of each thread, as autograd's hooks are; its backward passes run in other threads."""

    outputs: "dict[int, _Output] | None" = None  # of this forward pass, by address of the storage
    contexts: list[AbstractContextManager] | None = None  # of the models that are running
    recent: "tuple[_Output, Tensor] | None" = None  # computed last, if there is use for it


_state = _State()


class _Stored(NamedTuple):
    tensor: Tensor
    version: int
    chain: int = 0

    def unpack(self) -> Tensor:
        version = internals.version(self.tensor)
        if version != self.version:  # autograd does not look where there are hooks
            raise RuntimeError(
                "A tensor needed for the gradient must not be modified in place, got version "
                f"{version} of a tensor of shape {tuple(self.tensor.shape)} saved at version "
                f"{self.version}. Modify a copy, or after the backward pass."
            )
        return self.tensor


class _View(NamedTuple):
    output: "_Output"
    geometry: tuple[torch.Size, tuple[int, ...], int]
    chain: int

    def unpack(self) -> Tensor:
        return self.output.compute().as_strided(*self.geometry)


class _Output:
    """An output of the operator: what it takes to compute it again."""

    def __init__(
        self, y: Tensor, version: int, function: Callable[..., Tensor], inputs: tuple
    ) -> None:
        self.storage = internals.reserve_storage(y)
        self.version, self.dtype = version, y.dtype
        self.function = function
        self.inputs = [None if t is None else _pack(t.detach()) for t in inputs]
        self.chain = 1 + max(t.chain for t in self.inputs if t is not None)
        self.uses = 0  # by the backward pass, still to come

    def compute(self) -> Tensor:
        if _state.recent is not None and _state.recent[0] is self:
            return _state.recent[1]
        with torch.no_grad():
            return self.function(*(None if t is None else t.unpack() for t in self.inputs))


def _pack(tensor: Tensor) -> _Stored | _View:
    if tensor.layout is torch.strided:
        output = (_state.outputs or {}).get(internals.storage_key(tensor))
        found = (internals.version(tensor), tensor.dtype)
        if output is not None and (output.version, output.dtype) == found:
            geometry = (tensor.shape, tensor.stride(), tensor.storage_offset())
            return _View(output, geometry, output.chain)
    return _Stored(tensor, internals.version(tensor))


def _save(tensor: Tensor) -> _Stored | _View:
    packed = _pack(tensor)
    if isinstance(packed, _View):
        packed.output.uses += 1
    return packed


def _load(packed: _Stored | _View) -> Tensor:
    if isinstance(packed, _View):  # the uses of an output mostly follow each other
        output = packed.output
        y = output.compute()
        output.uses -= 1
        _state.recent = (output, y) if output.uses > 0 else None
        return y.as_strided(*packed.geometry)
    return packed.unpack()


def remember(
    y: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], writes: int = 0
) -> None:
    """Have ``y`` computed again instead of stored, where memory mode is on.

    ``function`` returns it, to the last bit, from ``inputs``, which autograd stores anyway, once it
    has been written to in place ``writes`` times more.
    """
    if _state.outputs is None or not any(t.requires_grad for t in inputs if t is not None):
        return
    output = _Output(y, internals.version(y) + writes, function, inputs)
    if output.chain <= LONGEST_CHAIN:
        _state.outputs[internals.storage_key(y)] = output


def is_active() -> bool:
    """Whether memory mode is on for what this thread computes now."""
    return _state.outputs is not None and torch.is_grad_enabled()


@contextmanager
def recomputing() -> Iterator[None]:
    """Within this context nothing stores outputs of the fused operator for the backward pass.

    Values and gradients stay the same to the last bit, for about one more forward pass of the
    norms. A tensor that is modified after it was saved is an error, as without this context.

    Example:
        >>> from gn_practical.layers.fused_group_norm import fused_group_norm
        >>> x, conv = torch.randn(1, 8, 4, 4, requires_grad=True), nn.Conv2d(8, 8, 3)
        >>> with recomputing():
        ...     loss = conv(fused_group_norm(x, 2, relu=True)).sum()
        >>> loss.backward()
    """
    before, _state.outputs = _state.outputs, {}
    try:
        with saved_tensors_hooks(_save, _load):
            yield
    finally:
        _state.outputs = before


def recompute_outputs(model: nn.Module) -> None:
    """Run each forward pass of ``model`` that records gradients in :func:`recomputing`.

    A second call changes nothing. Compiled models run as without it. The norms should take their
    activation along, see ``gn_practical.modeling.fusion.fuse_norms``.

    Example:
        >>> from gn_practical.layers import PracticalGroupNorm
        >>> norm = PracticalGroupNorm(8)
        >>> norm.bind(in_channels=8, num_groups=1)
        >>> model = nn.Sequential(norm, nn.Conv2d(8, 8, 3))
        >>> recompute_outputs(model)
        >>> model(torch.randn(1, 8, 4, 4)).sum().backward()
    """
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)


def _enter(*_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    context = recomputing() if torch.is_grad_enabled() else nullcontext()
    context.__enter__()
    _state.contexts = [*(_state.contexts or []), context]


def _leave(*_: Any) -> None:
    if _state.contexts:
        _state.contexts.pop().__exit__(None, None, None)
